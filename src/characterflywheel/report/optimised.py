"""Over-optimisation drawn: proxy and gold reward over the distance from the policy's start, fitted forms dashed."""

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from ..ledger import OptimisationCurve, OptimisedPoint, ScalingFit
from ..records import Estimate
from . import words
from .figures import Axis, Figure, Mark, mark, nice_axis

TITLES = {
    "best_of_n": "Best of n: proxy (grey) and gold (blue)",
    "rl": "Reinforcement learning: proxy (grey) and gold (blue)",
}
GUESS = ", which may be a guess"
HEIGHT, TOP, BOTTOM, LEFT, RIGHT = 210, 16, 188, 9.0, 97.0
FINE = 60


def figures(curves: Sequence[OptimisationCurve], trusted: bool = True) -> list[Figure]:
    """A panel for each way of optimising that has points, on one vertical scale so that they compare.

    A gold model that is not `trusted` is drawn, named as a guess, and no turn is marked.
    """
    drawn = [curve for curve in curves if curve.points]
    read = [e for curve in drawn for p in curve.points for e in (p.proxy, p.gold)]
    axis = nice_axis([edge for e in read for edge in (e.value, e.low, e.high)], words.score, zero=True, steps=4)
    return [_panel(curve, axis, trusted) for curve in drawn]


def said_of(point: OptimisedPoint) -> str:
    """What a point is, for the table under the figure."""
    if point.n is not None:
        return f"best of {point.n}"
    first, last = point.steps or (0, 0)
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _panel(curve: OptimisationCurve, axis: Axis, trusted: bool) -> Figure:
    far = nice_axis([p.distance for p in curve.points], words.number, zero=True, steps=4)

    def x(distance: float) -> float:
        return LEFT + (RIGHT - LEFT) * far.at(distance) / 100

    def y(value: float) -> float:
        return BOTTOM - axis.at(value) / 100 * (BOTTOM - TOP)

    parts: list[Markup] = []
    for tick in axis.ticks:
        kind = "zero" if abs(tick) < 1e-12 else "grid"
        line = '<line class="{0}" x1="0" x2="100%" y1="{1:.1f}" y2="{1:.1f}"/>'
        parts.append(Markup(line).format(kind, y(tick)))
        parts.append(Markup('<text x="0" y="{:.1f}">{}</text>').format(y(tick) - 4, axis.form(tick)))
    scaled: list[Markup] = []
    dots: list[Markup] = []
    marks: list[Mark] = []
    series: tuple[tuple[str, str, Callable[[OptimisedPoint], Estimate], ScalingFit], ...] = (
        ("proxy", "old", lambda p: p.proxy, curve.proxy), ("gold", "new", lambda p: p.gold, curve.gold),
    )  # fmt: skip
    for name, tone, read, fit in series:
        known = [(p, read(p)) for p in curve.points if read(p).value is not None]
        scaled += _ribbon([(p.distance, e) for p, e in known], tone, x, y)
        scaled += _fitted(curve.way, fit, tone, x, y)
        for p, e in known:
            dot = '<circle class="dot {}" cx="{:.2f}%" cy="{:.1f}" r="{}"/>'
            dots.append(Markup(dot).format(tone, x(p.distance), y(e.value or 0), 3 if len(known) <= 12 else 1.5))
        marks += [mark(name, said_of(p), read(p)) for p in curve.points]
        marks += [mark(f"{name}, fitted", label, found) for label, found in
                  (("alpha", fit.alpha), ("beta", fit.beta), ("turn, distance", fit.turn))]  # fmt: skip
    if trusted and curve.gold.turn.value is not None:
        turn = '<line class="alarm" x1="{0:.2f}%" x2="{0:.2f}%" y1="{1}" y2="{2}"/>'
        parts.append(Markup(turn).format(x(curve.gold.turn.value), TOP, BOTTOM))
    inner = '<svg viewBox="0 0 100 {0}" preserveAspectRatio="none" width="100%" height="{0}">{1}</svg>'
    parts += [Markup(inner).format(HEIGHT, Markup("").join(scaled)), *dots]
    for tick in far.ticks:
        anchor = "end" if x(tick) > 95 else "middle"
        text = '<text x="{:.2f}%" y="{}" text-anchor="{}">{}</text>'
        parts.append(Markup(text).format(x(tick), HEIGHT - 4, anchor, far.form(tick)))
    html = Markup(
        '<figure class="panel"><figcaption>{}</figcaption><svg height="{}" role="img" aria-label="{}">{}</svg></figure>'
    )
    title = TITLES[curve.way] + ("" if trusted or curve.gold.alpha.value is None else GUESS)
    return Figure(f"optimised_{curve.way}", html.format(title, HEIGHT, title, Markup("").join(parts)), tuple(marks))


Place = Callable[[float], float]


def _ribbon(known: Sequence[tuple[float, Estimate]], tone: str, x: Place, y: Place) -> list[Markup]:
    """The interval along the curve, through the points in the order of their distance."""
    line = sorted((d, e.low, e.high) for d, e in known if e.low is not None and e.high is not None)
    if len(line) < 2:
        return []
    edge = [(d, high) for d, _, high in line] + [(d, low) for d, low, _ in reversed(line)]
    points = " ".join(f"{x(d):.2f},{y(v):.1f}" for d, v in edge)
    return [Markup('<polygon class="ribbon {}" points="{}"/>').format(tone, points)]


def _fitted(way: str, fit: ScalingFit, tone: str, x: Place, y: Place) -> list[Markup]:
    """d (alpha - beta d), or d (alpha - beta log d), up to the farthest point."""
    if fit.alpha.value is None or fit.beta.value is None:
        return []
    path = []
    for i in range(FINE + 1):
        d = fit.farthest * i / FINE
        bend = d if way == "best_of_n" else math.log(d) if d else 0.0
        path.append(f"{x(d):.2f},{y(d * (fit.alpha.value - fit.beta.value * bend)):.1f}")
    return [Markup('<polyline class="curve fitted {}" points="{}"/>').format(tone, " ".join(path))]
