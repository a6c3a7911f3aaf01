"""Pairs that cannot teach are dropped by name; where nothing is left to learn, it says so."""

import pytest
from reward_fixture import asks, pair, pairs, tiny_policy

from characterflywheel.errors import FlywheelError
from characterflywheel.records import ChatMessage, Preference
from characterflywheel.reward import format
from characterflywheel.reward.screen import check_trainable, screen


@pytest.fixture(scope="module")
def form(tmp_path_factory: pytest.TempPathFactory) -> format.Form:
    return format.make(tiny_policy(tmp_path_factory.mktemp("policy")), 64, 24)


def odd() -> list[Preference]:
    """One pair for each reason, and two that can teach."""
    endless = (ChatMessage(role="system", content="You are Mo. " * 60), *asks("Hi")[1:])
    same = "tea and bread " * 40
    return [
        pair(1, "Yes. You?", "No."),
        pair(2, "Yes.", " Yes. "),
        pair(3, "", "No."),
        pair(4, "Yes.", " \n "),
        pair(5, "Yes.", "No.").model_copy(update={"rejected": ()}),
        pair(6, "Yes.", "No.").model_copy(update={"prompt": endless}),
        pair(7, same + "stars", same + "rain"),
        pair(8, "Yes.", "No.", held_out=True),
    ]


def test_every_reason_is_counted_and_named(form: format.Form) -> None:
    kept, dropped = screened = screen(odd(), form)
    assert [p.id for p in kept] == ["pair-001", "pair-008"]
    assert [(row.id, row.reason) for row in dropped] == [
        ("pair-002", "equal_replies"), ("pair-003", "empty_reply"), ("pair-004", "empty_reply"),
        ("pair-005", "empty_reply"), ("pair-006", "prompt_too_long"), ("pair-007", "equal_as_read"),
    ]  # fmt: skip
    assert screened.reasons == {"empty_reply": 3, "equal_as_read": 1, "equal_replies": 1, "prompt_too_long": 1}
    details = {row.id: row.detail for row in dropped}
    assert (details["pair-003"], details["pair-004"]) == ("chosen", "rejected")
    assert "the limit for prompts is 64" in details["pair-006"]
    assert {row.stage for row in dropped} == {"reward"}
    assert dropped[0].prompt_id == "prompt-001"


def test_without_a_reader_only_the_texts_are_compared() -> None:
    assert [p.id for p in screen(odd()).kept] == ["pair-001", "pair-006", "pair-007", "pair-008"]


def test_ordinary_pairs_all_stay(form: format.Form) -> None:
    assert screen([pair(i, "Yes. You?", "No.") for i in range(5)], form).dropped == []
    assert len(screen(pairs(), form).kept) + len(screen(pairs(), form).dropped) == 40


def test_nothing_left_or_one_class_only_is_a_clear_error() -> None:
    with pytest.raises(FlywheelError, match=r"no preference pairs to train on \(dropped: equal_replies 3\)"):
        check_trainable([], {"equal_replies": 3})
    ties = [pair(i, "Yes.", "No.", label=0.5) for i in range(3)]
    with pytest.raises(FlywheelError, match=r"all 3 training pairs are undecided \(label 0.5\): there is one class"):
        check_trainable(ties, {})
    check_trainable([*ties, pair(9, "Yes.", "No.")], {})
