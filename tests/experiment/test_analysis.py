"""Lifts against independent references, A/A uniformity, sample ratio, verdicts."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pytest
import scipy.stats

from characterflywheel.experiment import analysis
from characterflywheel.experiment.analysis import BREADTH, DEPTH, DEPTH_ALL, Lift, Metric, SampleRatio, decide, lift
from characterflywheel.experiment.metrics import DayRow
from characterflywheel.experiment.moments import Moments
from characterflywheel.records import Estimate

COOKIE_CATS = Path(__file__).parents[3] / "shared" / "data" / "ab"


def people(rng: np.random.Generator, n: int, gain: float = 1.0) -> dict[str, np.ndarray[Any, Any]]:
    """Columns of one arm: keenness drives both weeks, `gain` multiplies the messages of the second."""
    keenness = rng.gamma(1.5, 1.0, n)
    days = rng.binomial(7, 1 - np.exp(-0.3 * keenness))
    messages = np.where(days > 0, days + rng.poisson(4 * gain * keenness), 0)
    engaged = (days >= 2).astype(np.int64)
    return {
        "active_days": days, "engaged": engaged, "engaged_messages": engaged * messages, "messages": messages,
        "pre_active_days": rng.binomial(7, 1 - np.exp(-0.3 * keenness)), "pre_messages": rng.poisson(4 * keenness),
    }  # fmt: skip


def arms(seed: int, n: int, gain: float = 1.0) -> tuple[Moments, Moments]:
    rng = np.random.default_rng(seed)
    return Moments.of(people(rng, n)), Moments.of(people(rng, n, gain))


def test_real_experiment_against_scipy_and_tea_tasting() -> None:
    """Cookie Cats, 90,189 users: lifts, intervals and p-values equal the references computed outside this project."""
    if not (COOKIE_CATS / "cookie_cats.csv").exists():
        pytest.skip("../shared/data/ab/cookie_cats.csv is not there")
    reference = json.loads((COOKIE_CATS / "cookie_cats_reference.json").read_text())["cookie_cats"]
    table = pyarrow.csv.read_csv(COOKIE_CATS / "cookie_cats.csv")
    version = table["version"].to_numpy()
    columns = {
        "r1": table["retention_1"].to_numpy().astype(np.int64), "r7": table["retention_7"].to_numpy().astype(np.int64),
        "g": table["sum_gamerounds"].to_numpy(),
    }  # fmt: skip
    control, treatment = (
        Moments.of({name: values[version == arm] for name, values in columns.items()}) for arm in ("gate_30", "gate_40")
    )
    for name, expected in reference["tea_tasting"].items():
        if name in columns:
            found = lift(control, treatment, Metric(name, name, None, None), 0.95, 500)
            assert found.lift == pytest.approx(expected["rel_effect_size"], rel=1e-9)
            same = 1e-9 if name == "g" else 2e-4  # the reference takes shares as normal, we take Welch's t
            assert found.low == pytest.approx(expected["rel_effect_size_ci_lower"], rel=same)
            assert found.high == pytest.approx(expected["rel_effect_size_ci_upper"], rel=same)
            assert found.p == pytest.approx(expected["pvalue"], rel=same, abs=1e-6)
    assert lift(control, treatment, Metric("g", "g", None, None), 0.95, 500).p == pytest.approx(
        reference["sum_gamerounds"]["welch_p"], rel=1e-9
    )
    ratio = analysis.sample_ratio(days({"control": control.n, "treatment": treatment.n}))
    assert ratio.p.value == pytest.approx(reference["SRM_chisq_p_50_50"], rel=1e-9)


def test_depth_equals_a_comparison_of_the_engaged() -> None:
    """The delta method over all exposed users, and Welch's interval over the engaged alone, estimate the same lift.

    Their standard errors differ only by engaged counts being random (n against n - 1): under 0.1% here.
    """
    rng = np.random.default_rng(8)
    control, treatment = people(rng, 4000), people(rng, 4000, 1.1)
    found = lift(Moments.of(control), Moments.of(treatment), DEPTH, 0.95, 500)
    a, b = (arm["messages"][arm["engaged"] == 1] for arm in (control, treatment))
    assert found.plain_lift == pytest.approx(b.mean() / a.mean() - 1, rel=1e-12)
    scale = math.sqrt(a.var(ddof=1) / len(a) / a.mean() ** 2 + b.var(ddof=1) / len(b) / b.mean() ** 2)
    half = scipy.stats.norm.ppf(0.975) * scale
    assert found.plain_low == pytest.approx(b.mean() / a.mean() * math.exp(-half) - 1, abs=2e-4)
    assert found.plain_high == pytest.approx(b.mean() / a.mean() * math.exp(half) - 1, abs=2e-4)


def test_cuped_is_regression_on_the_covariate() -> None:
    """The adjusted means differ by theta times the difference of the covariate's, theta the pooled slope."""
    rng = np.random.default_rng(9)
    control, treatment = people(rng, 3000), people(rng, 3000, 1.05)
    found = lift(Moments.of(control), Moments.of(treatment), DEPTH_ALL, 0.95, 500)
    x, y = (np.concatenate([control[c], treatment[c]]) for c in ("pre_messages", "messages"))
    theta = np.cov(x, y)[0, 1] / x.var(ddof=1)
    means = [arm["messages"].mean() - theta * (arm["pre_messages"].mean() - x.mean()) for arm in (control, treatment)]
    assert found.lift == pytest.approx(means[1] / means[0] - 1, rel=1e-9)
    expected = np.corrcoef(x, y)[0, 1] ** 2
    assert found.variance_reduction == pytest.approx(expected, abs=0.02)


