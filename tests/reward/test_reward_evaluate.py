import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reward_fixture import pair
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from characterflywheel.reward.evaluate import (
    agreement,
    area_under_curve,
    auc_by_group,
    calibration_error,
    evaluate_preference,
    length_match,
    rank_correlation,
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=40))
def test_auc_equals_scikit_learn_with_ties(rows: list[tuple[bool, int]]):
    labels, scores = zip(*rows, strict=True)
    if len(set(labels)) == 1:
        assert np.isnan(area_under_curve(labels, scores))
    else:
        assert area_under_curve(labels, scores) == pytest.approx(roc_auc_score(labels, scores))


def test_bootstrap_interval_covers_the_value_and_resamples_users():
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(40), 25)
    labels = rng.random(1000) < 0.3
    scores = labels * 0.8 + rng.normal(size=1000)
    by_row = auc_by_group(labels, scores, [str(i) for i in range(1000)], seed=1)
    same = auc_by_group(labels, scores, [str(u) for u in users], seed=1)
    assert same == auc_by_group(labels, scores, [str(u) for u in users], seed=1)
    assert same.value == pytest.approx(roc_auc_score(labels, scores))
    assert same.low < same.value < same.high
    # rows repeated within users carry no more than their users
    copied = auc_by_group(
        np.repeat(labels, 5), np.repeat(scores, 5), [str(i) for i in np.repeat(range(1000), 5)], seed=1
    )
    assert copied.high - copied.low == pytest.approx(by_row.high - by_row.low, rel=1e-9)


def test_one_class_is_unmeasured_with_a_reason():
    estimate = auc_by_group([1, 1, 1], [0.1, 0.2, 0.3], ["a", "b", "c"], seed=1)
    assert estimate.value is None
    assert estimate.reason == "3 of 3 labels are positive: one class cannot be ranked"


def test_calibration_error_by_hand():
    """Bin [0.8, 0.9): mean p 0.8, outcome 0.5, gap 0.3, share 2/3; bin [0.1, 0.2): gap 0.1, share 1/3."""
    assert calibration_error([0.8, 0.8, 0.1], [1, 0, 0]).value == pytest.approx(0.3 * 2 / 3 + 0.1 / 3)


def test_rank_correlation_equals_scipy():
    rng = np.random.default_rng(2)
    a = rng.normal(size=80)
    b = a + rng.normal(size=80)
    estimate = rank_correlation(a, b)
    assert estimate.value == pytest.approx(spearmanr(a, b).statistic)
    assert estimate.low < estimate.value < estimate.high
    assert rank_correlation(a, np.ones(80)).reason == "all values of one side are equal"


def test_strata_of_pairs():
    assert agreement(pair(0, "a", "b", reviewers=1)) == "single"
    assert agreement(pair(0, "a", "b", label=0.75, reviewers=4)) == "divided"
    assert agreement(pair(0, "a", "b", reviewers=3)) == "consensus"
    assert length_match(pair(0, "one two three four", "one two three four five")) == "similar"
    assert length_match(pair(0, "one", "one two")) == "chosen shorter"


def test_accuracy_counts_decided_pairs_and_half_for_a_tie():
    pairs = [pair(0, "a", "b"), pair(2, "a", "b"), pair(4, "a", "b"), pair(6, "a", "b", label=0.5)]
    report = evaluate_preference(pairs, [1.0, -1.0, 0.0, 9.0], orders=([1.0, -1.0, 1.0, 9.0], [1.0, 1.0, 1.0, 9.0]))
    assert report.accuracy.value == pytest.approx(0.5)
    assert report.accuracy.n == 3
    assert report.swap_consistency.value == pytest.approx(0.75)
    assert report.score_length_correlation.value is None
    assert sum(e.n for e in report.by_source.values()) == 3


def test_length_lean_is_found():
    pairs = [pair(2 * i, "word " * (i + 2), "word") for i in range(10)]
    report = evaluate_preference(pairs, [1.0] * 10, [float(i + 2) for i in range(10)], [1.0] * 10)
    assert report.score_length_correlation.value == pytest.approx(1.0)
