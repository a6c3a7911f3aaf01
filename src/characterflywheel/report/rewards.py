"""The section on reward models: where they can be trusted and where not, from the reward stage's own report.

Filled dots are measurements with their intervals; the upright tick beside a dot is what a reader should compare it
with: preferring the longer reply, picking at random, or the reviewers' own lean.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from markupsafe import Markup
from pydantic import ValidationError

from ..ledger import LedgerRow
from ..records import Estimate
from ..reward.summary import (
    Calibration,
    CalibrationError,
    Cell,
    Dimension,
    Lean,
    PreferenceEvaluation,
    RewardSummary,
    Slice,
    no_judge,
)
from . import words
from .figures import Axis, Bar, Figure, Mark, Row, Tone, bars, beyond, dot_plot, mark, nice_axis, share_axis

if TYPE_CHECKING:
    from ..reward.signals import SignalReport

DIMENSIONS: dict[Dimension, str] = {
    "agreement": "how many reviewed it", "strength": "how strongly they preferred", "length": "which reply is longer",
    "source": "whose prompt", "policy": "who wrote the replies", "character": "character",
}  # fmt: skip
NAMES = {
    "single": "One review", "consensus": "Several, all agree", "divided": "Several, divided", "slight": "Slightly",
    "clear": "Clearly", "strong": "Strongly", "similar": "Equally long", "chosen longer": "Chosen is longer",
    "chosen shorter": "Chosen is shorter",
}  # fmt: skip
PARTS: dict[str, tuple[Dimension, ...]] = {
    "slices": ("agreement", "strength", "length", "source", "policy"),
    "characters": ("character",),
}
LEANS = 12
HEIGHT, TOP, BOTTOM, LEFT, RIGHT = 230, 12, 206, 10.0, 97.0


class Judged(NamedTuple):
    """The reward stage's report and those of its signal models; `missing` says why there is none."""

    summary: RewardSummary | None
    signals: Mapping[str, "SignalReport"]
    missing: str = ""


def load(workspace: Path, row: LedgerRow) -> Judged:
    """What the reward stage of a generation wrote beside its models; an older version's is told, not guessed at."""
    folder = workspace / "artifacts" / row.stages.get("reward", "")
    if not (folder / "evaluation.json").exists():
        return Judged(None, {}, "The reward stage's own report is not in this workspace, so only its totals are shown.")
    try:
        summary = RewardSummary.model_validate_json((folder / "evaluation.json").read_text(encoding="utf-8"))
    except ValidationError:
        old = "An older version judged these reward models: what they lean on, how they are calibrated and where they "
        return Judged(None, {}, old + "fail was not measured then. A new generation will show it.")
    return Judged(summary, _signals(folder / "signals.json"))


def _signals(path: Path) -> dict[str, "SignalReport"]:
    from ..reward.signals import SignalReport  # noqa: PLC0415 - scipy is slow to import

    try:
        reports = json.loads(path.read_text(encoding="utf-8"))["reports"]
        return {kind: SignalReport.model_validate(report) for kind, report in sorted(reports.items())}
    except (OSError, KeyError, ValidationError):
        return {}


def figures(row: LedgerRow, judged: Judged) -> list[Figure]:
    """Every figure of the section that there are numbers for."""
    summary = judged.summary
    made = [_totals(row, summary), *_signal_aucs(row)]
    if summary is None:
        return made
    made += _slices(summary)
    made += [
        _reliability(f"reward_reliability_{name}", title, one.calibration)
        for name, title, one in (
            ("pointwise", "Pointwise model", summary.pointwise), ("pairwise", "Pairwise model", summary.pairwise),
        )
        if one.calibration is not None
    ]  # fmt: skip
    made += _leans(summary.pointwise.leans)
    made += _matrix(summary.history)
    if summary.dropped:
        reasons = sorted(summary.dropped.items(), key=lambda item: (-item[1], item[0]))
        made.append(bars("reward_dropped", [Bar(words.name(reason), n, words.count(n)) for reason, n in reasons]))
    return made