def test_intervals_cover_the_true_lift() -> None:
    """100 experiments with a true lift in depth: 95% intervals miss it about 5 times (binomial, 99.9%: at most 13)."""
    rng = np.random.default_rng(1)
    truth = people(rng, 1_000_000, 1.2)["messages"].mean() / people(rng, 1_000_000)["messages"].mean() - 1
    missed = 0
    for seed in range(100):
        found = lift(*arms(seed, 800, 1.2), DEPTH_ALL, 0.95, 500)
        assert found.low is not None
        assert found.high is not None
        missed += not found.low <= truth <= found.high
    assert missed <= 13


def test_a_a_p_values_are_uniform_and_promotions_rare() -> None:
    """150 experiments between equal arms: uniform p, and at most the nominal 5% promoted (99.9%: 17)."""
    fine = SampleRatio(p=Estimate(value=0.5, n=1), daily_p=Estimate(value=0.5, n=1))
    metrics = (BREADTH, DEPTH, DEPTH_ALL)
    results: dict[str, list[Lift]] = {metric.name: [] for metric in metrics}
    for seed in range(150):
        control, treatment = arms(10_000 + seed, 700)
        for metric in metrics:
            results[metric.name].append(lift(control, treatment, metric, 0.95, 500))
    for lifts in results.values():
        assert scipy.stats.kstest([row.p for row in lifts], "uniform").pvalue > 0.01
    triples = zip(results["breadth"], results["depth"], results["depth_all"], strict=True)
    verdicts = [decide(b.estimate(), d.estimate(), a.estimate(), fine).decision for b, d, a in triples]
    assert verdicts.count("promote") <= 17
    assert verdicts.count("roll_back") <= 17


def test_a_real_difference_is_found() -> None:
    found = lift(*arms(5, 3000, 1.15), DEPTH_ALL, 0.95, 500)
    assert found.low is not None
    assert found.low > 0
    assert found.plain_low is not None
    assert found.low - found.lift > found.plain_low - found.plain_lift  # type: ignore[operator]


