"""What the page shows: the ledger's rows and sample conversations, and every figure made from them.

Nothing is recomputed; only a day's share of active people gets its Wilson interval here. A comparison is coloured
good or bad only when the two intervals do not touch.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import ledger, tables
from ..errors import FlywheelError
from ..ledger import Compared, Day, LedgerRow, Sample
from ..pipeline import write_atomically
from ..records import Estimate
from ..reward.summary import no_judge
from . import herding, optimised, rewards, runs, words
from .figures import (
    Axis,
    Bar,
    Figure,
    Node,
    Row,
    Series,
    Tone,
    bars,
    beyond,
    curves,
    dot_plot,
    nice_axis,
    share_axis,
    wheel,
)

IDEAL_BAND = (0.50, 0.65)
ALARM = 0.65
LIFTS = {
    "breadth_lift": ("Breadth", "people who engage"),
    "depth_lift": ("Depth", "messages of the engaged"),
    "depth_all": ("Messages of all exposed", ""),
    "active_days": ("Active days", ""),
    "balance": ("Before the test", "should hold zero"),
}
STYLE_ROWS = 14


@dataclass(frozen=True)
class ReportData:
    """The generation the page is about, all so far, its sample conversations, its judges' report, its training."""

    row: LedgerRow
    history: tuple[LedgerRow, ...]
    samples: tuple[Sample, ...]
    judged: rewards.Judged
    herded: runs.Runs


def load(workspace: Path) -> ReportData:
    """The last generation of the workspace's ledger and what it points to."""
    path = workspace / "ledger.jsonl"
    rows = ledger.read(path)
    if not rows:
        raise FlywheelError(f"{path} has no generation yet: turn the flywheel once with `flywheel run {workspace}`.")
    samples: tuple[Sample, ...] = ()
    if rows[-1].samples is not None:
        file = workspace / rows[-1].samples
        if not file.exists():
            raise FlywheelError(f"{file} is missing, though the ledger names it: run `flywheel run {workspace}` again.")
        samples = tuple(tables.read_jsonl(file, Sample))
    row = rows[-1]
    return ReportData(row, tuple(rows), samples, rewards.load(workspace, row), runs.load(workspace, row))


def write_numbers(path: Path, data: ReportData, figures: Mapping[str, Figure]) -> None:
    """The figures' numbers as JSON: generation, model, parent, and for each figure its marks."""
    content = {
        "generation": data.row.generation,
        "model": data.row.model,
        "parent": data.row.parent,
        "verdict": data.row.verdict,
        "figures": {name: [m.model_dump() for m in figure.marks] for name, figure in figures.items() if figure.marks},
    }
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def all_figures(data: ReportData) -> dict[str, Figure]:
    """Every figure that the generation has numbers for, by name."""
    row = data.row
    made = [_loop(row), _win_rates(row), *_production(row), _steerability(row), *_style(row)]
    made += rewards.figures(row, data.judged)
    made += optimised.figures(row.overoptimisation, no_judge(row.reward.gold_accuracy) is None)
    made += herding.figures(data.herded)
    made += [*_experiment(row), *_kept(row), *_timings(row), *_trend(data.history)]
    return {figure.name: figure for figure in made}


def _loop(row: LedgerRow) -> Figure:
    kept = {sieve.stage: f"{words.count(sieve.kept)} {sieve.what}" for sieve in row.kept}
    learnt = {name: f"{words.count(stage.examples)} {_learns(name)}" for name, stage in row.training.items()}
    user = row.win_rate.user.pointwise
    lift = row.experiment.breadth_lift if row.experiment else None
    nodes = (
        Node("Traffic", kept.get("traffic", "people chat"), 0),
        Node("Curate", kept.get("curate", "—"), 0),
        Node("Annotate", kept.get("annotate", "—"), 0),
        Node("Reward", f"{words.value(row.reward.pointwise_accuracy, words.share)} right", 1),
        Node("Best of n", kept.get("rejection_sampling", "—"), 1),
        Node("SFT", learnt.get("sft", "—"), 2),
        Node("DPO", learnt.get("dpo", "—"), 2),
        Node("RL", learnt.get("rl", "—"), 2),
        Node("Evaluate", f"wins {words.value(user, words.share)}", 3),
        Node("Gate", row.gate.decision, 3),
        Node(
            "Experiment",
            f"{words.value(lift, words.signed_share)} engage" if lift and lift.value is not None else "not run",
            3,
        ),
    )
    untried = {"ship": "no verdict yet", "hold": "held back", "reject": "rejected"}[row.gate.decision]
    said = {"promote": "promoted", "keep": "not promoted", "roll_back": "rolled back", None: untried}
    tone = {"promote": "good", "roll_back": "bad"}.get(row.verdict or "", "")
    return wheel(nodes, row.model, said[row.verdict], tone)


