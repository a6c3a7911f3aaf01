"""Win rate of the new model against the old one on the same prompts, by both reward models (PAPER section 6).

The pointwise score drove the training, so it may be gamed; the pairwise model judges beside it, on internal and on
user prompts apart. Two rates that part ways, or one above 65%, are a warning and not a success (PAPER section 8).
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import expit

from .. import intervals
from ..records import ChatMessage, Estimate

PRIOR_PRECISION = 1 / 2.5**2
MIN_CONTROLLED = 8
Conversations = Sequence[Sequence[ChatMessage]]


class Pointwise(Protocol):
    """Scores replies: one list of scores for each prompt."""

    def score(self, prompts: Conversations, replies: Sequence[Sequence[str]]) -> list[list[float]]: ...


class Pairwise(Protocol):
    """The probability that the first reply is better, antisymmetric in the two."""

    def prefers(self, prompts: Conversations, firsts: Sequence[str], seconds: Sequence[str]) -> list[float]: ...


class Judges(Protocol):
    """The two preference models of one generation."""

    @property
    def pointwise(self) -> Pointwise: ...

    @property
    def pairwise(self) -> Pairwise: ...


def wins(margin: ArrayLike) -> NDArray[np.float64]:
    """1 where the new reply is ahead (margin above 0), 0 where behind, one half for a tie."""
    result: NDArray[np.float64] = (np.sign(np.asarray(margin, dtype=np.float64)) + 1) / 2
    return result


def win_rate(won: ArrayLike, users: Sequence[str]) -> Estimate:
    """The mean of `won` (1, 0, or one half for a tie) with an interval clustered by user."""
    return intervals.share(won, users)


def length_controlled(won: ArrayLike, longer: ArrayLike, users: Sequence[str]) -> Estimate:
    """The win rate if both replies were equally long: does the new model win by more than its length?

    A logistic regression of `won` on tanh(longer / its standard deviation) (`longer` is new less old, in tokens),
    read at zero difference, after Dubois et al. 2024. A weak normal prior (standard deviation 2.5, in log-odds) keeps
    it finite when one model wins everywhere. The interval is cluster-robust, never narrower than the model's own.
    """
    y, d = np.asarray(won, dtype=np.float64), np.asarray(longer, dtype=np.float64)
    if y.size < MIN_CONTROLLED:
        return Estimate(value=None, n=y.size, reason=f"{y.size} prompts, needs at least {MIN_CONTROLLED}")
    x = np.column_stack([np.ones_like(d), np.tanh(d / d.std()) if d.std() > 0 else np.zeros_like(d)])
    beta = np.zeros(2)
    for _ in range(50):
        p = expit(x @ beta)
        curvature = x.T @ (x * (p * (1 - p))[:, None]) + PRIOR_PRECISION * np.eye(2)
        step = np.linalg.solve(curvature, x.T @ (y - p) - PRIOR_PRECISION * beta)
        beta += step
        if np.abs(step).max() < 1e-10:
            break
    bread = np.linalg.inv(curvature)
    numbers = {user: number for number, user in enumerate(dict.fromkeys(users))}
    sums = np.zeros((len(numbers), 2))
    np.add.at(sums, [numbers[user] for user in users], x * (y - expit(x @ beta))[:, None])
    robust = bread @ (sums.T @ sums) @ bread * len(numbers) / max(1, len(numbers) - 1)
    half = float(stats.norm.ppf((1 + intervals.CONFIDENCE) / 2) * np.sqrt(max(robust[0, 0], bread[0, 0])))
    return Estimate(
        value=float(expit(beta[0])), low=float(expit(beta[0] - half)), high=float(expit(beta[0] + half)), n=y.size
    )
