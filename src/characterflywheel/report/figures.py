"""The report's figures as inline SVG and the numbers they show, both from the same marks.

No script and no chart library: positions are percentages, so figures follow the page's width while their text
keeps its size. One visual language throughout: a hollow dot is the old model, a filled one the new, a whisker
the interval.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from markupsafe import Markup

from ..records import Estimate, Record
from . import words

Tone = Literal["new", "good", "bad", "old"]


class Mark(Record):
    """One number of a figure, as `--json` writes it and as the table under the figure shows it."""

    series: str
    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Figure:
    """A drawing (safe HTML) and the numbers it was drawn from."""

    name: str
    html: Markup
    marks: tuple[Mark, ...]


class Axis(NamedTuple):
    """A horizontal or vertical scale; `log` for ratios."""

    low: float
    high: float
    ticks: tuple[float, ...]
    form: Callable[[float], str]
    log: bool = False

    def at(self, value: float) -> float:
        """Percent of the way along the axis, held within it."""
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, max(value, 1e-12)))
            if self.log
            else (self.low, self.high, value)
        )
        return min(100.0, max(0.0, 100 * (value - low) / (high - low)))


class Row(NamedTuple):
    """One line of a dot plot. `before` draws the old model's hollow dot and the way from it, `tick` an upright mark
    to compare the dot with."""

    label: str
    estimate: Estimate
    form: Callable[[float], str] = words.share
    tone: Tone = "new"
    before: Estimate | None = None
    note: str = ""
    tick: float | None = None


def mark(series: str, label: str, estimate: Estimate) -> Mark:
    """An estimate as a figure's number."""
    return Mark(series=series, label=label, **estimate.model_dump(include=set(Estimate.model_fields)))


def nice_axis(
    values: Sequence[float | None], form: Callable[[float], str], *, zero: bool = False, steps: int = 5
) -> Axis:
    """An axis around the values with round ticks; `zero` keeps zero in view."""
    known = [v for v in values if v is not None] + ([0.0] if zero else [])
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    if high - low < 1e-9:
        low, high = low - 0.05, high + 0.05
    rough = (high - low) / steps
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(first * step, last * step, tuple(round(i * step, 10) for i in range(first, last + 1)), form)


def beyond(estimate: Estimate, level: float) -> Tone:
    """Good above a level with the whole interval, bad below it."""
    if estimate.low is not None and estimate.low > level:
        return "good"
    return "bad" if estimate.high is not None and estimate.high < level else "new"


def share_axis(ticks: Sequence[float] = (0, 0.25, 0.5, 0.75, 1)) -> Axis:
    """0 to 100%."""
    return Axis(min(ticks), max(ticks), tuple(ticks), lambda v: f"{100 * v:g}%")


def dot_plot(
    name: str,
    rows: Sequence[Row],
    axis: Axis,
    *,
    band: tuple[float, float] | None = None,
    line: float | None = None,
    zero: float | None = None,
) -> Figure:
    """Dots with whiskers, one row each; `band` is shaded, `line` an alarm, `zero` the value of no difference."""
    html = Markup("").join(_dot_row(row, axis, band, line, zero) for row in rows)
    ticks = Markup("").join(_tick(axis, value) for value in axis.ticks)
    foot = Markup('<div class="row axis" aria-hidden="true"><svg class="track">{}</svg></div>').format(ticks)
    marks = []
    for row in rows:
        if row.before is not None:
            marks.append(mark("old", row.label, row.before))
        marks.append(mark("new", row.label, row.estimate))
    return Figure(name, Markup('<div class="plot">{}{}</div>').format(html, foot), tuple(marks))


def _dot_row(row: Row, axis: Axis, band: tuple[float, float] | None, line: float | None, zero: float | None) -> Markup:
    parts = [_stripe(axis, tick) for tick in axis.ticks]
    if band:
        left, right = axis.at(band[0]), axis.at(band[1])
        parts.insert(
            0, Markup('<rect class="band" x="{:.2f}%" width="{:.2f}%" y="0" height="100%"/>').format(left, right - left)
        )
    if zero is not None:
        parts.append(Markup('<line class="zero" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="100%"/>').format(axis.at(zero)))
    if line is not None:
        parts.append(Markup('<line class="alarm" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="100%"/>').format(axis.at(line)))
    new, old = row.estimate, row.before
    if old is not None and old.value is not None:
        if new.value is not None:
            way = '<line class="way {}" x1="{:.2f}%" x2="{:.2f}%" y1="50%" y2="50%"/>'
            parts.append(Markup(way).format(row.tone, axis.at(old.value), axis.at(new.value)))
        parts.append(_whisker(old, axis, "old"))
    if row.tick is not None:
        parts.append(
            Markup('<line class="beside" x1="{0:.2f}%" x2="{0:.2f}%" y1="22%" y2="78%"/>').format(axis.at(row.tick))
        )
    if new.value is not None:
        parts.append(_whisker(new, axis, row.tone))
    shown = words.value(new, row.form)
    if old is not None:
        shown = f"{words.value(old, row.form)} → {shown}"
    small = new.reason or "" if new.value is None else words.interval(new, row.form)
    if new.n:
        small += f"{' · ' if small else ''}n {words.count(new.n)}"
    template = (
        '<div class="row"><div class="label">{}{}</div><svg class="track" role="img" aria-label="{}">{}</svg>'
        '<div class="value"><b>{}</b> <small>{}</small></div></div>'
    )
    note = Markup("<small>{}</small>").format(row.note) if row.note else ""
    return Markup(template).format(
        row.label, note, f"{row.label}: {shown}, {small}", Markup("").join(parts), shown, small
    )