def _learns(stage: str) -> str:
    return {"dpo": "pairs", "rl": "replies"}.get(stage, "examples")


def _win_rates(row: LedgerRow) -> Figure:
    rates = row.win_rate
    rows = [
        Row("User prompts", rates.user.pointwise, note="pointwise judge"),
        Row("User prompts", rates.user.pairwise, note="pairwise judge"),
        Row("Internal prompts", rates.internal.pointwise, note="pointwise judge"),
        Row("Internal prompts", rates.internal.pairwise, note="pairwise judge"),
    ]
    rows = [r._replace(tone="bad" if (r.estimate.value or 0) > ALARM else beyond(r.estimate, 0.5)) for r in rows]
    figure = dot_plot("win_rate", rows, _win_axis(r.estimate for r in rows), band=IDEAL_BAND, line=ALARM, zero=0.5)
    marks = (m.model_copy(update={"label": f"{r.label}, {r.note}"}) for m, r in zip(figure.marks, rows, strict=True))
    return Figure(figure.name, figure.html, tuple(marks))


def _win_axis(rates: Iterable[Estimate]) -> Axis:
    """20 to 80%, and all of 0 to 100% only if an interval reaches further."""
    edges = [edge for rate in rates for edge in (rate.low, rate.high, rate.value) if edge is not None]
    middle = (0.2, 0.35, 0.5, 0.65, 0.8)
    return share_axis(middle if all(0.2 <= edge <= 0.8 for edge in edges) else (0.0, *middle, 1.0))


def tone_of(measured: Compared) -> Tone:
    """Good or bad only when old and new intervals do not touch and one direction is harm."""
    new, old = measured, measured.before
    if measured.worse is None or None in (new.low, new.high, old.low, old.high):
        return "new"
    rose = new.low > old.high  # type: ignore[operator]
    fell = new.high < old.low  # type: ignore[operator]
    if not rose and not fell:
        return "new"
    return "bad" if rose == (measured.worse == "up") else "good"


def _compared(label: str, measured: Compared, note: str = "") -> Row:
    return Row(label, measured, words.share, tone_of(measured), measured.before, note)


def _production(row: LedgerRow) -> list[Figure]:
    """Flaws and qualities apart: the direction that is better is then said once, and small shares get a wide axis."""
    groups = {"production_flaws": "up", "production_qualities": "down", "production_others": None}
    figures = []
    for figure, worse in groups.items():
        found = {name: m for name, m in row.production.items() if m.unit == "share" and m.worse == worse}
        if found:
            edges = [edge for m in found.values() for e in (m, m.before) for edge in (e.value, e.high)]
            axis = nice_axis(edges, lambda v: f"{100 * v:g}%", zero=True, steps=4)
            figures.append(dot_plot(figure, [_compared(words.name(name), m) for name, m in found.items()], axis))
    return figures


def _steerability(row: LedgerRow) -> Figure:
    steer = row.steerability
    rows = [
        _compared("Instructions followed", steer.instruction_following, "higher is better"),
        _compared("Replies that break one", steer.instruction_violation, "lower is better"),
    ]
    return dot_plot("steerability", rows, share_axis())


def _style(row: LedgerRow) -> list[Figure]:
    """Ratios new to old on a logarithmic axis, largest move first; features absent on one side are in the table."""
    moved = [(s, s.after / s.before) for s in row.style if s.before and s.after and s.before > 0 and s.after > 0]
    moved.sort(key=lambda pair: -max(pair[1], 1 / pair[1]))
    rows = [
        Row(
            words.name(shift.feature),
            Estimate(value=ratio, n=shift.difference.n if shift.difference else 0),
            words.times,
            "bad" if shift.alarm else "new",
            note=f"{words.number(shift.before or 0)} → {words.number(shift.after or 0)}",
        )
        for shift, ratio in moved[:STYLE_ROWS]
    ]
    axis = Axis(0.25, 4, (0.25, 0.5, 1, 2, 4), words.times, log=True)
    return [dot_plot("style", rows, axis, zero=1.0)] if rows else []


