"""How well a score ranks, everywhere or among rows alike in something, with intervals that respect users.

The area under the curve is a share of pairs (a positive, a negative) in the right order; with strata only pairs within
one count (Janes and Pepe 2009). Its variance is that of the sum of each row's first-order influence, added up by user
(DeLong et al. 1988; Obuchowski 1997 for clusters): nothing is resampled.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit
from scipy.stats import t

from ...intervals import wilson
from ...records import Estimate

Floats = NDArray[np.float64]
CONFIDENCE = 0.95


class Concordance(NamedTuple):
    """Share of pairs in the right order, each row's influence on it (rows,), and the rows that are in any pair."""

    value: float
    influence: Floats
    rows: int


def concordance(labels: ArrayLike, scores: ArrayLike, strata: Sequence[object] | None = None) -> Concordance | None:
    """Over all pairs of a positive and a negative of one stratum, ties counting half. None without such a pair."""
    y, s = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=float)
    stratum = np.zeros(len(y), dtype=np.int64)
    if strata is not None:
        stratum = np.unique(np.asarray(list(map(str, strata))), return_inverse=True)[1].reshape(-1)
    if not len(y):
        return None
    right, pairs = np.zeros(len(y)), np.zeros(len(y))
    everyone = _ranks(s, stratum)
    for here, sign in ((y, 1), (~y, -1)):
        others = np.bincount(stratum[~here], minlength=stratum.max() + 1)[stratum[here]]
        below = everyone[here] - _ranks(s[here], stratum[here])
        right[here] = below if sign > 0 else others - below
        pairs[here] = others
    total = pairs[y].sum()
    if total == 0:
        return None
    value = float(right[y].sum() / total)
    return Concordance(value, (right - value * pairs) / total, int((pairs > 0).sum()))


def auc(
    labels: ArrayLike, scores: ArrayLike, users: Sequence[str], strata: Sequence[object] | None = None,
    confidence: float = CONFIDENCE,
) -> Estimate:  # fmt: skip
    """Area under the curve with Student's interval on the log-odds scale. `n` counts the rows that are in any pair."""
    found = concordance(labels, scores, strata)
    if found is None:
        return Estimate(value=None, n=0, reason="no two replies alike in it were taken differently" if strata
                        else "one class only: nothing to rank")  # fmt: skip
    error, freedom = _error(found.influence, users)
    spread = found.value * (1 - found.value)
    if freedom < 1:
        return Estimate(value=found.value, n=found.rows, reason=f"{freedom + 1} users: too few for an interval")
    if spread == 0 or error == 0:  # every pair in order: as many users without an exception
        low, high = wilson(found.value, freedom + 1, confidence)
        return Estimate(value=found.value, low=low, high=high, n=found.rows)
    half = float(t.ppf(0.5 + confidence / 2, freedom)) * error / spread
    centre = logit(found.value)
    return Estimate(value=found.value, low=float(expit(centre - half)), high=float(expit(centre + half)), n=found.rows)


def auc_gain(
    labels: ArrayLike, scores: ArrayLike, rival: ArrayLike, users: Sequence[str], confidence: float = CONFIDENCE
) -> Estimate:
    """AUC of the scores less that of a rival's on the same rows, paired."""
    one, two = concordance(labels, scores), concordance(labels, rival)
    if one is None or two is None:
        return Estimate(value=None, n=0, reason="one class only: nothing to rank")
    error, freedom = _error(one.influence - two.influence, users)
    value = one.value - two.value
    if freedom < 1:
        return Estimate(value=value, n=one.rows, reason=f"{freedom + 1} users: too few for an interval")
    half = float(t.ppf(0.5 + confidence / 2, freedom)) * error
    return Estimate(value=value, low=value - half, high=value + half, n=one.rows)


def _ranks(scores: Floats, stratum: NDArray[np.int64]) -> Floats:
    """Mean rank of every row within its stratum, from 1."""
    order = np.lexsort((scores, stratum))
    s, group = scores[order], stratum[order]
    first = np.r_[True, (group[1:] != group[:-1])] if len(s) else np.zeros(0, dtype=bool)
    new = first | np.r_[True, s[1:] != s[:-1]] if len(s) else first
    run = np.cumsum(new) - 1
    starts = np.flatnonzero(new)
    sizes = np.diff(np.r_[starts, len(s)])
    begins = np.maximum.accumulate(np.where(first, np.arange(len(s)), 0))
    ranks = np.empty(len(s))
    ranks[order] = starts[run] - begins + (sizes[run] + 1) / 2
    return ranks


def _error(influence: Floats, users: Sequence[str]) -> tuple[float, int]:
    """Cluster-robust standard error and its degrees of freedom."""
    _, member = np.unique(np.asarray(users), return_inverse=True)
    sums = np.bincount(member.reshape(-1), influence)
    count = len(sums)
    return float(np.sqrt(count / max(1, count - 1) * (sums**2).sum())), count - 1
