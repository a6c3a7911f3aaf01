from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from characterflywheel.reward.metrics import (
    _weighted_spearman,
    area_under_curve,
    auc_by_group,
    calibration_error,
    group_draws,
    permutation_p_values,
    rank_correlation,
    within_groups,
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


def test_rank_correlation_equals_scipy_with_ties():
    rng = np.random.default_rng(2)
    a = rng.integers(0, 6, 80).astype(float)
    b = a + rng.normal(size=80)
    for groups in (None, [str(i // 4) for i in range(80)]):
        estimate = rank_correlation(a, b, groups)
        assert estimate.value == pytest.approx(spearmanr(a, b).statistic)
        assert estimate.low < estimate.value < estimate.high
    assert rank_correlation(a, np.ones(80)).reason == "all values of one side are equal"


def test_the_bootstrap_of_groups_is_that_of_copied_rows():
    """Drawing groups by weights gives the correlations of the rows that a plain bootstrap would have copied."""
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 4, 30).astype(float), rng.normal(size=30)
    groups = [f"g{i // 5}" for i in range(30)]
    times, member = group_draws(groups, 20, seed=4)
    assert times.sum(1).tolist() == [6] * 20
    for row, found in zip(times, _weighted_spearman(a, b, times[:, member]), strict=True):
        rows = np.repeat(np.arange(30), row[member])
        assert found == pytest.approx(spearmanr(a[rows], b[rows]).statistic)


def test_rows_that_repeat_within_their_groups_narrow_nothing():
    rng = np.random.default_rng(5)
    a = rng.normal(size=40)
    b = a + rng.normal(size=40)
    once = rank_correlation(a, b, [str(i) for i in range(40)])
    many = rank_correlation(np.repeat(a, 9), np.repeat(b, 9), [str(i) for i in np.repeat(range(40), 9)])
    alone = rank_correlation(np.repeat(a, 9), np.repeat(b, 9))
    assert many.high - many.low == pytest.approx(once.high - once.low, rel=1e-9)
    assert alone.high - alone.low < 0.6 * (many.high - many.low)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-9, 9)), min_size=1, max_size=30))
def test_centring_leaves_nothing_of_a_group(rows: list[tuple[int, int]]):
    groups, values = [str(g) for g, _ in rows], [float(v) for _, v in rows]
    centred = within_groups(values, groups)
    for group in set(groups):
        assert sum(c for c, g in zip(centred, groups, strict=True) if g == group) == pytest.approx(0, abs=1e-9)


def test_permutation_p_equals_scipy_and_sees_only_what_is_within_groups():
    rng = np.random.default_rng(6)
    n, groups = 40, [f"p{i // 4}" for i in range(40)]
    prompt = np.repeat(rng.normal(size=10), 4) * 5
    lean, noise = rng.normal(size=n), rng.normal(size=n)
    score = within_groups(prompt + 0.5 * lean + rng.normal(size=n), groups)
    features = np.array([within_groups(column, groups) for column in (lean, noise, prompt)]).T
    p = permutation_p_values(score, features, groups, seed=1, draws=4000)
    assert p[0] < 0.05 < p[1]
    assert p[2] == 1.0  # constant within every prompt
    one = slice(0, 8)  # two groups of four: 24 x 24 orders, all of them counted by scipy
    few, score_few = groups[one], score[one]
    ours = permutation_p_values(score_few, features[one, :1], few, seed=2, draws=20000)[0]

    def both(first: np.ndarray, second: np.ndarray) -> float:
        return abs(spearmanr(np.r_[first, second], features[one, 0]).statistic)

    orders = [(a, b) for a in permutations(score_few[:4]) for b in permutations(score_few[4:])]
    exact = np.mean([both(np.array(a), np.array(b)) >= both(score_few[:4], score_few[4:]) - 1e-9 for a, b in orders])
    assert ours == pytest.approx(exact, abs=0.015)
