"""Power against the textbook formula, statsmodels, and simulation."""

import numpy as np
import pytest
import scipy.stats
import statsmodels.stats.power

from characterflywheel.config import ExperimentConfig
from characterflywheel.experiment.analysis import BREADTH, DEPTH_ALL, Metric, lift
from characterflywheel.experiment.moments import Moments
from characterflywheel.experiment.power import days_needed, detectable_lift, plan, users_needed

CONFIG = ExperimentConfig()
PLAIN = Metric("depth_all", "messages", None, None)


def crowd(seed: int, n: int, gain: float = 1.0) -> Moments:
    rng = np.random.default_rng(seed)
    keenness = rng.gamma(2.0, 1.0, n)
    messages = rng.poisson(5 * keenness * gain)
    engaged = (rng.random(n) < 1 - np.exp(-keenness / 2)).astype(np.int64)
    columns = {"messages": messages, "pre_messages": rng.poisson(5 * keenness), "engaged": engaged}
    return Moments.of(columns | {"pre_active_days": rng.poisson(keenness), "engaged_messages": engaged * messages})


def test_detectable_lift_equals_the_textbook() -> None:
    """(z(0.975) + z(0.8)) * sd / mean * sqrt(2 / n); t and normal agree to 0.1% at 2,000 users an arm."""
    base = crowd(1, 20_000)
    z = scipy.stats.norm.ppf(0.975) + scipy.stats.norm.ppf(0.8)
    sd = base.covariance("messages", "messages") ** 0.5
    expected = z * sd / base.mean("messages") * (2 / 2000) ** 0.5
    assert detectable_lift(base, PLAIN, 2000, CONFIG).value == pytest.approx(expected, rel=2e-3)


def test_users_needed_equals_statsmodels() -> None:
    base = crowd(2, 20_000)
    effect = 0.05 * base.mean("messages") / base.covariance("messages", "messages") ** 0.5
    expected = statsmodels.stats.power.TTestIndPower().solve_power(effect, power=0.8, alpha=0.05)
    assert users_needed(base, PLAIN, 0.05, CONFIG).value == pytest.approx(expected, abs=2)


def test_power_is_what_simulation_finds() -> None:
    """At the detectable lift, CUPED included, 80% of 150 experiments find it (99.9%: 104 to 135)."""
    detectable = detectable_lift(crowd(3, 50_000), DEPTH_ALL, 600, CONFIG).value
    assert detectable is not None
    found = 0
    for seed in range(150):
        result = lift(crowd(100 + seed, 600), crowd(900 + seed, 600, 1 + detectable), DEPTH_ALL, 0.95, 500)
        assert result.low is not None
        found += result.low > 0
    assert 104 <= found <= 135


def test_a_covariate_lets_smaller_lifts_be_seen() -> None:
    base = crowd(4, 20_000)
    with_covariate, without = (detectable_lift(base, m, 1000, CONFIG).value for m in (DEPTH_ALL, PLAIN))
    assert with_covariate is not None
    assert without is not None
    assert with_covariate < 0.8 * without


def test_plan_prints_one_line() -> None:
    line = plan(crowd(5, 5000), 1200, CONFIG).line()
    assert line.startswith("1200 users an arm show, with power 80% at 95% confidence, lifts from breadth ")


def test_too_little_to_plan_from() -> None:
    few = detectable_lift(crowd(6, 60), BREADTH, 1200, CONFIG)
    assert (few.value, few.reason) == (None, "60 users to plan from, fewer than 100")
    assert users_needed(crowd(6, 60), BREADTH, 0.05, CONFIG).value is None
    small = detectable_lift(crowd(6, 600), BREADTH, 200, CONFIG)
    assert small.reason == "200 users an arm, fewer than 500"
    flat = Moments.of({name: np.ones(200, int) for name in ("engaged", "pre_active_days")})
    assert detectable_lift(flat, BREADTH, 1200, CONFIG).reason == "breadth does not vary among 200 users"


@pytest.mark.parametrize(
    ("users", "a_day", "days"), [(500, 1000, 7), (1000, 1000, 7), (1001, 1000, 8), (5000, 500, 16)]
)
def test_days_needed(users: float, a_day: float, days: int) -> None:
    assert days_needed(users, a_day, CONFIG) == days
