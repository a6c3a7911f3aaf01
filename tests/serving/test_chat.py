"""The chat service: arm, safety, model and store in that order, and it fails closed."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest

from characterflywheel import tables
from characterflywheel.characters import bundled_characters, system_prompt
from characterflywheel.errors import FlywheelError
from characterflywheel.experiment.assignment import assign
from characterflywheel.instructions import violations
from characterflywheel.llm.base import ChatModel, Completion, Sampling
from characterflywheel.people import Service, Utterance
from characterflywheel.records import ChatMessage, Exposure, Message, User
from characterflywheel.safety.policy import SafetyPolicy
from characterflywheel.serving.assignment import Running
from characterflywheel.serving.chat import ChatService, decline
from characterflywheel.store import EventStore, Position
from characterflywheel.store.export import conversations_from_export

AT = datetime(2026, 1, 5, tzinfo=UTC)
PIRATE = bundled_characters()["pirate"]


class Parrot:
    """A chat model that answers by a rule: it repeats the last words and says how many messages it saw."""

    def __init__(self, name: str, answer: str | None = None) -> None:
        self.name = name
        self.answer = answer
        self.seen: list[list[ChatMessage]] = []
        self.seeds: list[int] = []

    def complete(
        self,
        conversations: Sequence[Sequence[ChatMessage]],
        *,
        n: int = 1,
        sampling: Sampling = Sampling(),
        seeds: Sequence[int],
    ) -> list[list[Completion]]:
        self.seen += [list(one) for one in conversations]
        self.seeds += seeds
        texts = [f" {len(one)}: {one[-1].content} " if self.answer is None else self.answer for one in conversations]
        return [[Completion(text, (0,), (0.0,), "stop")] * n for text in texts]


class Verdict(NamedTuple):
    allowed: bool
    categories: tuple[str, ...] = ()


class NoKnives:
    """A policy that refuses knives, and breaks on a bomb."""

    def check(self, text: str, *, context: str = "") -> Verdict:
        if "bomb" in text:
            raise RuntimeError("the classifier is down")
        return Verdict("knife" not in text)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EventStore]:
    with EventStore.open(tmp_path / "flywheel.db") as opened:
        opened.add_users(User(id=f"user-{n}", population="user", created_at=AT) for n in range(40))
        opened.add_users([User(id="tester", population="internal", created_at=AT)])
        yield opened


def service_of(store: EventStore, *models: Parrot, **more: object) -> ChatService:
    by_name: dict[str, ChatModel] = {model.name: model for model in models}
    return ChatService(store, by_name, models[0].name, NoKnives(), **more)  # type: ignore[arg-type]


def say(service: Service, user: str, text: str, history: tuple[ChatMessage, ...] = ()) -> Utterance:
    conversation = service.open_conversation(user, PIRATE, "user", AT)
    return Utterance(conversation, user, PIRATE, history, text, AT + timedelta(seconds=5))


def exported(store: EventStore, folder: Path) -> list[Message]:
    store.export(folder, Position(), store.position())
    return [message for talk in conversations_from_export(folder) for message in talk.messages]


def test_a_reply_is_made_from_character_and_history_and_stored_with_its_question(
    store: EventStore, tmp_path: Path
) -> None:
    parrot = Parrot("base")
    history = (ChatMessage(role="user", content="Hi"), ChatMessage(role="assistant", content="Ahoy"))
    service = service_of(store, parrot)
    said = say(service, "user-1", "Where to?", history)
    (reply,) = service.reply([said])
    assert reply.content == "4: Where to?"
    assert (reply.role, reply.model, reply.fallback, reply.arm) == ("assistant", "base", False, None)
    assert parrot.seen[0][0] == ChatMessage(role="system", content=system_prompt(PIRATE))
    assert parrot.seen[0][1:3] == list(history)
    asked, answered = exported(store, tmp_path / "x")
    assert (asked.content, asked.created_at, asked.model) == ("Where to?", said.at, None)
    assert answered == reply
    service.signal(reply.id, "user-1", "thumb_up", AT)
    service.signal(reply.id, "user-1", "thumb_up", AT)
    assert store.position() == Position(messages=2, signals=1)


def test_a_repeated_call_changes_nothing(store: EventStore) -> None:
    parrot = Parrot("base")
    service = service_of(store, parrot, seed=3)
    said = [say(service, f"user-{n}", f"Hello {n}") for n in range(3)]
    first = service.reply(said)
    assert [reply.content for reply in first] == ["2: Hello 0", "2: Hello 1", "2: Hello 2"]
    assert service.reply(said) == first
    assert parrot.seeds[:3] == parrot.seeds[3:]
    assert len(set(parrot.seeds)) == 3
    assert store.position().messages == 6


@pytest.mark.parametrize(
    ("text", "answer", "asked"),
    [
        ("a knife", None, 0),
        ("a bomb", None, 0),
        ("hello", "here is a knife", 1),
        ("hello", "a bomb", 1),
        ("hi", " ", 1),
    ],
)
def test_it_fails_closed_in_character(store: EventStore, text: str, answer: str | None, asked: int) -> None:
    parrot = Parrot("base", answer)
    service = service_of(store, parrot)
    fine, (reply,) = Parrot("fine"), service.reply([say(service, "user-1", text)])
    assert reply.fallback
    assert "knife" not in reply.content
    assert "bomb" not in reply.content
    assert violations(PIRATE, reply.content) == ()
    assert len(parrot.seen) == asked
    assert service.caught.counts == ({("policy", "RuntimeError"): 1} if "bomb" in f"{text} {answer}" else {})
    assert store.position().messages == 2
    mixed = service_of(store, fine)
    assert [one.fallback for one in mixed.reply([say(mixed, "user-2", "a knife"), say(mixed, "user-3", "hi")])] == [
        True,
        False,
    ]


def test_every_character_declines_by_its_own_rules() -> None:
    for character in bundled_characters().values():
        assert violations(character, decline(character)) == ()


def test_the_real_safety_policy_fits(store: EventStore) -> None:
    service = ChatService(store, {"base": Parrot("base")}, "base", SafetyPolicy())
    (reply,) = service.reply([say(service, "user-1", "what a lovely day")])
    assert not reply.fallback


def test_users_are_served_by_their_arm_and_exposed_once(store: EventStore, tmp_path: Path) -> None:
    old, new = Parrot("old"), Parrot("new")
    shares = {"control": 0.3, "treatment": 0.3}
    active = Running.of("gen-1", "salt", shares, {"control": "old", "treatment": "new"})
    service = service_of(store, old, new, experiments=[active])
    said = [say(service, f"user-{n}", "Hello") for n in range(40)] + [say(service, "tester", "Hello")]
    replies = service.reply(said)
    service.reply([one._replace(at=one.at + timedelta(days=1)) for one in said])
    arms = {one.user_id: assign(one.user_id, "salt", shares) for one in said[:40]} | {"tester": None}
    assert set(arms.values()) == {"control", "treatment", None}
    for reply in replies:
        arm = arms[reply.user_id]
        assert reply.arm == arm
        assert reply.model == ("new" if arm == "treatment" else "old")
        assert reply.experiment == ("gen-1" if arm else None)
    store.export(tmp_path / "x", Position(), store.position())
    exposures = tables.read(tmp_path / "x" / "exposures.parquet", Exposure)
    assert {one.user_id: one.arm for one in exposures} == {name: arm for name, arm in arms.items() if arm}
    assert all(one.created_at == AT + timedelta(seconds=5) for one in exposures)


def test_an_exposure_survives_a_model_that_dies(store: EventStore) -> None:
    class Dying(Parrot):
        def complete(self, *args: object, **more: object) -> list[list[Completion]]:
            raise RuntimeError("out of memory")

    active = Running.of("gen-1", "salt", {"all": 1.0}, {"all": "base"})
    service = service_of(store, Dying("base"), experiments=[active])
    with pytest.raises(RuntimeError, match="out of memory"):
        service.reply([say(service, "user-1", "Hello")])
    assert store.position() == Position(exposures=1)


def test_mistakes_are_named(store: EventStore) -> None:
    with pytest.raises(FlywheelError, match=r"\['new'\] are not in service"):
        ChatService(store, {}, "new", NoKnives())
    with pytest.raises(FlywheelError, match="have no model"):
        Running.of("x", "s", {"b": 1.0}, {})
    with pytest.raises(FlywheelError, match=r"\['b'\] are not in service"):
        service_of(store, Parrot("a"), experiments=[Running.of("x", "s", {"arm": 1.0}, {"arm": "b"})])
    service = service_of(store, Parrot("a"))
    with pytest.raises(FlywheelError, match="not approved"):
        service.open_conversation("user-1", PIRATE.model_copy(update={"safety": "review"}), "user", AT)
    with pytest.raises(FlywheelError, match="'adore' does not exist"):
        service.signal("m", "user-1", "adore", AT)
    with pytest.raises(FlywheelError, match="FOREIGN KEY"):
        service.signal("m", "user-1", "love", AT)
