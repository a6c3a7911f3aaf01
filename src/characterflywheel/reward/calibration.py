"""Whether a preference model's probabilities mean what they say (PAPER section 3; DESIGN section 6).

One temperature divides the log-odds (Guo et al. 2017). It is judged on users whom it was not fitted on, and beside
every calibration error stands what a perfectly calibrated model would show by chance on as many pairs.
"""

from collections.abc import Sequence
from math import exp, log

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit

from .. import intervals
from ..errors import FlywheelError
from ..records import Estimate
from .metrics import Floats, group_draws
from .summary import Calibration, CalibrationError, ReliabilityBin

COLDEST, HOTTEST = 1 / 32, 32.0
BINS = 5  # of the confidence, from one half to one: the ten bins of the probability folded at one half
DRAWS = 1000


def fit_temperature(margins: ArrayLike, labels: ArrayLike) -> float:
    """The divisor of the log-odds with the least log loss, from 1/32 to 32.

    `margins[i]`: log-odds that the first reply is better; `labels[i]`: share of reviewers who say so. The loss is
    convex in 1/T, so its slope has one root. Labels are drawn in by Platt's rule (1999), l (n + 1) + (1 - l) over
    n + 2 for n pairs, or a few pairs that are all in order would ask for certainty. Margins that order the pairs no
    better than chance get the highest. Naming the replies of a pair the other way round changes nothing.
    """
    margin, label = _checked(margins, labels)
    if not np.any(margin):
        return 1.0
    drawn = (label * len(label) + 1) / (len(label) + 2)

    def slope(inverse: float) -> float:
        return float(margin @ (expit(inverse * margin) - drawn))

    if slope(1 / HOTTEST) >= 0:
        return HOTTEST
    if slope(1 / COLDEST) <= 0:
        return COLDEST
    return 1 / float(brentq(slope, 1 / HOTTEST, 1 / COLDEST, xtol=1e-12))


def cross_fitted(margins: ArrayLike, labels: ArrayLike, groups: Sequence[str], seed: int, folds: int = 10) -> Floats:
    """P(first is better) of each pair, calibrated by a temperature fitted on other groups (users).

    Raises:
        FlywheelError: fewer than two groups, so that there are no others.
    """
    margin, label = _checked(margins, labels)
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        raise FlywheelError(f"{len(names)} users, at least 2 are needed to fit a temperature on others.")
    count = min(folds, len(names))
    fold = (np.random.default_rng(seed).permutation(len(names)) % count)[member]
    temperature = np.ones(len(margin))
    for k in range(count):
        temperature[fold == k] = fit_temperature(margin[fold != k], label[fold != k])
    return np.asarray(expit(margin / temperature))