def _whisker(estimate: Estimate, axis: Axis, tone: str) -> Markup:
    assert estimate.value is not None
    y, radius = ("50%", 4.5) if tone == "old" else ("50%", 6)
    parts = []
    if estimate.low is not None and estimate.high is not None:
        span = '<line class="span {}" x1="{:.2f}%" x2="{:.2f}%" y1="{}" y2="{}"/>'
        parts.append(Markup(span).format(tone, axis.at(estimate.low), axis.at(estimate.high), y, y))
    dot = '<circle class="dot {}" cx="{:.2f}%" cy="{}" r="{}"/>'
    return Markup("").join([*parts, Markup(dot).format(tone, axis.at(estimate.value), y, radius)])


def _stripe(axis: Axis, value: float) -> Markup:
    return Markup('<line class="grid" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="100%"/>').format(axis.at(value))


def _tick(axis: Axis, value: float) -> Markup:
    where = axis.at(value)
    anchor = "start" if where < 1 else "end" if where > 99 else "middle"
    return Markup('<text x="{:.2f}%" y="14" text-anchor="{}">{}</text>').format(where, anchor, axis.form(value))


class Series(NamedTuple):
    """A curve: one estimate for each x, None where there is none."""

    name: str
    tone: Tone
    points: tuple[Estimate, ...]


def curves(
    name: str, title: str, labels: Sequence[str], series: Sequence[Series], axis: Axis, *,
    height: int = 190, zero: float | None = None, band: tuple[float, float] | None = None, joined: bool = True,
) -> Figure:  # fmt: skip
    """Curves with interval ribbons over few x values (days, generations); labels sit on the grid lines.

    A curve breaks where a point is missing. `joined` False draws dots with whiskers, for points that do not follow
    from one another.
    """
    top, bottom = 16, height - 22
    xs = [50.0] if len(labels) == 1 else [9 + 88 * i / (len(labels) - 1) for i in range(len(labels))]

    def y(value: float) -> float:
        return bottom - axis.at(value) / 100 * (bottom - top)

    parts: list[Markup] = []
    if band:
        rect = '<rect class="band" x="0" width="100%" y="{:.1f}" height="{:.1f}"/>'
        parts.append(Markup(rect).format(y(band[1]), y(band[0]) - y(band[1])))
    for tick in axis.ticks:
        kind = "zero" if zero is not None and abs(tick - zero) < 1e-12 else "grid"
        parts.append(
            Markup('<line class="{}" x1="0" x2="100%" y1="{:.1f}" y2="{:.1f}"/>').format(kind, y(tick), y(tick))
        )
        parts.append(Markup('<text x="0" y="{:.1f}">{}</text>').format(y(tick) - 4, axis.form(tick)))
    scaled, dots = [], []
    for one in series:
        known = [(x, p) for x, p in zip(xs, one.points, strict=True) if p.value is not None]
        runs = _runs(list(zip(xs, one.points, strict=True))) if joined else []
        for run in runs:
            edge = [(x, p.high) for x, p in run] + [(x, p.low) for x, p in reversed(run)]
            if len(run) > 1 and all(v is not None for _, v in edge):
                points = " ".join(f"{x:.2f},{y(v or 0):.1f}" for x, v in edge)
                scaled.append(Markup('<polygon class="ribbon {}" points="{}"/>').format(one.tone, points))
        for run in runs:
            points = " ".join(f"{x:.2f},{y(p.value or 0):.1f}" for x, p in run)
            scaled.append(Markup('<polyline class="curve {}" points="{}"/>').format(one.tone, points))
        for x, p in known:
            if not joined and p.low is not None and p.high is not None:
                span = '<line class="span {}" x1="{:.2f}%" x2="{:.2f}%" y1="{:.1f}" y2="{:.1f}"/>'
                dots.append(Markup(span).format(one.tone, x, x, y(p.low), y(p.high)))
            dot = '<circle class="dot {}" cx="{:.2f}%" cy="{:.1f}" r="{}"/>'
            dots.append(Markup(dot).format(one.tone, x, y(p.value or 0), 3.5 if joined else 5))
    inner = '<svg viewBox="0 0 100 {}" preserveAspectRatio="none" width="100%" height="{}">{}</svg>'
    parts += [Markup(inner).format(height, height, Markup("").join(scaled)), *dots]
    for x, label in zip(xs, labels, strict=True):
        anchor = "end" if x > 95 else "middle"
        parts.append(Markup('<text x="{:.2f}%" y="{}" text-anchor="{}">{}</text>').format(x, height - 4, anchor, label))
    html = Markup(
        '<figure class="panel"><figcaption>{}</figcaption><svg height="{}" role="img" aria-label="{}">{}</svg></figure>'
    )
    marks = tuple(mark(s.name, label, p) for s in series for label, p in zip(labels, s.points, strict=True))
    return Figure(name, html.format(title, height, title, Markup("").join(parts)), marks)


