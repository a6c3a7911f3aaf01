"""What is known of a reply: unknown is not 0, the last word counts, and each signal is about its own message."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from characterflywheel.errors import FlywheelError
from characterflywheel.records import GIVEN, Conversation, Message, Signal
from characterflywheel.reward.signals import Reply, collect

NOW = datetime(2026, 1, 5, tzinfo=UTC)
LATER = timedelta(days=2)


def message(number: int, role: str, content: str = "hello", *, minutes: int | None = None, **more: object) -> Message:
    at = NOW + timedelta(minutes=number if minutes is None else minutes)
    return Message(
        id=f"m{number}", conversation_id="c", user_id="u", role=role, content=content, created_at=at,
        **({"model": "ours"} if role == "assistant" else {}) | more,
    )  # fmt: skip


def signal(number: int, kind: str, value: float = 1.0, *, minutes: int = 0) -> Signal:
    at = NOW + timedelta(minutes=minutes)
    return Signal(
        id=f"s{number}{kind}{minutes}", message_id=f"m{number}", user_id="u", kind=kind, value=value, created_at=at
    )


def conversation(*messages: Message, name: str = "c") -> Conversation:
    return Conversation(
        id=name, user_id="u", character_id="mo", character_version=1, source="user", created_at=NOW, messages=messages
    )


ASKED = (message(0, "user", "hi"), message(1, "assistant"))


def labels(
    signals: list[Signal], *kinds: str, said: tuple[Message, ...] = ASKED
) -> dict[str, tuple[float | None, ...]]:
    """Labels by the reply's place in the conversation."""
    found = collect([conversation(*said)], signals, kinds)
    return {reply.text if reply.text != "hello" else f"m{len(reply.history)}": reply.labels for reply in found}


def test_an_act_is_known_once_the_outcome_is():
    said = (*ASKED, message(2, "user", "ok"), message(3, "assistant", "bye"), message(4, "assistant", "cut short"))
    acts = [signal(1, "continue"), signal(1, "thumb_up"), signal(3, "continue", 0.0)]
    found = collect([conversation(*said)], acts, ("continue", "thumb_up"))
    assert [(r.text, r.labels) for r in found] == [("hello", (1.0, 1.0)), ("bye", (0.0, 0.0))]
    assert [m.content for m in found[1].history] == ["hi", "hello", "ok"]
    assert (found[0].user_id, found[0].character_id) == ("u", "mo")


def test_at_the_cap_only_continue_is_unknown():
    """No row says whether the user would have gone on, but two days later nobody had given a thumb."""
    other = conversation(
        message(8, "user").model_copy(update={"created_at": NOW + LATER}), message(9, "assistant"), name="d"
    )
    acts = [signal(9, "love"), signal(9, "continue", 0.0)]
    found = collect([conversation(*ASKED), other], acts, ("continue", "love"))
    assert [r.labels for r in found] == [(None, 0.0), (0.0, 1.0)]


def test_too_recent_to_tell_is_left_out_and_so_is_an_act_without_its_absence():
    assert labels([signal(1, "thumb_up")], "continue", "thumb_up") == {}


def test_the_last_word_counts_and_thumbs_are_one_matter():
    up, down = signal(1, "thumb_up", minutes=2), signal(1, "thumb_down", minutes=3)
    known = signal(1, "continue")
    kinds = ("thumb_up", "thumb_down")
    assert labels([known, down, up], *kinds) == {"m1": (0.0, 1.0)}
    assert labels([known, up, down.model_copy(update={"created_at": NOW})], *kinds) == {"m1": (1.0, 0.0)}
    assert labels([known, up, up.model_copy(update={"value": 0.0, "created_at": NOW + LATER})], *kinds) == {
        "m1": (0.0, 0.0)
    }
    assert labels([known, signal(1, "thumb_up", -1.0)], *kinds) == {"m1": (0.0, 1.0)}
    taken_back = [signal(1, "love"), signal(1, "love", 0.0, minutes=1)]
    assert labels([known, *taken_back], "love") == {"m1": (0.0,)}