def _totals(row: LedgerRow, summary: RewardSummary | None) -> Figure:
    quality = row.reward
    rows = [
        Row("Pointwise model", quality.pointwise_accuracy, note="drives training"),
        Row("Pairwise model", quality.pairwise_accuracy, note="guards against gaming"),
    ]
    if quality.gold_accuracy is not None:
        rows.append(Row("Gold model", quality.gold_accuracy, note="watches over-optimisation"))
    rows = [one._replace(tone=beyond(one.estimate, 0.5)) for one in rows]
    if summary is not None:
        judged = (summary.pointwise, summary.pairwise, summary.gold)
        ticks = [found.longer_wins.value if found else None for found in judged]
        rows = [one._replace(tick=tick) for one, tick in zip(rows, ticks, strict=False)]
        best, swap = summary.pointwise.best_of_n, summary.pairwise.swap_consistency
        if best is not None:
            chance = "" if best.chance is None else f"pointwise; chance {words.share(best.chance)}"
            name = "Best of n" if best.replies is None else f"Best of {best.replies:.3g}"
            tone = "new" if best.chance is None else beyond(best.accuracy, best.chance)
            rows.append(Row(f"{name} is the reviewers’", best.accuracy, note=chance, tick=best.chance, tone=tone))
        if swap is not None:
            rows.append(Row("Steady when swapped", swap, note="pairwise"))
        rows.append(Row("Both models agree", summary.models_agree))
    return dot_plot("reward_accuracy", rows, _shares(rows), zero=0.5)


def _shares(rows: Sequence[Row]) -> Axis:
    known = [v for one in rows for v in (one.estimate.low, one.estimate.value, one.tick) if v is not None]
    return share_axis((0.25, 0.5, 0.75, 1.0) if min(known, default=0.5) >= 0.25 else (0.0, 0.25, 0.5, 0.75, 1.0))


def _signal_aucs(row: LedgerRow) -> list[Figure]:
    rows = []
    for name, signal in row.reward.signals.items():
        low, high = signal.interval or (None, None)
        estimate = Estimate(value=signal.auc, low=low, high=high, n=signal.n, reason=signal.reason)
        used = "helps to select" if signal.usable else "not used"
        rows.append(Row(signal_name(name), estimate, words.number, beyond(estimate, 0.5), note=used))
    return [dot_plot("reward_signals", rows, _shares(rows)._replace(form=words.number), zero=0.5)] if rows else []


def signal_name(kind: str) -> str:
    """`thumb_up` is p(thumb up)."""
    return f"p({kind.replace('_', ' ')})"


def _slices(summary: RewardSummary) -> list[Figure]:
    """Slices of the pointwise model, characters apart, and the same of the pairwise one."""
    found = []
    for model, evaluation in (("pointwise", summary.pointwise), ("pairwise", summary.pairwise)):
        for part, chosen in PARTS.items():
            rows = _slice_rows(evaluation, chosen)
            if rows:
                figure = dot_plot(f"reward_{part}_{model}", rows, _shares(rows), zero=0.5)
                rule = [mark("longer wins", s.name, s.longer_wins) for s in evaluation.slices if s.dimension in chosen]
                found.append(Figure(figure.name, figure.html, (*figure.marks, *rule)))
    return found


def _slice_rows(evaluation: PreferenceEvaluation, chosen: Sequence[Dimension]) -> list[Row]:
    return [
        Row(
            NAMES.get(one.name, words.name(one.name)), one.accuracy, tone=beyond(one.accuracy, 0.5),
            note=DIMENSIONS[dimension] if at == 0 and dimension != "character" else "", tick=one.longer_wins.value,
        )
        for dimension in chosen
        for at, one in enumerate(sorted(evaluation.by(dimension).values(), key=_place))
    ]  # fmt: skip


def _place(one: Slice) -> tuple[int, str]:
    return (list(NAMES).index(one.name) if one.name in NAMES else len(NAMES)), one.name


