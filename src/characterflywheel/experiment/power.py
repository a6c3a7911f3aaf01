"""What an experiment can see, before it starts: detectable lift, users needed, days needed (DESIGN section 8).

Solved by tea-tasting's power analysis from the moments of people who already chat, CUPED included, for two arms
of equal size and a two-sided test.
"""

import math
from typing import Any, Final

from ..config import ExperimentConfig
from ..records import Estimate, Record
from .analysis import BREADTH, DEPTH, DEPTH_ALL, Metric, ratio_variance
from .moments import Moments

MIN_BASELINE: Final = 100


class Plan(Record):
    """The smallest relative lifts that `users_per_arm` users an arm show with the configured power."""

    users_per_arm: int
    confidence: float
    power: float
    breadth: Estimate
    depth: Estimate
    depth_all: Estimate

    def line(self) -> str:
        """One line to print before the experiment starts."""
        parts = [
            f"{name} {e.value:.1%}" if e.value is not None else f"{name} not known ({e.reason})"
            for name, e in (("breadth", self.breadth), ("depth", self.depth), ("depth over all", self.depth_all))
        ]
        return (
            f"{self.users_per_arm} users an arm show, with power {self.power:.0%} at {self.confidence:.0%} confidence, "
            f"lifts from {', '.join(parts)}"
        )


def plan(baseline: Moments, users_per_arm: int, config: ExperimentConfig) -> Plan:
    """The detectable lift of each primary metric; None with a reason where the baseline does not tell."""
    solved = {
        metric.name: detectable_lift(baseline, metric, users_per_arm, config) for metric in (BREADTH, DEPTH, DEPTH_ALL)
    }
    return Plan(users_per_arm=users_per_arm, confidence=config.confidence, power=config.power, **solved)


def detectable_lift(baseline: Moments, metric: Metric, users_per_arm: int, config: ExperimentConfig) -> Estimate:
    """The smallest relative lift that is found with probability `config.power`; `n` is the baseline's users."""
    reason = _unusable(baseline, metric)
    if reason is None and users_per_arm < config.min_users:
        reason = f"{users_per_arm} users an arm, fewer than {config.min_users}"
    if reason is not None:
        return Estimate(value=None, n=baseline.n, reason=reason)
    ratio = _ratio(metric, config, n_obs=2 * users_per_arm)
    (result,) = ratio.solve_power_from_aggregates(baseline.aggregates(), "rel_effect_size")
    return Estimate(value=float(result.rel_effect_size), n=baseline.n)


def users_needed(baseline: Moments, metric: Metric, lift: float, config: ExperimentConfig) -> Estimate:
    """How many users an arm needs for a relative lift to be found with probability `config.power`."""
    reason = _unusable(baseline, metric)
    if reason is not None:
        return Estimate(value=None, n=baseline.n, reason=reason)
    ratio = _ratio(metric, config, rel_effect_size=lift)
    (result,) = ratio.solve_power_from_aggregates(baseline.aggregates(), "n_obs")
    return Estimate(value=max(config.min_users, math.ceil(result.n_obs / 2)), n=baseline.n)


def days_needed(users_per_arm: float, new_users_per_day: float, config: ExperimentConfig) -> int:
    """Days an experiment must run: until the last user needed has lived the whole window.

    Args:
        users_per_arm: from `users_needed`.
        new_users_per_day: first exposures an arm and day.
        config: its `days` is the window, also the least.
    """
    return config.days + max(0, math.ceil(users_per_arm / new_users_per_day) - 1)


def _unusable(baseline: Moments, metric: Metric) -> str | None:
    if baseline.n < MIN_BASELINE:
        return f"{baseline.n} users to plan from, fewer than {MIN_BASELINE}"
    if not baseline.sums[metric.numerator] or not ratio_variance(baseline, metric) > 0:
        return f"{metric.name} does not vary among {baseline.n} users"
    return None


def _ratio(metric: Metric, config: ExperimentConfig, **solve: float) -> Any:
    import tea_tasting  # noqa: PLC0415 - takes 1.5 s to import

    return tea_tasting.RatioOfMeans(
        metric.numerator, metric.denominator, metric.covariate,
        alpha=1 - config.confidence, power=config.power, ratio=1, equal_var=False, **solve,
    )  # fmt: skip
