"""Lifts with intervals, the sample-ratio check, and the verdict (PAPER section 7, DESIGN section 8).

Every metric is a ratio of two sums over the users who were randomised, so one delta method (tea-tasting's) serves
all: breadth is engaged users over users, depth is the engaged users' messages over engaged users. Intervals are those
of the logarithm of the ratio of the arms, Welch's t, adjusted by CUPED with a covariate from before exposure, which
the treatment cannot have touched. The adjustment was chosen before any data: it is the headline, the
unadjusted lift stands beside it.
"""

import math
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import numpy as np
import scipy.stats

from ..records import Estimate, Record
from .assignment import CONTROL, TREATMENT
from .metrics import DayRow
from .moments import Moments

SRM_ALARM: Final = 0.001
MIN_ENGAGED: Final = 30
MIN_EXPECTED: Final = 5

Decision = Literal["promote", "keep", "roll_back"]


class Metric(NamedTuple):
    """A ratio of two columns' sums (of users where `denominator` is None), and its covariate from before exposure."""

    name: str
    numerator: str
    denominator: str | None
    covariate: str | None


BREADTH: Final = Metric("breadth", "engaged", None, "pre_active_days")
DEPTH: Final = Metric("depth", "engaged_messages", "engaged", "pre_messages")
DEPTH_ALL: Final = Metric("depth_all", "messages", None, "pre_messages")
ACTIVE_DAYS: Final = Metric("active_days", "active_days", None, "pre_active_days")
BALANCE: Final = Metric("balance", "pre_messages", None, None)
METRICS: Final = (BREADTH, DEPTH, DEPTH_ALL, ACTIVE_DAYS, BALANCE)


class Lift(Record):
    """A metric in both arms and its relative lift, e.g. 0.05 for +5%; None with a `reason` where not stated.

    `control` and `treatment` are the plain means. `lift` and its interval are CUPED-adjusted where there is a
    covariate; `plain` ones are not. `p` is two-sided, of no difference, adjusted.
    """

    metric: str
    control: float | None
    treatment: float | None
    lift: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    plain_lift: float | None = None
    plain_low: float | None = None
    plain_high: float | None = None
    variance_reduction: float | None = None
    n: int
    reason: str | None = None

    def estimate(self) -> Estimate:
        """The adjusted lift with its interval."""
        return Estimate(value=self.lift, low=self.low, high=self.high, n=self.n, reason=self.reason)


class SampleRatio(Record):
    """The sample-ratio check: `p` over all exposed users, `daily_p` the smallest of the days' times their number."""

    p: Estimate
    daily_p: Estimate

    @property
    def mismatch(self) -> bool:
        """True when either p-value is below `SRM_ALARM`: the arms are not what randomisation makes."""
        return any(p.value is not None and p.value < SRM_ALARM for p in (self.p, self.daily_p))


class Verdict(Record):
    """What to do with the treatment, and why. `keep` keeps the model that is in service."""

    decision: Decision
    reason: str


def lift(control: Moments, treatment: Moments, metric: Metric, confidence: float, min_users: int) -> Lift:
    """The relative lift of treatment over control.

    Stated only where both arms have `min_users` users, `MIN_ENGAGED` of them in the denominator, a positive mean, and
    a metric that varies.
    """
    arms = {CONTROL: control, TREATMENT: treatment}
    means = {arm: _mean(moments, metric) for arm, moments in arms.items()}
    known = Lift(
        metric=metric.name, control=means[CONTROL], treatment=means[TREATMENT], n=control.n + treatment.n
    )  # fmt: skip
    for arm, moments in arms.items():
        counted = moments.n if metric.denominator is None else int(moments.sums[metric.denominator])
        if moments.n < min_users:
            return known.model_copy(update={"reason": f"{moments.n} users in {arm}, fewer than {min_users}"})
        if metric.denominator and counted < MIN_ENGAGED:
            return known.model_copy(update={"reason": f"{counted} engaged users in {arm}, fewer than {MIN_ENGAGED}"})
        if not means[arm]:
            return known.model_copy(update={"reason": f"{metric.numerator.replace('_', ' ')}: none in {arm}"})
    variances = [ratio_variance(moments, metric) for moments in arms.values()]
    if not all(variance > 0 for variance in variances):
        return known.model_copy(update={"reason": f"{metric.name} is the same for all users of an arm"})
    plain = _analyse(control, treatment, metric._replace(covariate=None), confidence)
    adjusted = _analyse(control, treatment, metric, confidence) if metric.covariate else plain
    if not (adjusted.control > 0 and adjusted.treatment > 0):
        return known.model_copy(update={"reason": f"{metric.name} adjusted for {metric.covariate} is not positive"})
    return known.model_copy(
        update={
            "lift": adjusted.lift, "low": adjusted.low, "high": adjusted.high, "p": adjusted.p,
            "plain_lift": plain.lift, "plain_low": plain.low, "plain_high": plain.high,
            "variance_reduction": 1 - (adjusted.scale / plain.scale) ** 2,
        }
    )  # fmt: skip


class _Result(NamedTuple):
    control: float
    treatment: float
    lift: float
    low: float
    high: float
    p: float
    scale: float


