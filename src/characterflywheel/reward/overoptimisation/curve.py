"""A measured way of optimising as a curve: points with intervals, and both forms fitted; and the same in words."""

from collections.abc import Sequence

import numpy as np

from ...ledger import OptimisationCurve, OptimisedPoint, ScalingFit
from ...records import Estimate
from .bootstrap import At, Measured, Numbers, Way, estimate
from .forms import scaling_fit, slope


def curve(
    way: Way, where: Sequence[At], measured: Measured, *, prompts: int, users: int, replies: int,
    ties: float | None = None,
) -> OptimisationCurve:  # fmt: skip
    """The curve with both forms fitted. `where` names the points in the order of the arrays' columns."""
    distance = np.sqrt(np.clip(measured.kl, 0, None))
    gap = None if measured.gold is None else measured.proxy - measured.gold

    def column(rows: Numbers | None, i: int) -> Estimate:
        return estimate(None if rows is None else rows[:, i], where[i].prompts, where[i].users)

    points = tuple(
        OptimisedPoint(
            n=at.n, steps=at.steps, distance=float(distance[0, i]),
            kl_plain=column(measured.kl_plain, i) if way == "rl" else None,
            kl=column(measured.kl, i) if way == "rl" else Estimate(value=float(measured.kl[0, i]), n=at.prompts),
            proxy=column(measured.proxy, i), gold=column(measured.gold, i), gap=column(gap, i),
        )
        for i, at in enumerate(where)
    )  # fmt: skip
    return OptimisationCurve(
        way=way, prompts=prompts, replies=replies, points=points, ties=ties,
        proxy=scaling_fit(way, distance, measured.proxy, prompts, users),
        gold=scaling_fit(way, distance, measured.gold, prompts, users),
        gap_growth=slope(distance, gap, prompts, users),
    )  # fmt: skip


def nothing(way: Way, reason: str) -> OptimisationCurve:
    """The curve where there is nothing to measure."""
    unknown = Estimate(value=None, n=0, reason=reason)
    unfitted = ScalingFit(alpha=unknown, beta=unknown, turn=unknown, farthest=0.0)
    return OptimisationCurve(
        way=way, prompts=0, replies=0, points=(), proxy=unfitted, gold=unfitted, gap_growth=unknown
    )  # fmt: skip


def said(found: OptimisationCurve, *, trusted: bool = True) -> str:
    """Whether gold followed the proxy, and how far, in one sentence; of a gold model that is not trusted, nothing."""
    if not found.points:
        return found.gap_growth.reason or "nothing to measure"
    last, turn = found.points[-1], found.gold.turn
    far = f"best of {last.n}" if last.n else f"{last.kl.value:.2f} nats"
    if not trusted or last.proxy.value is None or last.gold.value is None:
        proxy = "unmeasured" if last.proxy.value is None else f"{last.proxy.value:+.2f}"
        return f"proxy {proxy} at {far}, gold unmeasured"
    reached = f"proxy {last.proxy.value:+.2f}, gold {_interval(last.gold)}"
    if turn.value is not None:
        place = f"d = {turn.value:.2f}" + (f" (best of {found.gold.turn_n:.0f})" if found.gold.turn_n else "")
        sure = "turned" if turn.high is not None else "may have turned"
        return f"gold {sure} at {place} of {last.distance:.2f}; {reached} at {far}"
    if last.gold.low is not None and last.gold.low > 0:
        return f"gold followed the proxy up to {far}: {reached}"
    if last.gold.high is not None and last.gold.high < 0:
        return f"gold fell up to {far}: {reached}"
    return f"not shown that gold followed the proxy up to {far}: {reached}"


def _interval(found: Estimate) -> str:
    shown = f"{found.value:+.2f}"
    return shown if found.low is None else f"{shown} [{found.low:+.2f}, {found.high:+.2f}]"
