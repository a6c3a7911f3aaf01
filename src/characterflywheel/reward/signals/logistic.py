"""Multi-label logistic regression with missing labels masked, and its predictions for groups it has not seen.

Each label's classes weigh the same in training (King and Zeng 2001: the offset takes the weights back, so that
probabilities keep the natural balance). A penalty is the inverse prior variance of weights on standardised features.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logit

from ...errors import FlywheelError
from ...ids import derive_seed

Floats = NDArray[np.float64]
PENALTIES = (16.0, 4.0, 1.0, 0.25)
FOLDS = 5
AXES = 256
ROWS_AT_ONCE = 1024  # standardised together, so that features are never held twice


class Weights(NamedTuple):
    """Standardisation of the features, and a row of weights and an offset for each label."""

    mean: Floats
    scale: Floats
    weight: Floats
    offset: Floats

    def logits(self, x: Floats) -> Floats:
        """Log-odds, shape (rows, labels)."""
        return _by_rows(x, lambda rows: ((rows - self.mean) / self.scale) @ self.weight.T + self.offset)


class Balance(NamedTuple):
    """Weight of every label, 0 where it is missing, and the log-odds that the weights add to each label's offset."""

    weight: Floats
    shift: Floats


def balance(y: Floats) -> Balance:
    """Weights that make a label's two classes weigh the same, n / (2 x its class's n); all 0 where one is absent."""
    known = ~np.isnan(y)
    positive = np.where(known, y, 0.0).sum(0)
    negative = known.sum(0) - positive
    usable = (positive > 0) & (negative > 0)
    n, up, down = (np.where(usable, side, 1.0) for side in (positive + negative, positive, negative))
    weight = np.where(y == 1, n / (2 * up), n / (2 * down)) * (known & usable)
    return Balance(weight, np.where(usable, np.log(down / up), 0.0))


class Frame(NamedTuple):
    """Coordinates to fit in: features standardised, scaled by `spread`, turned onto their principal axes."""

    mean: Floats
    scale: Floats
    axes: Floats

    def coordinates(self, x: Floats) -> Floats:
        """Shape (rows, axes)."""
        return _by_rows(x, lambda rows: (rows - self.mean) / self.scale @ self.axes)


class Solution(NamedTuple):
    """A row of weights on a frame's axes and an offset for each label."""

    weight: Floats
    offset: Floats

    def logits(self, z: Floats) -> Floats:
        return np.asarray(z @ self.weight.T + self.offset)


def frame(x: Floats, spread: Floats | None = None, axes: int = AXES) -> Frame:
    """The frame of some features: no labels are looked at. At most `axes` axes, those of the most variance.

    A ridge penalty does not care how the axes are turned, and holds down those that are left out most of all.
    """
    rows, columns = x.shape
    mean = x.mean(0)
    scale = np.sqrt(sum(((part - mean) ** 2).sum(0) for part in _parts(x)) / rows)
    scale[scale < 1e-9] = 1.0
    scale = scale / (1.0 if spread is None else spread)
    if rows < columns:  # the same axes from the smaller matrix
        z = (x - mean) / scale
        values, vectors = np.linalg.eigh(z @ z.T)
        kept = np.flatnonzero(values > 1e-9 * max(1e-9, values[-1]))[-axes:]
        return Frame(mean, scale, z.T @ vectors[:, kept] / np.sqrt(values[kept]))
    turned = ((part - mean) / scale for part in _parts(x))
    values, vectors = np.linalg.eigh(sum(z.T @ z for z in turned))
    return Frame(mean, scale, np.ascontiguousarray(vectors[:, -axes:]))


def _parts(x: Floats) -> Iterator[Floats]:
    return (x[i : i + ROWS_AT_ONCE] for i in range(0, len(x), ROWS_AT_ONCE))


def _by_rows(x: Floats, function: Callable[[Floats], Floats]) -> Floats:
    """What the function makes of all rows, a part of them at a time."""
    return np.concatenate([function(part) for part in _parts(x)]) if len(x) else function(x)


def solve(z: Floats, y: Floats, penalty: float | Floats, start: Solution | None = None) -> Solution:
    """Logistic regression with an L2 penalty on coordinates `z` (rows, axes); NaN labels count for nothing.

    A label of one class gets no weights, only the offset of its smoothed share.
    """
    labels, width = y.shape[1], z.shape[1]
    target = np.nan_to_num(y)
    weigh, shift = balance(y)
    ridge = np.broadcast_to(np.asarray(penalty, dtype=float), (labels,))[:, None]
    # axes are nearly uncorrelated, so dividing by the root of the curvature makes the valley round
    curvature = np.c_[weigh.T @ z**2 / 4 + ridge, np.maximum(1.0, weigh.sum(0)[:, None] / 4)]
    unit = 1 / np.sqrt(curvature)
    begin = np.zeros((labels, width + 1))
    if start is not None:
        begin = np.c_[start.weight, start.offset + shift] / unit

    def loss(flat: Floats) -> tuple[float, Floats]:
        weight = flat.reshape(labels, width + 1) * unit
        score = z @ weight[:, :-1].T + weight[:, -1]
        error = weigh * (expit(score) - target)
        nll = -(weigh * (target * score + log_expit(-score))).sum()
        gradient = np.c_[error.T @ z + ridge * weight[:, :-1], error.sum(0)] * unit
        return float(nll + (ridge * weight[:, :-1] ** 2).sum() / 2), gradient.ravel()

    best = minimize(loss, begin.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 300, "ftol": 1e-9}).x
    best = best.reshape(labels, width + 1) * unit
    known = (~np.isnan(y)).sum(0)
    share = (target.sum(0) + 0.5) / (known + 1.0)
    return Solution(best[:, :-1], np.where(weigh.any(0), best[:, -1] - shift, logit(share)))


