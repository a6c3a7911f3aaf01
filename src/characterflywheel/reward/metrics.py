"""Measures of a score: how it ranks, whether its probabilities hold, what it goes along with (PAPER section 3).

Rows of one group (a user, a prompt) are dependent, so intervals resample groups and p-values permute within them.
"""

from collections.abc import Sequence
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, rankdata

from ..records import Estimate

Floats = NDArray[np.float64]
DRAWS_AT_ONCE = 4_000_000  # cells of the (draws, rows) arrays held in memory together


def area_under_curve(labels: ArrayLike, scores: ArrayLike) -> float:
    """Probability that a positive outscores a negative, ties counting half (Mann-Whitney). NaN with one class."""
    positive = np.asarray(labels, dtype=bool)
    n = int(positive.sum())
    if n in (0, len(positive)):
        return float("nan")
    ranks = rankdata(np.asarray(scores, dtype=float))
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))


def auc_by_group(
    labels: ArrayLike,
    scores: ArrayLike,
    groups: Sequence[str],
    *,
    seed: int,
    draws: int = 1000,
    confidence: float = 0.95,
) -> Estimate:
    """AUC with a percentile bootstrap over groups (users), whose rows are not independent of one another.

    Draws that leave only one class say nothing about the AUC and are left out. `n` counts rows.
    """
    y, s = np.asarray(labels, dtype=float), np.asarray(scores, dtype=float)
    n, positives = len(y), int(y.sum())
    if positives in (0, n):
        return Estimate(value=None, n=n, reason=f"{positives} of {n} labels are positive: one class cannot be ranked")
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    order = np.argsort(s, kind="stable")
    y, s, member = y[order], s[order], member[order]
    last = np.flatnonzero(np.append(s[1:] != s[:-1], True))  # the last row of every run of equal scores
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        weight = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[member]
        values.append(_weighted_auc(y, weight, last))
    known = np.array([v for v in values if not np.isnan(v)])
    value = area_under_curve(y, s)
    if len(names) < 2 or len(known) < draws / 2:
        return Estimate(value=value, n=n, reason=f"{len(names)} users: too few for an interval")
    low, high = np.quantile(known, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Estimate(value=value, low=float(low), high=float(high), n=n)


def _weighted_auc(labels: Floats, weights: NDArray[np.int64], last: NDArray[np.int64]) -> float:
    """AUC with whole-number weights; rows are sorted by score and `last` closes each run of equal scores."""
    positive = np.diff(np.cumsum(labels * weights)[last], prepend=0.0)
    negative = np.diff(np.cumsum((1 - labels) * weights)[last], prepend=0.0)
    total = positive.sum() * negative.sum()
    below = np.cumsum(negative) - negative
    return float(positive @ (below + negative / 2) / total) if total else float("nan")


def calibration_error(probabilities: ArrayLike, outcomes: ArrayLike, bins: int = 10) -> Estimate:
    """Expected calibration error: mean gap between probability and outcome over equal-width bins, by their size."""
    p, y = np.asarray(probabilities, dtype=float), np.asarray(outcomes, dtype=float)
    if not len(p):
        return Estimate(value=None, n=0, reason="no probabilities to compare")
    cell = np.minimum((p * bins).astype(int), bins - 1)
    gaps = np.abs(np.bincount(cell, p, bins) - np.bincount(cell, y, bins))
    return Estimate(value=float(gaps.sum() / len(p)), n=len(p))


def group_draws(groups: Sequence[str], draws: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How often each of `draws` bootstraps draws each group, shape (draws, groups), and each row's group number."""
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    share = np.full(len(names), 1 / len(names))
    return np.random.default_rng(seed).multinomial(len(names), share, size=draws), member


def rank_correlation(
    first: ArrayLike, second: ArrayLike, groups: Sequence[str] | None = None, *,
    seed: int = 0, draws: int = 400, confidence: float = 0.95,
) -> Estimate:  # fmt: skip
    """Spearman's correlation; unmeasured when one side is constant.

    The interval is Bonett and Wright's (2000) for independent rows; with `groups` it is a percentile bootstrap over
    them, from five groups on.
    """
    a, b = (np.asarray(side, dtype=float) for side in (first, second))
    n = len(a)
    if n < 5 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Estimate(value=None, n=n, reason=f"{n} values" if n < 5 else "all values of one side are equal")
    r = float(np.clip(np.corrcoef(rankdata(a), rankdata(b))[0, 1], -1, 1))
    if groups is None:
        half = float(norm.ppf(0.5 + confidence / 2)) * sqrt((1 + r * r / 2) / (n - 3))
        z = np.arctanh(np.clip(r, -0.999999, 0.999999))
        return Estimate(value=r, low=float(np.tanh(z - half)), high=float(np.tanh(z + half)), n=n)
    times, member = group_draws(groups, draws, seed)
    if times.shape[1] < 5:
        return Estimate(value=r, n=n, reason=f"{times.shape[1]} users: too few for an interval")
    step = max(1, DRAWS_AT_ONCE // n)
    parts = [_weighted_spearman(a, b, times[i : i + step][:, member]) for i in range(0, draws, step)]
    known = np.concatenate(parts)
    known = known[~np.isnan(known)]
    if len(known) < draws / 2:
        return Estimate(value=r, n=n, reason="one side hardly varies: no interval")
    low, high = np.quantile(known, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Estimate(value=r, low=float(min(low, r)), high=float(max(high, r)), n=n)


def _weighted_spearman(a: Floats, b: Floats, weights: NDArray[np.int64]) -> Floats:
    """Spearman's correlation of each row of whole-number weights, shape (draws, n); NaN where a side is constant."""
    total = weights.sum(1, keepdims=True)
    x, y = (_weighted_ranks(side, weights) - (total + 1) / 2 for side in (a, b))
    covariance, one, two = ((weights * u * v).sum(1) for u, v in ((x, y), (x, x), (y, y)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(covariance / np.sqrt(one * two))


def _weighted_ranks(values: Floats, weights: NDArray[np.int64]) -> Floats:
    """Mean ranks of the values when value i is there weights[d, i] times, shape (draws, n)."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(values[order]) != 0])
    counts = np.add.reduceat(weights[:, order], starts, axis=1)  # of every run of equal values
    ranks = np.cumsum(counts, axis=1) - (counts - 1) / 2
    place = np.empty(len(values), dtype=np.int64)
    place[order] = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(values)]))
    return np.asarray(ranks[:, place])


def within_groups(values: ArrayLike, groups: Sequence[str]) -> Floats:
    """Values less the mean of their group: what is left is what a choice among one prompt's replies can see."""
    x = np.asarray(values, dtype=float)
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    centred = x - (np.bincount(member, x) / np.bincount(member))[member]
    return np.where(np.abs(centred) < 1e-12, 0.0, centred)  # rounding must not break ties


def permutation_p_values(scores: Floats, features: Floats, groups: Sequence[str], *, seed: int, draws: int) -> Floats:
    """Two-sided p of each column's rank correlation with the scores when scores are shuffled within groups.

    `scores` is (n,), `features` (n, columns), both centred within groups. Exact under exchangeability within a group
    (Phipson and Smyth 2010, the observed order counted as a draw); constant columns have p 1.
    """
    order = np.argsort(np.asarray(groups), kind="stable")
    _, member = np.unique(np.asarray(groups)[order], return_inverse=True)
    target = rankdata(scores[order])
    target -= target.mean()
    ranks = rankdata(features[order], axis=0)
    ranks -= ranks.mean(0)
    observed = np.abs(target @ ranks)
    rng = np.random.default_rng(seed)
    beyond = np.zeros(features.shape[1])
    for _ in range(draws):
        shuffled = np.lexsort((rng.random(len(member)), member))  # a random order within every group
        beyond += np.abs(target[shuffled] @ ranks) >= observed - 1e-9
    return np.asarray((beyond + 1) / (draws + 1))