def _leans(leans: Sequence[Lean]) -> list[Figure]:
    """The strongest leans within prompts; red where told from chance and beyond the reviewers' own interval."""
    known = [one for one in leans if one.within.value is not None]
    if not known:
        return []
    rows = [
        Row(words.name(one.feature), one.within, words.score, _lean_tone(one), tick=one.reviewers.value)
        for one in known[:LEANS]
    ]
    edges = [edge for one in rows for edge in (one.estimate.low, one.estimate.high, one.estimate.value, one.tick)]
    figure = dot_plot("reward_leans", rows, nice_axis(edges, words.score, zero=True), zero=0.0)
    series = (("within prompts", "within"), ("reviewers", "reviewers"), ("over all replies", "raw"))
    marks = [mark(name, one.feature, getattr(one, field)) for one in known for name, field in series]
    return [Figure(figure.name, figure.html, tuple(marks))]


def _lean_tone(lean: Lean) -> Tone:
    if not lean.flagged:
        return "old"
    mine, theirs = lean.within, lean.reviewers
    if None in (mine.low, mine.high, theirs.low, theirs.high):
        return "new"
    apart = mine.low > theirs.high or mine.high < theirs.low  # type: ignore[operator]
    return "bad" if apart else "new"


def _reliability(name: str, title: str, found: Calibration) -> Figure:
    """Confidence across, agreeing reviewers up: as trained (hollow) and with its temperature (filled)."""

    def x(confidence: float) -> float:
        return LEFT + (RIGHT - LEFT) * (confidence - 0.5) / 0.5

    def y(share: float) -> float:
        return BOTTOM - share * (BOTTOM - TOP)

    parts: list[Markup] = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(Markup('<line class="grid" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>').format(y(tick)))
        parts.append(Markup('<text x="0" y="{:.1f}">{}</text>').format(y(tick) - 4, f"{100 * tick:g}%"))
    line = '<line class="zero" x1="{:.1f}%" x2="{:.1f}%" y1="{:.1f}" y2="{:.1f}"/>'
    parts.append(Markup(line).format(x(0.5), x(1.0), y(0.5), y(1.0)))
    marks: list[Mark] = []
    for series, tone, bins in (
        ("as trained", "old", found.reliability_before), ("with temperature", "new", found.reliability_after),
    ):  # fmt: skip
        for one in bins:
            marks.append(mark(series, f"confidence {words.share(one.confidence)}", one.agree))
            at, agree = x(one.confidence), one.agree
            if agree.low is not None and agree.high is not None:
                span = '<line class="span {}" x1="{:.2f}%" x2="{:.2f}%" y1="{:.1f}" y2="{:.1f}"/>'
                parts.append(Markup(span).format(tone, at, at, y(agree.low), y(agree.high)))
            dot = '<circle class="dot {}" cx="{:.2f}%" cy="{:.1f}" r="{}"/>'
            parts.append(Markup(dot).format(tone, at, y(agree.value or 0.0), 4 if tone == "old" else 5))
    for tick in (0.5, 0.75, 1.0):
        anchor = "end" if tick == 1 else "middle"
        label = '<text x="{:.1f}%" y="{}" text-anchor="{}">{}</text>'
        parts.append(Markup(label).format(x(tick), HEIGHT - 6, anchor, f"{100 * tick:g}% sure"))
    html = Markup(
        '<figure class="panel"><figcaption>{}</figcaption><svg height="{}" role="img" aria-label="{}">{}</svg></figure>'
    )
    marks += [
        mark("as trained", "calibration error", found.before.error),
        mark("with temperature", "calibration error", found.after.error),
    ]
    return Figure(name, html.format(title, HEIGHT, f"Reliability, {title}", Markup("").join(parts)), tuple(marks))


def calibration_sentence(name: str, found: Calibration | None) -> str:
    """The errors before and after, and what chance alone makes of so many pairs."""
    if found is None or found.after.error.value is None:
        return f"{name}: calibration is not known; pairs of at least two users are needed."
    chance = found.in_use.by_chance
    kept = "" if found.kept else " In use is the first: the temperature does not lower the log loss on other users."
    by_chance = f" A perfectly calibrated model would show {chance:.3f} by chance." if chance is not None else ""
    return (
        f"{name}: expected calibration error {_error(found.before)} as trained, {_error(found.after)} with temperature "
        f"{words.number(found.temperature)} (n {words.count(found.after.error.n)}).{kept}{by_chance}"
    )