@pytest.mark.parametrize(
    ("change", "n", "reason"),
    [
        ({}, 499, "499 users in control, fewer than 500"),
        ({"engaged": 0, "engaged_messages": 0}, 600, "0 engaged users in control, fewer than 30"),
        ({"engaged": 1, "engaged_messages": 3}, 600, "depth is the same for all users of an arm"),
        ({"engaged_messages": 0}, 600, "engaged messages: none in control"),
    ],
)
def test_too_little_is_none_with_a_reason(change: dict[str, int], n: int, reason: str) -> None:
    columns = people(np.random.default_rng(2), n) | {name: np.full(n, value) for name, value in change.items()}
    found = lift(Moments.of(columns), Moments.of(columns), DEPTH, 0.95, 500)
    assert (found.lift, found.low, found.p) == (None, None, None)
    assert found.reason == reason


def days(*counts: dict[str, int]) -> list[DayRow]:
    return [
        DayRow(day=day, arm=arm, new_users=new, users=new, active_users=new, messages=new)
        for day, arms_ in enumerate(counts)
        for arm, new in arms_.items()
    ]


def test_sample_ratio_in_total_and_by_day() -> None:
    """A day of 100 to 200 and one of 200 to 100 cancel in total; the daily check sees them."""
    ratio = analysis.sample_ratio(days({"control": 100, "treatment": 200}, {"control": 200, "treatment": 100}))
    assert ratio.p.value == 1.0
    assert ratio.daily_p.value == pytest.approx(2 * scipy.stats.chisquare([100, 200]).pvalue)
    assert ratio.mismatch
    even = analysis.sample_ratio(days({"control": 500, "treatment": 510}, {"control": 3, "treatment": 1}))
    assert not even.mismatch
    assert even.daily_p.n == 1010


def test_sample_ratio_of_a_handful_is_not_known() -> None:
    ratio = analysis.sample_ratio(days({"control": 4, "treatment": 3}))
    assert ratio.p.value is None
    assert ratio.p.reason == "7 exposed users, fewer than 10"
    assert not ratio.mismatch


UP, DOWN, FLAT = ((0.05, 0.01, 0.09), (-0.05, -0.09, -0.01), (0.01, -0.02, 0.04))
UNKNOWN = (None, None, None)


@pytest.mark.parametrize(
    ("breadth", "depth", "over_all", "decision"),
    [
        (UP, FLAT, UP, "promote"),
        (FLAT, UP, UP, "promote"),
        (UP, UNKNOWN, UP, "promote"),
        (FLAT, FLAT, UP, "keep"),
        (UNKNOWN, UNKNOWN, UNKNOWN, "keep"),
        (DOWN, UP, UP, "roll_back"),
        (FLAT, DOWN, DOWN, "roll_back"),
        (UP, DOWN, DOWN, "roll_back"),
        (UP, DOWN, UNKNOWN, "roll_back"),
        (UP, DOWN, FLAT, "keep"),
    ],
)
def test_verdicts(breadth: Any, depth: Any, over_all: Any, decision: str) -> None:
    def estimate(numbers: tuple[float | None, ...]) -> Estimate:
        value, low, high = numbers
        return Estimate(value=value, low=low, high=high, n=1000, reason=None if value else "too few")

    fine = SampleRatio(p=Estimate(value=0.4, n=1000), daily_p=Estimate(value=None, n=0, reason="no day"))
    verdict = decide(estimate(breadth), estimate(depth), estimate(over_all), fine)
    assert verdict.decision == decision
    assert "breadth" in verdict.reason
    broken = SampleRatio(p=Estimate(value=1e-5, n=1000), daily_p=fine.daily_p)
    stopped = decide(estimate(breadth), estimate(depth), estimate(over_all), broken)
    assert (stopped.decision, "sample ratio mismatch" in stopped.reason) == ("keep", True)


def test_breadth_is_a_share() -> None:
    control, treatment = arms(6, 2000)
    found = lift(control, treatment, BREADTH, 0.9, 500)
    assert found.control == pytest.approx(control.sums["engaged"] / 2000)
    assert found.n == 4000
