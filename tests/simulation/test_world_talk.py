"""A traffic week through the real chat service and event store; and fidelity to real people."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest_world import GOOD, STARTS, Sequence

from characterflywheel.characters import bundled_characters
from characterflywheel.errors import FlywheelError
from characterflywheel.llm.base import Completion, Sampling
from characterflywheel.records import ChatMessage, Conversation, Signal, User
from characterflywheel.serving.chat import ChatService
from characterflywheel.simulation.fidelity import compare
from characterflywheel.simulation.world import SimulatedPeople
from characterflywheel.store import EventStore, Position
from characterflywheel.store.export import conversations_from_export
from characterflywheel.tables import read

CHARACTERS = list(bundled_characters().values())[:4]


class Fixed:
    """A chat model that says one thing."""

    name = "fixed"

    def complete(
        self,
        conversations: Sequence[Sequence[ChatMessage]],
        *,
        n: int = 1,
        sampling: Sampling = Sampling(),
        seeds: Sequence[int],
    ) -> list[list[Completion]]:
        assert len(seeds) == len(conversations)
        return [[Completion(GOOD, (1,), (0.0,), "stop")] * n for _ in conversations]


class Allowed(NamedTuple):
    allowed: bool = True
    categories: tuple[str, ...] = ()


class Anything:
    """A safety policy that lets everything pass."""

    def check(self, text: str, *, context: str = "") -> Allowed:
        return Allowed()


class Week(NamedTuple):
    conversations: list[Conversation]
    signals: list[Signal]
    users: list[User]


def talked(people: SimulatedPeople, store: EventStore, folder: Path, generation: int = 1) -> Week:
    service = ChatService(store, {"fixed": Fixed()}, "fixed", Anything(), seed=3)
    people.talk(service, CHARACTERS, generation, STARTS)
    store.export(folder, Position(), store.position(), consenting_only=False)
    return Week(
        conversations_from_export(folder),
        read(folder / "signals.parquet", Signal),
        read(folder / "users.parquet", User),
    )


def test_both_populations_talk_and_leave_or_stay(people: SimulatedPeople, store: EventStore, tmp_path: Path) -> None:
    week = talked(people, store, tmp_path)
    sources = [one.source for one in week.conversations]
    assert (sources.count("user"), sources.count("internal")) == (6, 3)
    assert len(week.users) == 9
    continued = {s.message_id: s.value for s in week.signals if s.kind == "continue"}
    for one in week.conversations:
        replies = [m for m in one.messages if m.role == "assistant"]
        said = [m.content for m in one.messages if m.role == "user"]
        assert len(replies) == len(said) <= people.config.max_turns
        assert len(set(said)) == len(said)
        times = [m.created_at for m in one.messages]
        assert times == sorted(times)
        for turn, reply in enumerate(replies):
            if turn + 1 == people.config.max_turns:
                assert reply.id not in continued, "nobody knows what happens after the window"
            else:
                assert continued[reply.id] == float(turn + 1 < len(replies))
    known = {*people.lore.real.openers, *people.lore.words.answers}
    assert all(m.content in known for c in week.conversations if c.source == "user" for m in c.messages[::2])


def test_talking_again_adds_nothing_and_the_next_week_has_new_people(
    people: SimulatedPeople, store: EventStore, tmp_path: Path
) -> None:
    first = talked(people, store, tmp_path / "first")
    assert talked(people, store, tmp_path / "again") == first
    both = talked(people, store, tmp_path / "both", generation=2)
    assert len(both.users) == 2 * len(first.users)
    texts = [
        {m.content for c in part for m in c.messages if m.role == "user"}
        for part in (both.conversations[:9], both.conversations[9:])
    ]
    assert texts[0] != texts[1]


def test_no_character_is_an_error(people: SimulatedPeople, store: EventStore) -> None:
    service = ChatService(store, {"fixed": Fixed()}, "fixed", Anything())
    with pytest.raises(FlywheelError, match="no character"):
        people.talk(service, [], 1, STARTS)


def test_the_crowd_resembles_the_people_it_was_fitted_to(people: SimulatedPeople) -> None:
    found = {one.measure: one for one in people.fidelity(1000)}
    assert set(found) == {"stay", "words", "lag", "days", "rating"}
    assert found["stay"].distance < 0.1
    assert found["days"].distance < 0.06
    assert all(one.distance < 0.25 for one in found.values())


def test_comparison_of_a_distribution_with_itself_and_with_another() -> None:
    real = tuple(float(x) for x in range(101))
    assert compare("x", real, sorted(real)).distance == 0  # type: ignore[arg-type]
    shifted = compare("x", real, np.arange(101.0) + 50)
    assert shifted.distance == pytest.approx(50 / 101, abs=1e-3)
    assert shifted.real == (10, 25, 50, 75, 90)
