"""What is measured of a way of optimising, with its bootstrap over users, whose prompts are not independent.

Row 0 of every array is the estimate, the others are draws of the bootstrap, so that each step from scores to fitted
forms is written once for both.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ...records import Estimate

Numbers = NDArray[np.float64]
Way = Literal["best_of_n", "rl"]
NO_GOLD = "there is no gold model: set reward.gold_share, to 0.3 for example, and one is trained"
EQUAL = "all replies have the same score"


class Measured(NamedTuple):
    """Points of a curve, each array (1 + draws, points); `kl_plain` of RL only, `gold` where there is a gold model."""

    kl: Numbers
    kl_plain: Numbers | None
    proxy: Numbers
    gold: Numbers | None


class At(NamedTuple):
    """Which point, the best of n or steps of RL, and how many prompts of how many users are behind it."""

    prompts: int
    users: int
    n: int | None = None
    steps: tuple[int, int] | None = None


def resampled(users: Sequence[str], draws: int, seed: int) -> Numbers:
    """Weights of prompts, (1 + draws, prompts), rows sum to 1: equal ones, then the Bayesian bootstrap's (Rubin 1981).

    `users[i]` asked prompt i; a draw gives all prompts of a user the same weight. Unlike the ordinary bootstrap it
    leaves nobody out, so that points with few prompts stay defined.
    """
    names, member = np.unique(np.asarray(users), return_inverse=True)
    drawn = np.random.default_rng(seed).exponential(size=(draws, len(names)))[:, member]
    weights = np.vstack([np.ones(len(member)), drawn])
    return np.asarray(weights / weights.sum(1, keepdims=True))


def estimate(rows: Numbers | None, n: int, users: int, reason: str = EQUAL) -> Estimate:
    """An estimate from `n` prompts of so many users and its draws, (1 + draws,), with its 95% interval.

    The half width is Student's quantile times the draws' deviation, times sqrt((u + 1)/(u - 1)) for u users, by which
    the Bayesian bootstrap is too narrow: for a plain mean over users with as many prompts each that is exactly
    `intervals.mean`. Percentiles of the draws hold the truth in 86% of 200 simulated cases at ten prompts.
    """
    if rows is None or not np.isfinite(rows[0]):
        return Estimate(value=None, n=n, reason=NO_GOLD if rows is None else reason)
    value = float(rows[0])
    if users < 2 or not np.isfinite(rows).all():
        return Estimate(value=value, n=n, reason="one user only: no interval" if users < 2 else reason)
    half = float(stats.t.ppf(0.975, users - 1) * rows[1:].std() * np.sqrt((users + 1) / (users - 1)))
    return Estimate(value=value, low=value - half, high=value + half, n=n)
