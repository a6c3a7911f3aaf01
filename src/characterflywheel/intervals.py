"""Estimates with intervals for measurements that come in clusters (many replies to one user are not independent).

All are exact formulas, so the same data give the same interval and nothing is resampled. With one row a cluster,
`share` is Wilson's interval, `mean` Student's, `difference` Newcombe's. Clusters widen them by the cluster-robust
variance, never narrow them.

Sources: Wilson 1927; Newcombe 1998 (hybrid score interval, methods 10 of both papers); Dean and Pagano 2015
(effective sample size for proportions from clustered samples); Liang and Zeger 1986 (cluster-robust variance).
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from .errors import FlywheelError
from .records import Estimate

CONFIDENCE = 0.95


class Spread(NamedTuple):
    """A mean with its cluster-robust standard error and degrees of freedom (clusters less one)."""

    mean: float
    standard_error: float
    freedom: int


def spread(values: ArrayLike, groups: Sequence[Hashable] | None = None) -> Spread:
    """The mean of one-dimensional `values`, rows of one group (a user) counted as dependent.

    The standard error is that of a ratio of group sums, sqrt(G/(G-1) sum_g (sum_i (x_gi - mean))^2) / n: with one
    row a group it is the usual s/sqrt(n). NaN with fewer than two groups.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise FlywheelError(f"values have shape {x.shape}, must be one-dimensional and not empty.")
    sums = _group_sums(x - x.mean(), groups)
    count = sums.size
    error = np.sqrt(count / (count - 1) * np.sum(sums**2)) / x.size if count > 1 else np.nan
    return Spread(float(x.mean()), float(error), count - 1)


def share(values: ArrayLike, groups: Sequence[Hashable] | None = None, confidence: float = CONFIDENCE) -> Estimate:
    """The mean of values in [0, 1] (a tie is one half) with Wilson's interval at the effective sample size.

    The effective size is n divided by the design effect: the variance of the mean with clusters over the one without,
    at least 1.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        return Estimate(value=None, n=0, reason="nothing to measure")
    if x.min() < 0 or x.max() > 1:
        raise FlywheelError(f"values reach from {x.min():g} to {x.max():g}, must lie in [0, 1].")
    p, error, _ = spread(x, groups)
    if np.isnan(error):
        effective = 1.0
    elif x.min() < x.max():
        effective = x.size / max(1.0, error**2 / (x.var(ddof=1) / x.size))
    else:
        effective = float(_group_sums(x, groups).size)
    low, high = wilson(p, effective, confidence)
    return Estimate(value=p, low=low, high=high, n=x.size)


def wilson(p: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval for a proportion `p` of `n` (which may be an effective, fractional number)."""
    z = float(stats.norm.ppf((1 + confidence) / 2))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return float(min(p, max(0.0, centre - half))), float(max(p, min(1.0, centre + half)))


def mean(values: ArrayLike, groups: Sequence[Hashable] | None = None, confidence: float = CONFIDENCE) -> Estimate:
    """The mean of real values with Student's interval on the cluster-robust standard error."""
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        return Estimate(value=None, n=0, reason="nothing to measure")
    value, error, freedom = spread(x, groups)
    if freedom < 1:
        return Estimate(value=value, n=x.size, reason="one user only: no interval")
    half = error * float(stats.t.ppf((1 + confidence) / 2, freedom))
    return Estimate(value=value, low=value - half, high=value + half, n=x.size)


def difference(old: Estimate, new: Estimate, correlation: float = 0.0) -> Estimate:
    """New minus old from their own intervals, with the correlation of the paired values (0 when unpaired).

    Keeps its width where both shares are 0 or 1, which a bootstrap of such values would not.
    """
    if old.value is None or new.value is None:
        return Estimate(value=None, n=min(old.n, new.n), reason=old.reason or new.reason)
    value = new.value - old.value
    if old.low is None or old.high is None or new.low is None or new.high is None:
        return Estimate(value=value, n=min(old.n, new.n), reason=old.reason or new.reason)

    def reach(a: float, b: float) -> float:
        return float(np.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b)))

    low = value - reach(new.value - new.low, old.high - old.value)
    high = value + reach(new.high - new.value, old.value - old.low)
    return Estimate(value=value, low=low, high=high, n=min(old.n, new.n))


def correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Pearson's correlation of paired values; 0 where one side does not vary."""
    x, y = (np.asarray(side, dtype=np.float64) for side in (first, second))
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else 0.0


def _group_sums(x: NDArray[np.float64], groups: Sequence[Hashable] | None) -> NDArray[np.float64]:
    if groups is None:
        return x
    if len(groups) != x.size:
        raise FlywheelError(f"{len(groups)} groups for {x.size} values: give one group a value.")
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    sums = np.zeros(len(numbers))
    np.add.at(sums, [numbers[group] for group in groups], x)
    return sums