def _experiment(row: LedgerRow) -> list[Figure]:
    test = row.experiment
    if test is None:
        return []
    lifts = {"breadth_lift": test.breadth_lift, "depth_lift": test.depth_lift} | test.secondary
    rows = [
        Row(label, lift, words.signed_share, beyond(lift, 0.0) if name != "balance" else "new", note=note)
        for name, lift in lifts.items()
        for label, note in [LIFTS.get(name, (words.name(name), ""))]
    ]
    edges = [edge for lift in lifts.values() for edge in (lift.low, lift.high, lift.value)]
    figures = [dot_plot("lifts", rows, nice_axis(edges, words.signed_round, zero=True), zero=0.0)]
    days = sorted({day.day for day in test.daily})
    names = sorted({day.arm for day in test.daily}, key=lambda arm: (arm != "control", arm))
    if not days:
        return figures
    labels = [f"day {day + 1}" if day == days[0] else str(day + 1) for day in days]
    found = {(day.arm, day.day): day for day in test.daily}
    for name, title, form, measured in (
        ("daily_active", "Share of exposed people active", words.share, _active),
        ("daily_messages", "Messages for each exposed person", words.number, _messages),
    ):
        lines = [
            Series(arm, "old" if arm == "control" else "new", tuple(measured(found.get((arm, day))) for day in days))
            for arm in names
        ]
        edges = [edge for one in lines for p in one.points for edge in (p.low, p.high, p.value)]
        figures.append(curves(name, title, labels, lines, nice_axis(edges, form, steps=4)))
    return figures


def _active(day: Day | None) -> Estimate:
    if day is None or day.users == 0:
        return Estimate(value=None, n=0, reason="nobody exposed yet")
    from .. import intervals  # noqa: PLC0415 - scipy is slow to import, and `status` needs none of it

    return intervals.share([1.0] * day.active_users + [0.0] * (day.users - day.active_users))


def _messages(day: Day | None) -> Estimate:
    if day is None or day.users == 0:
        return Estimate(value=None, n=0, reason="nobody exposed yet")
    return Estimate(value=day.messages / day.users, n=day.users)


def _kept(row: LedgerRow) -> list[Figure]:
    figures = []
    for sieve in row.kept:
        reasons = sorted(sieve.dropped.items(), key=lambda item: (-item[1], item[0]))
        if reasons:
            rows = [Bar(words.name(reason), n, words.count(n)) for reason, n in reasons]
            figures.append(bars(f"dropped_{sieve.stage}", rows))
    return figures


def _timings(row: LedgerRow) -> list[Figure]:
    rows = [Bar(words.name(stage), seconds, words.duration(seconds)) for stage, seconds in row.seconds.items()]
    return [bars("seconds", rows)] if rows else []


def _trend(history: Sequence[LedgerRow]) -> list[Figure]:
    if len(history) < 2:
        return []
    labels = [row.model for row in history]
    untried = Estimate(value=None, n=0, reason="no experiment")
    lifts = tuple(row.experiment.breadth_lift if row.experiment else untried for row in history)
    depth = tuple(row.experiment.depth_lift if row.experiment else untried for row in history)
    wins = tuple(row.win_rate.user.pointwise for row in history)
    inside = tuple(row.win_rate.internal.pointwise for row in history)
    follow = tuple(_plain(row.steerability.instruction_following) for row in history)
    broken = tuple(_plain(row.steerability.instruction_violation) for row in history)

    def drawn(name: str, title: str, points: tuple[Estimate, ...], axis: Axis) -> Figure:
        return curves(name, title, labels, [Series("new", "new", points)], axis, height=170, zero=0.0, joined=False)

    def around(points: tuple[Estimate, ...], *, zero: bool = False) -> Axis:
        form = words.signed_round if zero else words.share
        return nice_axis([e for p in points for e in (p.low, p.high, p.value)], form, zero=zero, steps=4)

    return [
        drawn("trend_breadth", "Breadth lift over the parent", lifts, around(lifts, zero=True)),
        drawn("trend_depth", "Depth lift over the parent", depth, around(depth, zero=True)),
        curves(
            "trend_win_rate", "Win rate, pointwise, on user (blue) and internal (grey) prompts", labels,
            [Series("internal", "old", inside), Series("user", "new", wins)],
            _win_axis((*wins, *inside)), height=170, zero=0.5, band=IDEAL_BAND,
        ),
        curves(
            "trend_steerability", "Instructions followed (blue), replies that break one (grey)", labels,
            [Series("violation", "old", broken), Series("following", "new", follow)], share_axis(), height=170,
        ),
    ]  # fmt: skip


def _plain(measured: Compared) -> Estimate:
    return Estimate(**measured.model_dump(include=set(Estimate.model_fields)))
