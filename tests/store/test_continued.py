"""The `continue` signal of real traffic: written again in time, left, or too early to tell."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from characterflywheel.records import Conversation, Message, Signal
from characterflywheel.store.continued import continued

AT = datetime(2026, 3, 2, tzinfo=UTC)
HOUR = timedelta(hours=1)
DAY = 24 * HOUR


def talk(*turns: tuple[str, float], name: str = "c", fallback: tuple[int, ...] = ()) -> Conversation:
    """A conversation of (role, hours after its beginning)."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    messages = tuple(
        Message(
            id=f"{name}{i}", conversation_id=name, user_id="ada", role=roles[who], content="...",  # type: ignore[arg-type]
            fallback=i in fallback, created_at=AT + hours * HOUR,
        )
        for i, (who, hours) in enumerate(turns)
    )  # fmt: skip
    return Conversation(
        id=name, user_id="ada", character_id="pirate", character_version=1, source="user", created_at=AT,
        messages=messages,
    )  # fmt: skip


def labels(*conversations: Conversation, until: datetime, signals: tuple[Signal, ...] = ()) -> dict[str, float]:
    return {row.message_id: row.value for row in continued(conversations, signals, until, DAY)}


def test_the_last_reply_of_an_ended_conversation_is_0_and_all_before_are_1() -> None:
    ended = talk(("u", 0), ("a", 0.1), ("u", 1), ("a", 1.1), ("u", 20), ("a", 20.1))
    assert labels(ended, until=AT + 3 * DAY) == {"c1": 1, "c3": 1, "c5": 0}


def test_what_is_too_recent_has_no_row() -> None:
    going = talk(("u", 0), ("a", 0.1), ("u", 1), ("a", 1.1))
    assert labels(going, until=AT + 25 * HOUR) == {"c1": 1}
    assert labels(going, until=AT + 26 * HOUR) == {"c1": 1, "c3": 0}


def test_who_comes_back_after_the_time_had_left() -> None:
    late = talk(("u", 0), ("a", 0), ("u", 24), ("a", 24), ("u", 48.1))
    assert labels(late, until=AT + 9 * DAY) == {"c1": 1, "c3": 0}


def test_greetings_and_canned_replies_have_no_row() -> None:
    greeted = talk(("s", 0), ("a", 0), ("u", 1), ("a", 1), ("u", 2), ("a", 2), fallback=(3,))
    assert labels(greeted, until=AT + 9 * DAY) == {"c5": 0}


def test_of_a_reply_in_two_pieces_only_the_second_tells() -> None:
    assert labels(talk(("u", 0), ("a", 0), ("a", 0), ("u", 1), ("a", 1)), until=AT + 9 * DAY) == {"c4": 0}


def test_a_conversation_with_rows_of_its_own_is_left_alone() -> None:
    own = Signal(id="s", message_id="c1", user_id="ada", kind="continue", created_at=AT)
    thumb = Signal(id="t", message_id="d1", user_id="ada", kind="thumb_up", created_at=AT)
    crowd = talk(("u", 0), ("a", 0), ("u", 1), ("a", 1))
    real = talk(("u", 0), ("a", 0), name="d")
    assert labels(crowd, real, until=AT + 9 * DAY, signals=(own, thumb)) == {"d1": 0}


def test_a_row_says_when_the_outcome_was_known_and_is_the_same_every_time() -> None:
    rows = continued([talk(("u", 0), ("a", 1), ("u", 2), ("a", 3))], (), AT + 9 * DAY, DAY)
    assert [(row.user_id, row.kind, row.created_at) for row in rows] == [
        ("ada", "continue", AT + 2 * HOUR),
        ("ada", "continue", AT + 27 * HOUR),
    ]
    assert rows == continued([talk(("u", 0), ("a", 1), ("u", 2), ("a", 3))], (), AT + 30 * DAY, DAY)


@given(st.lists(st.tuples(st.sampled_from("ua"), st.floats(0, 40)), max_size=12), st.floats(0, 400), st.floats(0, 100))
def test_waiting_longer_only_adds_rows(turns: list[tuple[str, float]], hours: float, more: float) -> None:
    elapsed, steps = 0.0, []
    for who, pause in turns:
        elapsed += pause
        steps.append((who, elapsed))
    one = talk(*steps)
    # a conversation of which only what was said by `until` is known
    seen = one.model_copy(update={"messages": tuple(m for m in one.messages if m.created_at <= AT + hours * HOUR)})
    early = labels(seen, until=AT + hours * HOUR)
    assert early.items() <= labels(one, until=AT + (hours + more) * HOUR).items()


@pytest.mark.parametrize("conversation", [talk(), talk(("u", 0)), talk(("a", 0)), talk(("a", 0), ("u", 1))])
def test_where_nothing_was_answered_there_is_nothing_to_say(conversation: Conversation) -> None:
    assert labels(conversation, until=AT + 9 * DAY) == {}
