"""Instruction following and violation, counted by hand."""

import pytest
from evaluation_fixture import CHARACTER, answer

from characterflywheel.evaluation.steerability import steerability
from characterflywheel.records import Instruction

BAD = "This one is a good deal longer than twelve words, and it asks nothing at all."
HALF = "Short, and no question."
GOOD = "Short, is it not?"


def test_hand_worked() -> None:
    """Two verifiable instructions a reply. Old: 0 + 1 + 2 of 6 followed, 2 of 3 break one; new: 6 of 6, none."""
    old = [answer(text, i) for i, text in enumerate((BAD, HALF, GOOD))]
    new = [answer(GOOD, i) for i in range(3)]
    report = steerability(old, new)
    following, violation = report.overall.instruction_following, report.overall.instruction_violation
    assert (following.before.value, following.value, following.n, following.worse) == (0.5, 1, 6, "down")
    assert (violation.before.value, violation.value, violation.n, violation.worse) == (pytest.approx(2 / 3), 0, 3, "up")
    assert report.change["instruction_following"].value == 0.5
    assert report.by_rule["max_words"].before.value == pytest.approx(2 / 3)
    assert report.by_rule["ends_with_question"].before.value == pytest.approx(1 / 3)


def test_a_character_without_rules_is_left_out() -> None:
    plain = CHARACTER.model_copy(update={"instructions": (Instruction(text="Be kind."),)})
    one = answer("Anything", character=plain)
    report = steerability([one], [one])
    assert report.overall.instruction_following.value is None
    assert report.overall.instruction_violation.reason == "nothing to measure"
    assert report.by_rule == {}


def test_replies_to_one_user_are_not_independent() -> None:
    alone = [answer(BAD if i % 2 else GOOD, i) for i in range(40)]
    together = [a._replace(prompt=a.prompt.model_copy(update={"user_id": f"u{i % 4}"})) for i, a in enumerate(alone)]
    wide, narrow = (steerability(a, a).overall.instruction_violation for a in (together, alone))
    assert wide.low is not None
    assert narrow.low is not None
    assert wide.low < narrow.low
