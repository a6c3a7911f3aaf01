"""Log-odds that mean what they say: temperature and offset on held-out users, and what error is left (PAPER section 3).

Platt scaling: a divisor and an offset of the log-odds with the least log loss. It repairs what class weights and the
penalty do to probabilities, and never reorders.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from .logistic import FOLDS, folds

Floats = NDArray[np.float64]
COLDEST, HOTTEST = 1 / 16, 16.0
BINS = 10


class Platt(NamedTuple):
    """log-odds / temperature + offset."""

    temperature: float
    offset: float

    def apply(self, logits: Floats) -> Floats:
        return np.asarray(logits / self.temperature + self.offset)


def platt(logits: Floats, labels: Floats) -> Platt:
    """The temperature, from 1/16 to 16, and offset with the least log loss; labels shrunk as Platt (1999) does."""
    positive = labels.sum()
    target = np.where(labels > 0, (positive + 1) / (positive + 2), 1 / (len(labels) - positive + 2))

    def loss(free: Floats) -> tuple[float, Floats]:
        slope = np.exp(-free[0])
        score = slope * logits + free[1]
        error = expit(score) - target
        nll = -(target * score + log_expit(-score)).sum()
        return float(nll), np.array([-slope * (error @ logits), error.sum()])

    limits = [(np.log(COLDEST), np.log(HOTTEST)), (None, None)]
    best = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=limits, options={"ftol": 1e-12}).x
    return Platt(float(np.exp(best[0])), float(best[1]))


def temperature(logits: Floats, labels: Floats) -> float:
    """The divisor of the log-odds with the least log loss on held-out rows (Guo et al. 2017), an offset beside it."""
    return platt(logits, labels).temperature


def cross_fitted(logits: Floats, labels: Floats, groups: Sequence[str], seed: int, count: int = FOLDS) -> Floats:
    """Probability of every row by a temperature and offset that were fitted on other groups (users)."""
    fold = folds(groups, min(count, len(set(groups))), seed)
    out = np.zeros(len(logits))
    for k in range(fold.max() + 1):
        here = fold == k
        out[here] = expit(platt(logits[~here], labels[~here]).apply(logits[here]))
    return out


def miscalibration(probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> float:
    """Root mean squared gap between probability and share over bins of equal count, sampling noise taken off.

    The plain estimate grows with noise: ten bins of a hundred fair coins show 0.05 where nothing is wrong. Each bin's
    squared gap is therefore lessened by the variance of its share, share (1 - share) / (n - 1) (Kumar et al. 2019).
    """
    p, y = np.asarray(probabilities, dtype=float), np.asarray(labels, dtype=float)
    total = 0.0
    for rows in np.array_split(np.argsort(p, kind="stable"), min(bins, max(1, len(p) // 2))):
        share, n = float(y[rows].mean()), len(rows)
        total += n * ((float(p[rows].mean()) - share) ** 2 - share * (1 - share) / max(1, n - 1))
    return float(np.sqrt(max(0.0, total / len(p))))
