"""The functional forms of Gao, Schulman, Hilton (2022), fitted, and the distance from which they fall.

With d = sqrt(KL): best-of-n R(d) = d (alpha - beta d), RL R(d) = d (alpha - beta log d). Both are linear in alpha and
beta, so weighted least squares is exact; the weights are the points' inverse variances, the intervals those of a fit to
each draw of the bootstrap.
"""

import numpy as np

from ...ledger import ScalingFit
from ...records import Estimate
from .best_of_n import n_at
from .bootstrap import NO_GOLD, Numbers, Way, estimate

POINTS = 3


def regressors(way: Way, distance: Numbers) -> Numbers:
    """What alpha and beta multiply: (...,) -> (..., 2); both 0 at d = 0."""
    if way == "best_of_n":
        return np.stack([distance, -(distance**2)], -1)
    return np.stack([distance, -distance * np.log(np.where(distance > 0, distance, 1.0))], -1)


def reward(way: Way, alpha: float, beta: float, distance: Numbers) -> Numbers:
    """R(d) of a fitted form."""
    return np.asarray(regressors(way, distance) @ np.array([alpha, beta]))


def turn(way: Way, alpha: Numbers, beta: Numbers) -> Numbers:
    """The distance at which R is highest: infinity where it never turns, 0 where it falls from the start."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        peak = alpha / (2 * beta) if way == "best_of_n" else np.exp(alpha / beta - 1)
    flat = np.where((beta == 0) & (alpha <= 0), 0.0, np.inf)
    return np.where(beta > 0, np.clip(peak, 0, None), flat)


def scaling_fit(way: Way, distance: Numbers, rewards: Numbers | None, n: int, users: int) -> ScalingFit:
    """Fit alpha and beta to points, arrays (1 + draws, points) as in `bootstrap`, with `n` prompts of so many users
    behind them.

    A turn beyond the farthest point is no number, and its interval is open where draws turn beyond.
    """
    farthest = float(distance[0].max(initial=0.0))

    def unknown(reason: str) -> ScalingFit:
        nothing = Estimate(value=None, n=n, reason=reason)
        return ScalingFit(alpha=nothing, beta=nothing, turn=nothing, farthest=farthest)

    if rewards is None:
        return unknown(NO_GOLD)
    known = (distance[0] > 0) & np.isfinite(rewards).all(0) & (rewards[1:].var(0) > 0)
    if known.sum() < POINTS:
        return unknown(f"{known.sum()} points with a distance and a spread, must be at least {POINTS} for two numbers")
    d, r = distance[:, known], rewards[:, known]
    weight = 1 / r[1:].var(0)
    weight = weight / weight.sum()
    x = regressors(way, d)
    try:
        solved = np.linalg.solve(
            np.einsum("p,rpi,rpj->rij", weight, x, x), np.einsum("p,rpi,rp->ri", weight, x, r)[..., None]
        )[..., 0]
    except np.linalg.LinAlgError:
        return unknown("all points lie at one distance")
    alpha, beta = solved.T
    peaks = turn(way, alpha, beta)
    highest = _turn(peaks, farthest, n)
    left = r[0] - x[0] @ solved[0]
    spread = float(weight @ (r[0] - weight @ r[0]) ** 2)
    return ScalingFit(
        alpha=estimate(alpha, n, users), beta=estimate(beta, n, users), turn=highest, farthest=farthest,
        turn_n=None if highest.value is None or way == "rl" else n_at(highest.value),
        r2=1 - float(weight @ left**2) / spread if spread > 0 else None,
        residual=float(np.sqrt((left**2).mean())),
    )  # fmt: skip


def _turn(peaks: Numbers, farthest: float, n: int) -> Estimate:
    inside = (peaks[1:] <= farthest).mean()
    if peaks[0] > farthest:
        reason = f"no turn seen up to d = {farthest:.2f} ({inside:.0%} of the bootstrap's draws turn before)"
        return Estimate(value=None, n=n, reason=reason)
    low, high = np.percentile(np.minimum(peaks[1:], 2 * farthest), [2.5, 97.5], method="nearest")
    if high > farthest:
        beyond = f"{1 - inside:.0%} of the bootstrap's draws turn beyond the data"
        return Estimate(value=peaks[0], low=low, n=n, reason=beyond)
    return Estimate(value=peaks[0], low=low, high=high, n=n)


def slope(distance: Numbers, values: Numbers | None, n: int, users: int) -> Estimate:
    """How much values grow for each unit of distance, by least squares through the origin."""
    if values is None:
        return estimate(None, n, users)
    with np.errstate(invalid="ignore", divide="ignore"):
        return estimate(
            (distance * values).sum(1) / (distance**2).sum(1), n, users, "no point has a distance and a score"
        )
