"""Agreement of reviewers: Krippendorff's alpha with a bootstrap interval over prompts (PAPER sections 2 and 3).

Alpha is 1 where reviewers agree always, 0 where they agree as often as chance would have it; any number of reviewers,
missing reviews allowed. Source: Krippendorff, *Content Analysis*, nominal data.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..records import Estimate, Judgement

RESAMPLES = 1000


def krippendorff_alpha(counts: ArrayLike) -> float | None:
    """Alpha from `counts` (units, categories): how many reviewers put each unit into each category.

    Units with one review say nothing and are left out. None where nothing can be said: no unit with two reviews, or
    all reviews in one category (agreement and chance are the same then).
    """
    table = np.asarray(counts, dtype=np.float64)
    reviews = table.sum(axis=1)
    table, reviews = table[reviews >= 2], reviews[reviews >= 2]
    total = float(reviews.sum())
    marginal = table.sum(axis=0)
    if total == 0 or marginal.max() == total:
        return None
    observed = float((((reviews**2) - (table**2).sum(axis=1)) / (reviews - 1)).sum()) / total
    expected = float(total**2 - (marginal**2).sum()) / (total * (total - 1))
    return 1 - observed / expected


def alpha_estimate(counts: ArrayLike, groups: Sequence[str], seed: int, confidence: float = 0.95) -> Estimate:
    """Alpha with a percentile bootstrap interval that draws whole groups (prompts); `n` counts units reviewed twice.

    `groups[i]` is the group of unit i: the pairs of one prompt stand or fall together.
    """
    if not groups:
        return Estimate(value=None, n=0, reason="nothing was reviewed")
    table = np.asarray(counts, dtype=np.float64)
    doubled = table.sum(axis=1) >= 2
    table, groups = table[doubled], [g for g, keep in zip(groups, doubled, strict=True) if keep]
    value = krippendorff_alpha(table) if len(table) else None
    if value is None:
        reason = "every review says the same" if len(table) else "nothing was reviewed twice"
        return Estimate(value=None, n=len(table), reason=reason)
    names = sorted(set(groups))
    code = np.array([names.index(group) for group in groups])
    draws = np.random.default_rng(seed).integers(0, len(names), (RESAMPLES, len(names)))
    found = [krippendorff_alpha(np.repeat(table, times, axis=0)) for times in _times(draws, code, len(names))]
    values = [one for one in found if one is not None]
    if len(names) < 2 or len(values) < RESAMPLES / 2:
        return Estimate(value=value, n=len(table), reason="too few prompts for an interval")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value=value, low=float(low), high=float(high), n=len(table))


def agreement(judgements: Sequence[Judgement], seed: int) -> dict[str, Estimate]:
    """Alpha on pairwise choices (`ranking`) and on each structured question, over all judgements of a stage."""
    votes: dict[str, dict[tuple[str, ...], list[int]]] = {
        name: {} for name in ("ranking", "false_refusal", "templated", "violates")
    }

    def vote(question: str, unit: tuple[str, ...], answer: bool) -> None:
        votes[question].setdefault(unit, [0, 0])[answer] += 1

    for judgement in judgements:
        place = {candidate: rank for rank, candidate in enumerate(judgement.ranking)}
        for first, second in combinations(sorted(place), 2):
            vote("ranking", (judgement.prompt_id, first, second), place[first] < place[second])
        for answer in judgement.answers:
            unit = (judgement.prompt_id, answer.candidate_id)
            vote("false_refusal", unit, answer.false_refusal)
            vote("templated", unit, answer.templated)
            vote("violates", unit, bool(answer.violates))
    return {
        question: alpha_estimate(list(units.values()), [unit[0] for unit in units], seed)
        for question, units in votes.items()
    }


def _times(draws: NDArray[np.int64], code: NDArray[np.int64], groups: int) -> NDArray[np.int64]:
    """How often each unit stands in each resample, (resamples, units)."""
    return np.array([np.bincount(draw, minlength=groups)[code] for draw in draws], dtype=np.int64)
