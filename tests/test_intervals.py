"""Intervals against statsmodels, scipy and hand-worked examples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from characterflywheel import intervals
from characterflywheel.errors import FlywheelError
from characterflywheel.records import Estimate


@pytest.mark.parametrize(("wins", "n"), [(0, 9), (3, 9), (31, 48), (48, 48), (1, 1)])
def test_share_is_wilson_where_everyone_is_alone(wins: int, n: int) -> None:
    estimate = intervals.share([1.0] * wins + [0.0] * (n - wins), [str(i) for i in range(n)] if n > 1 else None)
    low, high = proportion_confint(wins, n, method="wilson")
    assert (estimate.value, estimate.n) == (pytest.approx(wins / n), n)
    assert (estimate.low, estimate.high) == (pytest.approx(low), pytest.approx(high))


def test_share_of_copies_is_as_wide_as_the_share_of_the_originals() -> None:
    values = np.array([1.0, 0, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1])
    once = intervals.share(values, range(12))
    copied = intervals.share(np.repeat(values, 5), np.repeat(np.arange(12), 5).tolist())
    assert copied.n == 60
    assert (copied.low, copied.high) == (pytest.approx(once.low, abs=0.02), pytest.approx(once.high, abs=0.02))
    assert copied.high - copied.low > 2 * (intervals.share(np.repeat(values, 5)).high - copied.value)


def test_share_covers_the_truth_in_clusters() -> None:
    """400 worlds of 40 users with 1 to 4 correlated replies each: 95% intervals cover at least 92%, naive fewer."""
    rng, covered, naive = np.random.default_rng(3), 0, 0
    for _ in range(400):
        sizes = rng.integers(1, 5, 40)
        users = np.repeat(np.arange(40), sizes)
        own = rng.beta(0.6, 0.4, 40)  # mean 0.6
        values = (rng.random(users.size) < own[users]).astype(float)
        one, plain = intervals.share(values, users.tolist()), intervals.share(values)
        covered += one.low <= 0.6 <= one.high
        naive += plain.low <= 0.6 <= plain.high
    assert covered / 400 >= 0.92
    assert naive < covered


def test_mean_is_students_where_everyone_is_alone() -> None:
    values = np.random.default_rng(0).normal(5, 2, 30)
    estimate = intervals.mean(values)
    low, high = stats.t.interval(0.95, 29, loc=values.mean(), scale=stats.sem(values))
    assert (estimate.low, estimate.high) == (pytest.approx(low), pytest.approx(high))


def test_difference_is_newcombes_for_two_shares() -> None:
    old, new = intervals.share([1.0] * 56 + [0.0] * 14), intervals.share([1.0] * 48 + [0.0] * 32)
    low, high = confint_proportions_2indep(48, 80, 56, 70, method="newcomb")
    change = intervals.difference(old, new)
    assert (change.low, change.high) == (pytest.approx(low), pytest.approx(high))
    assert change.value == pytest.approx(48 / 80 - 56 / 70)


def test_difference_of_paired_means_is_close_to_the_paired_t_interval() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(0, 1, 80)
    y = x + rng.normal(0.3, 0.5, 80)
    change = intervals.difference(intervals.mean(x), intervals.mean(y), intervals.correlation(x, y))
    low, high = stats.ttest_rel(y, x).confidence_interval()
    assert (change.low, change.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def test_difference_keeps_its_width_where_nothing_happened() -> None:
    nothing = intervals.share([0.0] * 20)
    change = intervals.difference(nothing, nothing)
    assert change.value == 0
    assert change.low is not None
    assert change.low < -0.1


def test_unmeasured_stays_unmeasured() -> None:
    nothing = intervals.share([])
    assert nothing == Estimate(value=None, n=0, reason="nothing to measure")
    change = intervals.difference(nothing, intervals.share([1.0, 0.0]))
    assert (change.value, change.reason) == (None, "nothing to measure")
    assert intervals.mean([1.0, 2.0], ["a", "a"]).low is None


def test_what_is_no_share_is_refused() -> None:
    with pytest.raises(FlywheelError, match="must lie in"):
        intervals.share([0.5, 1.5])
    with pytest.raises(FlywheelError, match="one group a value"):
        intervals.share([0.5, 1.0], ["a"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 5)), min_size=1, max_size=40))
def test_share_brackets_its_value_and_ignores_order(rows: list[tuple[float, int]]) -> None:
    one = intervals.share([v for v, _ in rows], [g for _, g in rows])
    back = intervals.share([v for v, _ in rows[::-1]], [g for _, g in rows[::-1]])
    assert 0 <= one.low <= one.value <= one.high <= 1
    assert (back.low, back.high) == (pytest.approx(one.low), pytest.approx(one.high))