def test_nobody_had_the_button():
    """A model on whose replies no thumb was ever given: an imported chat. Regenerating was possible there."""
    said = (*ASKED, message(2, "user"), message(3, "assistant", "theirs", model="foreign"))
    acts = [signal(1, "continue"), signal(1, "thumb_up"), signal(3, "continue", 0.0), signal(3, "regenerate")]
    kinds = ("thumb_up", "thumb_down", "regenerate")
    assert labels(acts, *kinds, said=said) == {"m1": (1.0, 0.0, None), "theirs": (None, None, 1.0)}


def test_what_no_model_said_or_nobody_read_is_left_out():
    said = (
        message(0, "assistant", "I greet you"), message(1, "user", "hi"),
        message(2, "assistant", "canned", fallback=True), message(3, "user"),
        message(4, "assistant", "brought", model=GIVEN), message(5, "user"),
        message(6, "assistant", "half a", finish="cancelled"), message(7, "user"),
        message(8, "assistant", " "), message(9, "user"), message(10, "assistant", "read"),
    )  # fmt: skip
    acts = [signal(n, "continue") for n in (0, 2, 4, 6, 8, 10)]
    found = collect([conversation(*said)], acts, ("continue",))
    assert [(r.text, len(r.history)) for r in found] == [("read", 10)]


def test_alternatives_are_judged_each_in_its_place():
    """The first reply was regenerated, the second picked over the third, then the user went on from it."""
    said = (
        message(0, "user", "hi"),
        *(message(n, "assistant", f"take {n}", parent_id="m0") for n in (1, 2, 3)),
        message(4, "user", "more", parent_id="m2"), message(5, "assistant", "end", parent_id="m4"),
    )  # fmt: skip
    acts = [
        signal(1, "regenerate"), signal(3, "pick", minutes=4), signal(2, "pick", minutes=5), signal(2, "continue"),
        signal(5, "continue", 0.0, minutes=6),
        signal(5, "love").model_copy(update={"created_at": NOW + LATER}),
    ]  # fmt: skip
    found = collect([conversation(*said)], acts, ("continue", "regenerate", "pick"))
    assert {r.text: r.labels for r in found} == {
        "take 1": (None, 1.0, 0.0), "take 2": (1.0, 0.0, 1.0), "take 3": (None, 0.0, 0.0), "end": (0.0, 0.0, None),
    }  # fmt: skip
    assert [m.content for m in found[-1].history] == ["hi", "take 2", "more"]
    assert [m.content for m in found[1].history] == ["hi"]


def test_ratings_are_known_where_given():
    said = (
        *ASKED,
        message(2, "user"),
        message(3, "assistant", "two"),
        message(4, "user"),
        message(5, "assistant", "x"),
    )
    acts = [signal(1, "rating", 4.0), signal(3, "rating", 3.0), signal(5, "continue")]
    assert labels(acts, "rating", said=said) == {"m1": (1.0,), "two": (0.0,)}


def test_bad_signals_are_named():
    with pytest.raises(FlywheelError, match="no signal is called clap"):
        collect([], [], ("continue", "clap"))
    with pytest.raises(FlywheelError, match="s1thumb_up0 has value nan"):
        collect([conversation(*ASKED)], [signal(1, "thumb_up", float("nan"))], ("thumb_up",))


KINDS = ("continue", "thumb_up", "thumb_down", "love", "pick", "rating")
VALUES = st.sampled_from((-1.0, 0.0, 1.0, 4.0))
ACTS = st.lists(st.tuples(st.integers(0, 7), st.sampled_from(KINDS), VALUES, st.integers(0, 9)), max_size=14)


@settings(max_examples=60, deadline=None)
@given(ACTS)
def test_labels_are_zero_one_or_unknown_and_signals_of_other_messages_do_not_matter(acts: list):
    said = tuple(message(i, "user" if i % 2 == 0 else "assistant", f"text {i}") for i in range(8))
    told = [signal(n, kind, value, minutes=m) for n, kind, value, m in acts]
    found: list[Reply] = collect([conversation(*said)], told, KINDS)
    assert all(label in (None, 0.0, 1.0) for reply in found for label in reply.labels)
    assert all(reply.labels[1] != 1.0 or reply.labels[2] != 1.0 for reply in found)
    on_users = [s for s in told if int(s.message_id[1:]) % 2 == 0]
    rest = [s for s in told if s not in on_users]
    stripped = collect([conversation(*said)], rest, KINDS)
    assert [(r.text, r.labels) for r in stripped] == [(r.text, r.labels) for r in found]