def _analyse(control: Moments, treatment: Moments, metric: Metric, confidence: float) -> _Result:
    import tea_tasting  # noqa: PLC0415 - takes 1.5 s to import

    ratio = tea_tasting.RatioOfMeans(
        metric.numerator, metric.denominator, metric.covariate, confidence_level=confidence, equal_var=False, use_t=True
    )
    result = ratio.analyze_aggregates(control.aggregates(), treatment.aggregates())
    half = float(result.effect_size_ci_upper - result.effect_size)
    return _Result(
        float(result.control), float(result.treatment), float(result.rel_effect_size),
        float(result.rel_effect_size_ci_lower), float(result.rel_effect_size_ci_upper), float(result.pvalue), half,
    )  # fmt: skip


def _mean(moments: Moments, metric: Metric) -> float | None:
    below = moments.n if metric.denominator is None else moments.sums[metric.denominator]
    return moments.sums[metric.numerator] / below if below else None


def ratio_variance(moments: Moments, metric: Metric) -> float:
    """Variance, a user, of the linearised ratio (Deng, Knoblich and Lu 2018); over n it is the ratio's variance."""
    if metric.denominator is None:
        return moments.covariance(metric.numerator, metric.numerator)
    above, below = metric.numerator, metric.denominator
    ratio = moments.mean(above) / moments.mean(below)
    spread = (
        moments.covariance(above, above)
        - 2 * ratio * moments.covariance(above, below)
        + ratio * ratio * moments.covariance(below, below)
    )
    return spread / moments.mean(below) ** 2


def sample_ratio(days: Sequence[DayRow]) -> SampleRatio:
    """Chi-square of newly exposed users against equal arms: in total, and for each day (Bonferroni).

    Days that expect fewer than `MIN_EXPECTED` users an arm are skipped, as the approximation asks.
    """
    by_day: dict[int, dict[str, int]] = {}
    for row in days:
        by_day.setdefault(row.day, {CONTROL: 0, TREATMENT: 0})[row.arm] += row.new_users
    counts = np.array([[arms[CONTROL], arms[TREATMENT]] for arms in by_day.values()]).reshape(-1, 2)
    total = int(counts.sum())
    tested = counts[counts.sum(axis=1) >= 2 * MIN_EXPECTED]
    if total < 2 * MIN_EXPECTED:
        missing = Estimate(value=None, n=total, reason=f"{total} exposed users, fewer than {2 * MIN_EXPECTED}")
        return SampleRatio(p=missing, daily_p=missing)
    p = float(scipy.stats.chisquare(counts.sum(axis=0)).pvalue)
    if not len(tested):
        reason = f"no day has {2 * MIN_EXPECTED} new users"
        return SampleRatio(p=Estimate(value=p, n=total), daily_p=Estimate(value=None, n=total, reason=reason))
    smallest = float(scipy.stats.chisquare(tested, axis=1).pvalue.min())
    daily = min(1.0, smallest * len(tested))
    return SampleRatio(p=Estimate(value=p, n=total), daily_p=Estimate(value=daily, n=int(tested.sum())))


def decide(breadth: Estimate, depth: Estimate, depth_all: Estimate, ratio: SampleRatio) -> Verdict:
    """Promote, keep or roll back, from the intervals of breadth and depth.

    Promote when one lies above 0 and neither below; roll back when one lies below 0; otherwise keep, as also when the
    sample ratio is off. One exception: when depth falls but messages over *all* exposed users do not, and breadth
    rises, newly engaged people have diluted the average; that is no harm, and no proof of gain: keep.

    With both lifts truly 0, a promotion happens at most as often as the interval misses 0 (5% at 95%), because each
    of the two is wrong on its upper side half of that.
    """
    if ratio.mismatch:
        p = min(p.value for p in (ratio.p, ratio.daily_p) if p.value is not None)
        return Verdict(
            decision="keep",
            reason=f"sample ratio mismatch (p = {p:.2g} < {SRM_ALARM}): find the cause first",
        )
    sides = {name: _side(estimate) for name, estimate in (("breadth", breadth), ("depth", depth))}
    told = f"breadth {_tell(breadth)}; depth {_tell(depth)}"
    if sides == {"breadth": 1, "depth": -1} and _side(depth_all) >= 0 and depth_all.value is not None:
        reason = f"{told}; over all exposed users depth {_tell(depth_all)}: more people engage, each newcomer less"
        return Verdict(decision="keep", reason=reason)
    if min(sides.values()) < 0:
        return Verdict(decision="roll_back", reason=told)
    if max(sides.values()) > 0:
        return Verdict(decision="promote", reason=told)
    return Verdict(decision="keep", reason=f"no difference shown: {told}")


def _side(estimate: Estimate) -> int:
    """1 when the interval lies above 0, -1 below, 0 when it holds 0 or is not known."""
    if estimate.low is None or estimate.high is None:
        return 0
    return int(estimate.low > 0) - int(estimate.high < 0)


def _tell(estimate: Estimate) -> str:
    if estimate.value is None or estimate.low is None or estimate.high is None or not math.isfinite(estimate.value):
        return f"not known ({estimate.reason})"
    return f"{estimate.value:+.1%} [{estimate.low:+.1%}, {estimate.high:+.1%}]"
