import numpy as np
import pytest
from reward_fixture import pair

from characterflywheel import intervals
from characterflywheel.records import Preference
from characterflywheel.reward.calibration import calibrate
from characterflywheel.reward.evaluate import agreement, best_of_n, evaluate_preference, length_match, strength
from characterflywheel.reward.leans import judged_replies


def test_strata_of_pairs():
    assert agreement(pair(0, "a", "b", reviewers=1)) == "single"
    assert agreement(pair(0, "a", "b", label=0.75, reviewers=4)) == "divided"
    assert agreement(pair(0, "a", "b", reviewers=3)) == "consensus"
    assert length_match(pair(0, "one two three four", "one two three four five")) == "similar"
    assert length_match(pair(0, "one", "one two")) == "chosen shorter"
    strengths = [pair(0, "a", "b").model_copy(update={"strength": s}) for s in (1 / 3, 2 / 3, 1.0)]
    assert [strength(one) for one in strengths] == ["slight", "clear", "strong"]


def test_accuracy_counts_decided_pairs_and_half_for_a_tie():
    """Right, wrong, tied, and one that reviewers are divided on: (1 + 0 + 0.5) / 3. Reading orders agree in 3 of 4."""
    pairs = [pair(0, "a", "b"), pair(2, "a", "b"), pair(4, "a", "b"), pair(6, "a", "b", label=0.5)]
    report = evaluate_preference(pairs, [1.0, -1.0, 0.0, 9.0], orders=([1.0, -1.0, 1.0, 9.0], [1.0, 1.0, 1.0, 9.0]))
    assert report.accuracy.value == pytest.approx(0.5)
    assert report.accuracy.n == 3
    assert report.swap_consistency.value == pytest.approx(0.75)
    assert report.first_bias is not None
    assert report.leans == ()
    assert report.best_of_n is None
    assert sum(part.accuracy.n for part in report.by("source").values()) == 3


def test_one_users_prompts_are_one_witness():
    """Ten users with four prompts of two pairs each, all right or all wrong with one user: ten rows say as much."""
    pairs = [
        pair(i, "one two", "one").model_copy(update={"user_id": f"u{i // 8}", "prompt_id": f"p{i // 2:02}"})
        for i in range(80)
    ]
    margins = [1.0 if i // 8 % 3 else -1.0 for i in range(80)]
    report = evaluate_preference(pairs, margins, margins, [-m for m in margins], (margins, margins))
    users, ten = [p.user_id for p in pairs], [1.0 if u % 3 else 0.0 for u in range(10)]
    assert report.accuracy == intervals.share([m > 0 for m in margins], users)
    assert report.accuracy.low == pytest.approx(intervals.share(ten).low, abs=0.02)
    assert report.by("character")["mo"].accuracy == report.accuracy
    over = intervals.mean([one - 1 for one in ten])
    assert (report.over_longer.low, report.over_longer.high) == pytest.approx((over.low, over.high))
    assert report.swap_consistency.low == pytest.approx(intervals.share([1.0] * 10).low)
    assert report.calibration == calibrate(margins, [1.0] * 80, users, seed=0)
    assert report.calibration.reliability_before[0].agree == report.accuracy


def test_best_of_n_counts_users_and_not_prompts():
    pairs, scores = [], []
    for prompt in range(12):
        mine = four(prompt, best=0 if prompt // 3 % 2 else 1)
        pairs += [p.model_copy(update={"user_id": f"u{prompt // 3}"}) for p in mine]
    liked = {"r0": 3.0, "r1": 2.0, "r2": 1.0, "r3": 0.0}
    scores = [[liked[side[-1].content] for side in (p.chosen, p.rejected)] for p in pairs]
    found = best_of_n(pairs, judged_replies(pairs, [a for a, _ in scores], [b for _, b in scores])).accuracy
    assert found == intervals.share([0, 0, 0, 1, 1, 1] * 2, [f"u{i // 3}" for i in range(12)])


def test_first_bias_is_half_of_how_much_the_first_place_wins():
    """Log-odds +2 for chosen when it is read first, -2 when it is read second: whichever is read first has 0.88."""
    report = evaluate_preference([pair(0, "a", "b"), pair(2, "a", "c")], [0.0, 0.0], orders=([2.0, 2.0], [-2.0, -2.0]))
    assert report.first_bias.value == pytest.approx(1 / (1 + np.exp(-2)) - 0.5)


def test_every_slice_has_the_longer_wins_rule_beside_it():
    pairs = [pair(i, "one two three", "one", label=1.0) for i in range(6)]
    pairs += [pair(i, "one", "one two three") for i in range(6, 9)]
    report = evaluate_preference(pairs, [1.0] * 9)
    assert {part.dimension for part in report.slices} == {
        "source", "character", "agreement", "strength", "length", "policy",
    }  # fmt: skip
    lengths = report.by("length")
    assert lengths["chosen longer"].longer_wins.value == 1.0
    assert lengths["chosen shorter"].longer_wins.value == 0.0
    assert report.longer_wins.value == pytest.approx(6 / 9)
    assert report.over_longer.value == pytest.approx(3 / 9)
    assert list(report.by("policy")) == ["a / b"]
    for dimension in ("source", "length", "policy"):
        assert sum(part.accuracy.n for part in report.by(dimension).values()) == 9


def four(prompt: int, best: int, *, tied: bool = False) -> list[Preference]:
    """All six pairs of the replies r0 to r3, `best` first and the others by number; `tied`: the first two are equal."""
    order = [best, *(k for k in range(4) if k != best)]
    return [
        pair(100 * prompt + 10 * i + j, f"r{order[i]}", f"r{order[j]}", label=0.5 if tied and j == 1 else 1.0)
        .model_copy(update={"prompt_id": f"p{prompt}"})
        for i in range(4)
        for j in range(i + 1, 4)
    ]  # fmt: skip


def test_best_of_four_agrees_with_the_reviewers_or_not():
    """The model likes r0 best, then r1: right where the reviewers' best is r0. A tie for the first place and a prompt
    with three replies say nothing."""
    three = [p for p in four(4, best=0) if "r3" not in (p.chosen[-1].content, p.rejected[-1].content)]
    pairs = [*four(0, best=0), *four(1, best=2), *four(2, best=0), *four(3, best=0, tied=True), *three]
    scores = {"r0": 3.0, "r1": 2.0, "r2": 1.0, "r3": 0.0}
    sides = [[scores[side[-1].content] for side in (p.chosen, p.rejected)] for p in pairs]
    found = best_of_n(pairs, judged_replies(pairs, [a for a, _ in sides], [b for _, b in sides]))
    assert (found.accuracy.value, found.accuracy.n) == (pytest.approx(2 / 3), 3)
    assert (found.chance, found.replies) == (0.25, 4.0)
    assert found.left_out == {"too few replies": 1, "no single best": 1}


def test_equal_scores_share_the_best_place():
    pairs = four(0, best=0)
    found = best_of_n(pairs, judged_replies(pairs, [0.0] * 6, [0.0] * 6))
    assert found.accuracy.value == 0.25


def test_nothing_held_out_is_unmeasured_with_a_reason():
    report = evaluate_preference([], [])
    assert report.accuracy.reason == report.over_longer.reason == "nothing to measure"
    assert report.calibration is None
    assert best_of_n([], []).accuracy.reason == "no prompt has 4 replies and one undefeated"
