"""Measures over the steps of a training run: one panel a measure, drawn as the other figures are.

A training run is one run: its points have no interval. Long runs are drawn as means of equal stretches of steps.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from markupsafe import Markup

from . import words
from .figures import Axis, Figure, Mark, Tone, nice_axis

HEIGHT, TOP, BOTTOM, LEFT, RIGHT = 170, 16, 148, 12.0, 97.0
COLOURS: dict[Tone, str] = {"new": "blue", "old": "grey", "good": "green", "bad": "red"}
MOST, DOTTED = 80, 16


class Line(NamedTuple):
    """A measure by step; a step at which it was not measured has no point."""

    name: str
    tone: Tone
    points: tuple[tuple[float, float], ...]


class Panel(NamedTuple):
    """What one panel shows: lines, a level of no difference (`zero`), a level of alarm (`bound`), steps at which this
    measure rang (`alarms`), the step that was `chosen`. `floor`: the axis begins at 0. Panels of one `stage` have the
    same steps across."""

    stage: str
    title: str
    lines: tuple[Line, ...]
    form: Callable[[float], str] = words.number
    zero: float | None = None
    bound: float | None = None
    alarms: tuple[float, ...] = ()
    floor: bool = False
    chosen: float | None = None


def panels(name: str, several: Sequence[Panel]) -> Figure:
    """The panels side by side, and the numbers of all of them; a line without points is left out."""
    shown = [one._replace(lines=tuple(line for line in one.lines if line.points)) for one in several]
    steps: dict[str, list[float]] = {}
    for one in shown:
        steps.setdefault(one.stage, []).extend(step for line in one.lines for step, _ in line.points)
    html = Markup("").join(_drawn(one, _across(min(steps[one.stage]), max(steps[one.stage]))) for one in shown)
    marks = tuple(
        Mark(series=f"{one.title}: {line.name}", label=f"step {words.number(step)}", value=value)
        for one in shown for line in one.lines for step, value in thinned(line.points)
    )  # fmt: skip
    return Figure(name, Markup('<div class="panels">{}</div>').format(html), marks)


def thinned(points: Sequence[tuple[float, float]], most: int = MOST) -> list[tuple[float, float]]:
    """The points, or means of at most `most` equal stretches of them, each at its last step.

    By hand: values 1, 3, 5, 7 at steps 1 to 4 in at most two are 2 at step 2 and 6 at step 4.
    """
    if len(points) <= most:
        return list(points)
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    parts = [points[low:high] for low, high in pairwise(edges)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def _across(first: float, last: float) -> Axis:
    """Whole steps only: an axis of half steps would be read as if there were some."""
    axis = nice_axis([first, last], words.number, steps=4)
    ticks = tuple(tick for tick in axis.ticks if tick == round(tick) and first <= tick <= last)
    low, high = (first, last) if last > first else (first - 1, first + 1)
    return Axis(low, high, ticks or (first,), words.number)


def _drawn(panel: Panel, across: Axis) -> Markup:
    alone = len(panel.lines) == 1
    shown = [(line._replace(tone="new") if alone else line, thinned(line.points)) for line in panel.lines]
    named = ", ".join(f"{line.name} ({COLOURS[line.tone]})" for line, _ in shown)
    title = panel.title if alone else f"{panel.title}: {named}"
    edges = [value for _, points in shown for _, value in points]
    axis = nice_axis([*edges, panel.bound, panel.zero], panel.form, zero=panel.floor, steps=3)

    def x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * across.at(step) / 100

    def y(value: float) -> float:
        return BOTTOM - axis.at(value) / 100 * (BOTTOM - TOP)

    parts: list[Markup] = []
    across_it = '<line class="{0}" x1="0" x2="100%" y1="{1:.1f}" y2="{1:.1f}"/>'
    for tick in axis.ticks:
        parts.append(Markup(across_it).format("grid", y(tick)))
        parts.append(Markup('<text x="0" y="{:.1f}">{}</text>').format(y(tick) - 4, axis.form(tick)))
    for kind, level in (("zero", panel.zero), ("alarm", panel.bound)):
        if level is not None:
            parts.append(Markup(across_it).format(kind, y(level)))
    for kind, steps in (("alarm", panel.alarms), ("kept", () if panel.chosen is None else (panel.chosen,))):
        upright = '<line class="{0}" x1="{1:.2f}%" x2="{1:.2f}%" y1="{2}" y2="{3}"/>'
        parts += [Markup(upright).format(kind, x(step), TOP, BOTTOM) for step in steps]
    scaled, dots = [], []
    for one, points in shown:
        if len(points) > 1:
            where = " ".join(f"{x(step):.2f},{y(value):.1f}" for step, value in points)
            scaled.append(Markup('<polyline class="curve {}" points="{}"/>').format(one.tone, where))
        if len(points) <= DOTTED:
            dot = '<circle class="dot {}" cx="{:.2f}%" cy="{:.1f}" r="3"/>'
            dots += [Markup(dot).format(one.tone, x(step), y(value)) for step, value in points]
    inner = '<svg viewBox="0 0 100 {0}" preserveAspectRatio="none" width="100%" height="{0}">{1}</svg>'
    parts += [Markup(inner).format(HEIGHT, Markup("").join(scaled)), *dots]
    for tick in across.ticks:
        anchor = "end" if x(tick) > 95 else "middle"
        text = '<text x="{:.2f}%" y="{}" text-anchor="{}">{}</text>'
        parts.append(Markup(text).format(x(tick), HEIGHT - 4, anchor, across.form(tick)))
    html = Markup(
        '<figure class="panel"><figcaption>{}</figcaption><svg height="{}" role="img" aria-label="{}">{}</svg></figure>'
    )
    said = f"{title}, by step" + (f"; alarms at {_listed(panel.alarms)}" if panel.alarms else "")
    return html.format(title, HEIGHT, said, Markup("").join(parts))


def _listed(steps: Sequence[float]) -> str:
    return ", ".join(f"step {words.number(step)}" for step in steps)
