"""How good the reward models are, with intervals (PAPER section 3).

Accuracy on held-out pairs by source, agreement and length match, calibration, what the score leans on, and whether
the pairwise model keeps its mind when the replies swap places. Signal models are judged by AUC, resampled by user.
"""

from collections.abc import Sequence
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, rankdata

from .. import intervals
from ..instructions import emojis
from ..records import Estimate, Preference, Record

Floats = NDArray[np.float64]


class PreferenceEvaluation(Record):
    """One preference model on held-out pairs. `reply_*` correlations are Spearman's, over the replies judged."""

    accuracy: Estimate
    by_source: dict[str, Estimate]
    by_agreement: dict[str, Estimate]
    by_length: dict[str, Estimate]
    calibration_error: Estimate
    score_length_correlation: Estimate
    score_emoji_correlation: Estimate
    swap_consistency: Estimate | None = None


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


def rank_correlation(first: ArrayLike, second: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Spearman's correlation with a Fisher interval (Bonett and Wright 2000); unmeasured when one side is constant."""
    a, b = rankdata(np.asarray(first, dtype=float)), rankdata(np.asarray(second, dtype=float))
    n = len(a)
    if n < 5 or a.std() == 0 or b.std() == 0:
        return Estimate(value=None, n=n, reason=f"{n} values" if n < 5 else "all values of one side are equal")
    r = float(np.clip(np.corrcoef(a, b)[0, 1], -1, 1))
    half = float(norm.ppf(0.5 + confidence / 2)) * sqrt((1 + r * r / 2) / (n - 3))
    z = np.arctanh(np.clip(r, -0.999999, 0.999999))
    return Estimate(value=r, low=float(np.tanh(z - half)), high=float(np.tanh(z + half)), n=n)


def evaluate_preference(
    pairs: Sequence[Preference],
    margins: Sequence[float],
    chosen_scores: Sequence[float] = (),
    rejected_scores: Sequence[float] = (),
    orders: tuple[Sequence[float], Sequence[float]] | None = None,
) -> PreferenceEvaluation:
    """Judge a preference model on held-out pairs.

    `margins[i]` is the log-odds that the model prefers `chosen` of pair i. The pointwise model gives its scores, so
    that what they lean on can be measured; the pairwise one gives the log-odds for `chosen` in both `orders` of
    reading, whose average is the margin. Pairs on which the reviewers are divided (label 0.5) have no
    right answer and count for nothing but calibration.
    """
    margin = np.asarray(margins, dtype=float)
    decided = [i for i, pair in enumerate(pairs) if pair.label > 0.5]

    def share(rows: Sequence[int]) -> Estimate:
        right = [float(margin[i] > 0) + 0.5 * float(margin[i] == 0) for i in rows]
        return intervals.share(right, [pairs[i].prompt_id for i in rows])

    def split(keys: Sequence[str]) -> dict[str, Estimate]:
        return {key: share([i for i in decided if keys[i] == key]) for key in sorted({keys[i] for i in decided})}

    texts = [pair.chosen[-1].content for pair in pairs] + [pair.rejected[-1].content for pair in pairs]
    scores = [*chosen_scores, *rejected_scores]
    absent = Estimate(value=None, n=0, reason="the pairwise model scores pairs, not replies")
    swap = None
    if orders is not None:
        same = (np.asarray(orders[0], dtype=float) > 0) == (np.asarray(orders[1], dtype=float) > 0)
        swap = intervals.share(same, [pair.prompt_id for pair in pairs])
    return PreferenceEvaluation(
        accuracy=share(decided),
        by_source=split([pair.source for pair in pairs]),
        by_agreement=split([agreement(pair) for pair in pairs]),
        by_length=split([length_match(pair) for pair in pairs]),
        calibration_error=_pair_calibration(margin, np.array([pair.label for pair in pairs])),
        score_length_correlation=rank_correlation([len(t.split()) for t in texts], scores) if scores else absent,
        score_emoji_correlation=rank_correlation([len(emojis(t)) for t in texts], scores) if scores else absent,
        swap_consistency=swap,
    )


def agreement(pair: Preference) -> str:
    """How much the reviews of a pair say: `single`, `consensus` (several, all agree) or `divided`."""
    if pair.reviewers == 1:
        return "single"
    return "consensus" if pair.label == 1.0 else "divided"


def length_match(pair: Preference) -> str:
    """`similar` when the longer reply has at most 1.25 times the words, else which of the two is the longer."""
    chosen, rejected = (max(1, len(side[-1].content.split())) for side in (pair.chosen, pair.rejected))
    if max(chosen, rejected) <= 1.25 * min(chosen, rejected):
        return "similar"
    return "chosen longer" if chosen > rejected else "chosen shorter"


def _pair_calibration(margin: Floats, labels: Floats) -> Estimate:
    """Both orders of every pair, so that `chosen` being first tells nothing."""
    probability = 1 / (1 + np.exp(-np.clip(margin, -60, 60)))
    return calibration_error(np.r_[probability, 1 - probability], np.r_[labels, 1 - labels])