def _runs(points: list[tuple[float, Estimate]]) -> list[list[tuple[float, Estimate]]]:
    """Stretches of points without a missing one."""
    runs: list[list[tuple[float, Estimate]]] = [[]]
    for x, point in points:
        if point.value is None:
            runs.append([])
        else:
            runs[-1].append((x, point))
    return [run for run in runs if run]


class Bar(NamedTuple):
    """A labelled amount."""

    label: str
    amount: float
    shown: str


def bars(name: str, rows: Sequence[Bar]) -> Figure:
    """Plain horizontal bars from zero."""
    most = max((bar.amount for bar in rows), default=0) or 1.0
    template = (
        '<div class="row bar"><div class="label">{}</div><svg class="track" aria-hidden="true">'
        '<rect class="fill" x="0" width="{:.2f}%" y="30%" height="40%" rx="2"/></svg>'
        '<div class="value"><b>{}</b></div></div>'
    )
    html = Markup("").join(Markup(template).format(bar.label, 100 * bar.amount / most, bar.shown) for bar in rows)
    return Figure(
        name,
        Markup('<div class="plot">{}</div>').format(html),
        tuple(Mark(series=name, label=b.label, value=b.amount) for b in rows),
    )


class Node(NamedTuple):
    """A station of the wheel: its name, this run's number, its phase (0 to 3)."""

    name: str
    figure: str
    phase: int


def wheel(nodes: Sequence[Node], centre: str, below: str, tone: str) -> Figure:
    """The flywheel, clockwise from the top, one arc for each phase, with this run's numbers around it."""
    cx, cy, radius, gap = 230.0, 205.0, 118.0, 0.075
    turn = 2 * math.pi / len(nodes)

    def point(angle: float, r: float) -> tuple[float, float]:
        return cx + r * math.sin(angle), cy - r * math.cos(angle)

    parts: list[Markup] = []
    for phase in sorted({node.phase for node in nodes}):
        where = [i for i, node in enumerate(nodes) if node.phase == phase]
        start, end = (where[0] - 0.5) * turn + gap, (where[-1] + 0.5) * turn - gap
        (x1, y1), (x2, y2) = point(start, radius), point(end, radius)
        arc = '<path class="arc phase{}" d="M{:.1f} {:.1f}A{r} {r} 0 {large} 1 {:.1f} {:.1f}"/>'
        parts.append(Markup(arc).format(phase, x1, y1, x2, y2, r=radius, large=int(end - start > math.pi)))
        ahead, left, right = point(end + 0.07, radius), point(end - 0.015, radius + 7), point(end - 0.015, radius - 7)
        tip = '<polygon class="tip phase{}" points="{:.1f},{:.1f} {:.1f},{:.1f} {:.1f},{:.1f}"/>'
        parts.append(Markup(tip).format(phase, *ahead, *left, *right))
    for i, node in enumerate(nodes):
        (x, y), (tx, ty) = point(i * turn, radius), point(i * turn, radius + 18)
        side = math.sin(i * turn)
        anchor = "middle" if abs(side) < 0.2 else "start" if side > 0 else "end"
        lift = -12 * math.cos(i * turn)
        parts.append(Markup('<circle class="station phase{}" cx="{:.1f}" cy="{:.1f}" r="6"/>').format(node.phase, x, y))
        for kind, text, down in (("name", node.name, -1), ("figure", node.figure, 15)):
            label = '<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>'
            parts.append(Markup(label).format(kind, tx, ty + lift + down, anchor, text))
    for kind, text, down in (("centre", centre, 4), (f"below {tone}", below, 32)):
        parts.append(
            Markup('<text class="{}" x="{}" y="{}" text-anchor="middle">{}</text>').format(kind, cx, cy + down, text)
        )
    described = "; ".join(f"{node.name}: {node.figure}" for node in nodes)
    html = Markup('<svg class="wheel" viewBox="0 0 460 410" role="img" aria-label="{}">{}</svg>').format(
        f"The loop. {described}", Markup("").join(parts)
    )
    return Figure("loop", html, ())