def fit(x: Floats, y: Floats, penalty: float | Floats, spread: Floats | None = None) -> Weights:
    """The model of some rows, in terms of their features.

    Args:
        x: features, shape (rows, columns).
        y: labels 0, 1 or NaN (unknown, counts for nothing), shape (rows, labels).
        penalty: inverse prior variance, for all labels or one for each.
        spread: prior deviation of each standardised column's weight, times the root of the penalty; all 1 if absent.
    """
    place = frame(x, spread)
    found = solve(place.coordinates(x), checked_labels(y), penalty)
    return Weights(place.mean, place.scale, found.weight @ place.axes.T, found.offset)


def checked_labels(y: Floats) -> Floats:
    """The labels, if each is 0, 1 or NaN."""
    wrong = ~(np.isnan(y) | (y == 0) | (y == 1))
    if wrong.any():
        raise FlywheelError(
            f"{int(wrong.sum())} labels are neither 0 nor 1, the first {y[wrong][0]:g}; unknown is NaN."
        )
    return y


def log_loss(logits: Floats, y: Floats) -> Floats:
    """Summed cross-entropy of each label in nats, shape (labels,); NaN labels count for nothing."""
    target = np.nan_to_num(y)
    return np.asarray(-np.where(np.isnan(y), 0.0, target * logits + log_expit(-logits)).sum(0))


def folds(groups: Sequence[str], count: int, seed: int) -> NDArray[np.int64]:
    """A fold for every row such that no group is in two: groups are shuffled, then dealt to the smallest fold."""
    names, member, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    filled, fold = np.zeros(count), np.zeros(len(names), dtype=np.int64)
    for name in sorted(order, key=lambda i: -sizes[i]):
        fold[name] = int(filled.argmin())
        filled[fold[name]] += sizes[name]
    return fold[member]


class HeldOut(NamedTuple):
    """For every row, from a model that never saw its group: log-odds, and the same without the model's own offset.

    Models of different folds have different offsets, lower where more positives were held out: rows of several folds
    are ranked by `ranks`, or the offsets would rank them the wrong way round. `penalty`: each label's, chosen on all.
    """

    logits: Floats
    ranks: Floats
    penalty: Floats


def cross_fit(
    x: Floats, y: Floats, groups: Sequence[str], seed: int, spread: Floats | None = None, count: int = FOLDS
) -> HeldOut:
    """Predictions for every row by cross-fitting over groups. Needs two groups.

    A fold's penalty is, label by label, the one with the least log loss on the other folds: how well it does on the
    rows it is used on has no say (the models that are compared on the other folds did learn from these rows, which can
    tell four penalties apart by next to nothing). The frame, which looks at no label, is that of all rows.
    """
    count = min(count, len(set(groups)))
    if count < 2:
        raise FlywheelError(f"{count} users: at least 2 are needed to judge a model on users it has not seen.")
    fold = folds(groups, count, derive_seed(seed, "outer"))
    z, y = frame(x, spread).coordinates(x), checked_labels(y)
    logits = np.zeros((len(PENALTIES), *y.shape))
    ranks = np.zeros_like(logits)
    losses = np.zeros((len(PENALTIES), count, y.shape[1]))
    for k in range(count):
        here, found = fold == k, None
        for p, penalty in enumerate(PENALTIES):
            found = solve(z[~here], y[~here], penalty, found)
            logits[p, here] = found.logits(z[here])
            ranks[p, here] = logits[p, here] - found.offset
            losses[p, k] = log_loss(logits[p, here], y[here])
    rows, labels = np.arange(len(y))[:, None], np.arange(y.shape[1])[None, :]
    chosen = np.argmin(losses.sum(1)[:, None, :] - losses, axis=0)[fold]
    return HeldOut(
        logits[chosen, rows, labels], ranks[chosen, rows, labels], np.array(PENALTIES)[losses.sum(1).argmin(0)]
    )


def choose_penalty(
    x: Floats, y: Floats, groups: Sequence[str], seed: int, spread: Floats | None = None, count: int = FOLDS
) -> Floats:
    """Each label's penalty with the least log loss on held-out groups; the strongest where there are too few."""
    if len(set(groups)) < 2:
        return np.full(y.shape[1], PENALTIES[0])
    return cross_fit(x, y, groups, seed, spread, count).penalty