def gold_sentence(summary: RewardSummary) -> str:
    """What the gold model is worth as a judge of the others; nothing where there is none."""
    if summary.gold is None:
        return ""
    doubt, calibration = no_judge(summary.gold.accuracy), summary.gold.calibration
    told = ""
    if calibration is not None and calibration.before.error.value is not None:
        told = f" Its expected calibration error is {_error(calibration.before)} as trained."
    if doubt is not None:
        return f"{doubt[0].upper()}{doubt[1:]}: what it says of over-optimisation counts as not measured.{told}"
    accuracy = summary.gold.accuracy
    found = f"{words.share(accuracy.value or 0.0)} ({words.interval(accuracy, words.share)})"
    return f"The gold model, which only watches the others, is right on {found} of the same pairs.{told}"


def _error(found: CalibrationError) -> str:
    error = found.error
    span = "" if error.low is None or error.high is None else f" ({error.low:.3f} to {error.high:.3f})"
    return f"{error.value:.3f}{span}"


def comparison_sentence(summary: RewardSummary) -> str:
    """What the model knows beyond length, and what it thinks of the first place."""
    over, bias, told = summary.pointwise.over_longer, summary.pairwise.first_bias, []
    if over.value is not None:
        side = "above" if over.value >= 0 else "below"
        told.append(f"The pointwise model’s accuracy is {_points(over)} {side} that of preferring the longer reply.")
    if bias is not None and bias.value is not None:
        place = "first" if bias.value >= 0 else "second"
        told.append(f"The pairwise model favours the reply it reads {place} by {_points(bias)}; both orders are read.")
    return " ".join(told)


def _points(estimate: Estimate) -> str:
    """The size of a difference of shares, with its interval turned to the same side."""
    value = estimate.value or 0.0
    edges = sorted(100 * edge * (1 if value >= 0 else -1) for edge in (estimate.low, estimate.high) if edge is not None)
    span = f" ({edges[0]:.1f} to {edges[1]:.1f})" if len(edges) == 2 else ""
    return f"{abs(100 * value):.1f} points{span}".replace("-", "−")


def _matrix(cells: Sequence[Cell]) -> list[Figure]:
    """Models down, frozen pairs across; the cell beside the diagonal is the accuracy on the new policy's replies."""
    numbers = sorted({cell.models for cell in cells})
    if len(numbers) < 2:
        return []
    found = {(cell.models, cell.pairs): cell for cell in cells}
    head = Markup("").join(Markup('<th class="n">pairs of gen {}</th>').format(number) for number in numbers)
    lines = []
    for models in numbers:
        row = Markup("").join(_heat(found.get((models, pairs))) for pairs in numbers)
        lines.append(Markup('<tr><th scope="row">models of gen {}</th>{}</tr>').format(models, row))
    html = Markup(
        '<div class="scroll"><table class="heat"><thead><tr><th></th>{}</tr></thead><tbody>{}</tbody></table></div>'
    )
    marks = [
        mark(model, f"models {cell.models}, pairs {cell.pairs} ({cell.standing})", estimate)
        for cell in cells
        for model, estimate in (("pointwise", cell.pointwise), ("pairwise", cell.pairwise))
    ]
    return [Figure("reward_history", html.format(head, Markup("").join(lines)), tuple(marks))]


def _heat(cell: Cell | None) -> Markup:
    if cell is None or cell.pointwise.value is None:
        why = "not measured" if cell is None else cell.pointwise.reason or "not measured"
        return Markup('<td class="n"><small>{}</small></td>').format(why)
    value, span = cell.pointwise.value, words.interval(cell.pointwise, words.share)
    strength = round(100 * min(1.0, max(0.0, 2 * (value - 0.5))))
    small = f"{span} · n {cell.pointwise.n}"
    name = {"own": "", "next": "new policy", "past": "", "later": ""}[cell.standing]
    template = (
        '<td class="n {}" style="--heat:{}%"><b>{}</b><small>{}</small><small>pairwise {}</small><small>{}</small></td>'
    )
    return Markup(template).format(
        cell.standing, strength // 2, words.share(value), small, words.value(cell.pairwise, words.share), name
    )