def confidence_bins(probabilities: Floats, labels: Floats) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Confidence in the reply that the model prefers, share of reviewers who agree, and the confidence's bin.

    The calibration error over these bins is that of both orders of every pair over ten bins of the probability.
    """
    confidence = np.maximum(probabilities, 1 - probabilities)
    agree = np.where(probabilities > 0.5, labels, np.where(probabilities < 0.5, 1 - labels, 0.5))
    return confidence, agree, np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)


def pair_calibration(
    probabilities: Floats, labels: Floats, groups: Sequence[str], *, seed: int, draws: int = DRAWS,
    confidence: float = 0.95,
) -> CalibrationError:  # fmt: skip
    """Expected calibration error over pairs with an interval by user, and what chance alone would make of it.

    A user adds a gap (confidence less agreement) to each bin. `by_chance` is the mean error when every user's
    gaps, less the mean of their bin, get a random sign: as noisy and as dependent as the pairs at hand, without the
    miscalibration (wild cluster bootstrap, Cameron et al. 2008). The interval is the basic bootstrap over users
    (Davison and Hinkley 1997, section 5.2), which takes back the upward bias that resampling has here as well; it
    begins at 0 where chance alone gives as large an error in more than one case of forty.
    """
    p, agree, cell = confidence_bins(probabilities, labels)
    n = len(p)
    if not n:
        return CalibrationError(error=Estimate(value=None, n=0, reason="no pairs to compare"), by_chance=None)
    times, member = group_draws(groups, draws, seed)
    users = times.shape[1]
    gaps, sizes = np.zeros((users, BINS)), np.zeros((users, BINS))
    np.add.at(gaps, (member, cell), p - agree)
    np.add.at(sizes, (member, cell), 1.0)
    error = float(np.abs(gaps.sum(0)).sum() / n)
    if users < 2:
        return CalibrationError(error=Estimate(value=error, n=n, reason="one user: no interval"), by_chance=None)
    in_bin = (sizes > 0).sum(0)
    centred = gaps - sizes * gaps.sum(0) / np.maximum(sizes.sum(0), 1)
    centred *= np.sqrt(in_bin / np.maximum(in_bin - 1, 1))  # what the mean took away of the noise
    signs = np.random.default_rng([seed, 1]).choice([-1.0, 1.0], size=(draws, users))
    chance = np.abs(signs @ centred).sum(1) / n
    resampled = np.abs(times @ gaps).sum(1) / (times @ sizes.sum(1))
    tail = 0.5 - confidence / 2
    low, high = (2 * error - float(np.quantile(resampled, q)) for q in (1 - tail, tail))
    low = 0.0 if error <= np.quantile(chance, 1 - tail) else max(0.0, min(error, low))
    return CalibrationError(
        error=Estimate(value=error, low=low, high=max(error, high), n=n), by_chance=float(chance.mean())
    )


def reliability(probabilities: Floats, labels: Floats, groups: Sequence[str]) -> tuple[ReliabilityBin, ...]:
    """The reliability diagram's points: a bin's mean confidence and its share of agreeing reviewers, by user."""
    p, agree, cell = confidence_bins(probabilities, labels)
    bins = []
    for k in range(BINS):
        here = cell == k
        if here.any():
            share = intervals.share(agree[here], [group for group, inside in zip(groups, here, strict=True) if inside])
            bins.append(ReliabilityBin(confidence=float(p[here].mean()), agree=share))
    return tuple(bins)


def calibrate(margins: ArrayLike, labels: ArrayLike, groups: Sequence[str], seed: int) -> Calibration | None:
    """Everything about a preference model's probabilities; None without two users to tell one from the other.

    The temperature to keep is fitted on all pairs; what is judged of it is cross-fitted by user (`groups`).
    """
    margin, label = _checked(margins, labels)
    if len(set(groups)) < 2:
        return None
    raw, fitted = np.asarray(expit(margin)), cross_fitted(margin, label, groups, seed)
    return Calibration(
        temperature=fit_temperature(margin, label),
        before=pair_calibration(raw, label, groups, seed=seed),
        after=pair_calibration(fitted, label, groups, seed=seed),
        log_loss_before=log_loss(raw, label),
        log_loss_after=log_loss(fitted, label),
        reliability_before=reliability(raw, label, groups),
        reliability_after=reliability(fitted, label, groups),
    )


def log_loss(probabilities: Floats, labels: Floats) -> float:
    """Mean cross-entropy of the labels, in nats; a coin toss has log 2."""
    p = np.clip(probabilities, 1e-12, 1 - 1e-12)
    return float(-(labels * np.log(p) + (1 - labels) * np.log1p(-p)).mean())


def log_odds(p: float) -> float:
    """log(p / (1 - p)), of a probability that floating point may have rounded to 0 or 1 too."""
    p = min(max(p, 1e-12), 1 - 1e-12)
    return log(p / (1 - p))


def evened(straight: float, swapped: float) -> float:
    """P(A is better) from P(A) when A is read first and P(B) when B is: the mean of both orders' log-odds for A.

    Exactly one minus what the swapped replies give.
    """
    margin = (log_odds(straight) - log_odds(swapped)) / 2
    likely = 1 / (1 + exp(-abs(margin)))
    return likely if margin >= 0 else 1 - likely


def preferred(
    orders: tuple[Sequence[float], Sequence[float]], firsts: Sequence[str], seconds: Sequence[str]
) -> list[float]:
    """`evened` of each pair of replies; 0.5 for equal ones, which cannot be laid out in one order and whose rows may
    differ in a product's last bit."""
    return [0.5 if a == b else evened(p, q) for p, q, a, b in zip(*orders, firsts, seconds, strict=True)]


def _checked(margins: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    margin, label = np.asarray(margins, dtype=float), np.asarray(labels, dtype=float)
    if margin.shape != label.shape or margin.ndim != 1:
        raise FlywheelError(f"{margin.shape} margins for {label.shape} labels, must be two equally long rows.")
    if not np.all(np.isfinite(margin)):
        raise FlywheelError(f"{int((~np.isfinite(margin)).sum())} of {len(margin)} margins are not finite numbers.")
    if len(label) and (label.min() < 0 or label.max() > 1):
        raise FlywheelError(f"labels reach from {label.min():g} to {label.max():g}, must lie in [0, 1].")
    return margin, label
