"""The section on herding: what selection kept, what SFT learnt from, and the courses of SFT, DPO and RL (PAPER 4).

All of it is bookkeeping of one run. Whether the new model is better is for the judges and the experiment to say.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

from markupsafe import Markup

from . import words
from .figures import Bar, Figure, Mark, Row, Tone, bars, dot_plot, nice_axis
from .lines import Line, Panel, panels
from .runs import RLLine, Runs, Scored, TuningLine

BINS, HEIGHT, TOP, BOTTOM, LEFT, RIGHT = 24, 190, 14, 166, 9.0, 97.0
NEVER = {"empty": "empty", "cut_off": "cut off", "repeated": "repeated", "unsafe": "unsafe"}
"""Reasons for which a reply is never accepted, whatever its score."""
KINDS: tuple[tuple[Literal["policy", "character", "source"], str], ...] = (
    ("policy", "selection_policies"), ("character", "selection_characters"), ("source", "selection_sources"),
)  # fmt: skip


def figures(runs: Runs) -> list[Figure]:
    """Every figure of the section that there are numbers for."""
    made = [*_acceptance(runs), *_scores(runs), *_mixture(runs), *_held_out(runs)]
    for name, several in (("tuning", _tuning(runs)), ("climbing", list(_climbing(runs)))):
        drawn = [one for one in several if any(line.points for line in one.lines)]
        if drawn:
            made.append(panels(name, drawn))
    return made


def selection_sentence(runs: Runs) -> str:
    """What selection took, and by how much the taken beat their neighbours."""
    found = runs.selected
    if found is None:
        return "What rejection sampling drew is not in this workspace."
    took = (
        f"{words.count(found.accepted)} of {words.count(found.candidates)} replies to "
        f"{words.count(found.prompts)} prompts were accepted."
    )
    if found.lift is None or found.lift.value is None:
        return took
    span = words.interval(found.lift, words.score)
    return f"{took} An accepted reply scores {words.score(found.lift.value)} ({span}) over its prompt’s mean."


def sft_sentence(runs: Runs) -> str:
    """How the held-out loss was measured, or why not, and which step's weights were kept."""
    found = runs.tuned
    if found is None:
        return "SFT’s own record is not in this workspace."
    if found.kept_step is not None and 0 < found.kept_step < found.steps:
        return (
            f"The weights kept are those after step {found.kept_step} of {found.steps}, where the loss on held-out "
            "people was least (upright line)."
        )
    return f"Loss on held-out people was not measured: {found.not_evaluated}." if found.not_evaluated else ""


def rl_sentences(runs: Runs) -> list[str]:
    """Groups that taught nothing, and an early end."""
    found = runs.climbed
    if found is None:
        return ["RL’s own record is not in this workspace."]
    told = []
    if found.prompts:
        told.append(
            f"{words.count(found.equal_groups)} of {words.count(found.prompts)} groups of replies had one reward and "
            f"taught nothing; {words.count(found.rollouts)} replies were drawn in {words.count(found.steps)} steps."
        )
    if found.stopped is not None:
        late = found.stopped.step > found.steps
        how = "Went back after the last step" if late else f"Stopped at step {found.stopped.step}"
        told.append(f"{how}: {found.stopped.why}. The model kept is the one that drew step {found.stopped.kept_step}.")
    if not runs.bounds.every:
        told.append("Nobody looked for over-optimisation while it ran.")
    elif not found.alarms:
        told.append("No alarm rang.")
    return told


def _acceptance(runs: Runs) -> Iterator[Figure]:
    for by, name in KINDS:
        rows = [
            Row(words.name(one.name), one.share, note=f"{words.count(one.accepted)} of {words.count(one.drawn)}")
            for one in sorted(runs.acceptance, key=lambda one: (-(one.share.value or 0.0), one.name))
            if one.by == by
        ]
        if rows:
            edges = [edge for one in rows for edge in (one.estimate.value, one.estimate.high)]
            axis = nice_axis(edges, lambda v: f"{100 * v:g}%", zero=True, steps=4)
            yield dot_plot(name, rows, axis)


def _scores(runs: Runs) -> Iterator[Figure]:
    """How many candidates of each score: accepted at the bottom, passed over, and those never to be accepted on top."""
    if not runs.scores:
        return
    values = [one.score for one in runs.scores]
    axis = nice_axis(values, words.score, steps=4)
    width = (axis.high - axis.low) / BINS
    stacks: dict[str, Counter[int]] = {"accepted": Counter(), "passed over": Counter(), "never": Counter()}
    for one in runs.scores:
        place = min(BINS - 1, max(0, math.floor((one.score - axis.low) / width)))
        stacks[_fate(one)][place] += 1
    most = max(sum(stack[i] for stack in stacks.values()) for i in range(BINS))
    up = nice_axis([0, most], words.number, zero=True, steps=3)

    def x(score: float) -> float:
        return LEFT + (RIGHT - LEFT) * axis.at(score) / 100

    def y(count: float) -> float:
        return BOTTOM - up.at(count) / 100 * (BOTTOM - TOP)

    parts = []
    for tick in up.ticks:
        parts.append(Markup('<line class="grid" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>').format(y(tick)))
        parts.append(Markup('<text x="0" y="{:.1f}">{}</text>').format(y(tick) - 4, up.form(tick)))
    for i in range(BINS):
        below = 0
        for fate, stack in stacks.items():
            if stack[i]:
                rect = '<rect class="bin {}" x="{:.2f}%" width="{:.2f}%" y="{:.1f}" height="{:.1f}"/>'
                left, right = x(axis.low + i * width), x(axis.low + (i + 1) * width)
                top, foot = y(below + stack[i]), y(below)
                parts.append(Markup(rect).format(fate.split()[0], left + 0.15, right - left - 0.3, top, foot - top))
                below += stack[i]
    threshold = runs.selected.threshold if runs.selected else None
    if threshold is not None:
        line = '<line class="kept" x1="{0:.2f}%" x2="{0:.2f}%" y1="{1}" y2="{2}"/>'
        parts.append(Markup(line).format(x(threshold), TOP - 6, BOTTOM))
    for tick in axis.ticks:
        anchor = "end" if x(tick) > 95 else "middle"
        text = '<text x="{:.2f}%" y="{}" text-anchor="{}">{}</text>'
        parts.append(Markup(text).format(x(tick), HEIGHT - 6, anchor, axis.form(tick)))
    said = ", ".join(f"{sum(stack.values())} {fate}" for fate, stack in stacks.items())
    html = Markup('<svg class="histogram" height="{}" role="img" aria-label="{}">{}</svg>').format(
        HEIGHT, f"Composite scores of {len(values)} candidates: {said}", Markup("").join(parts)
    )
    edges = [(axis.low + i * width, axis.low + (i + 1) * width) for i in range(BINS)]
    marks = [
        Mark(series=fate, label=f"score {low:.2f} to {high:.2f}", value=stack[i])
        for fate, stack in stacks.items() for i, (low, high) in enumerate(edges) if stack[i]
    ]  # fmt: skip
    yield Figure("selection_scores", html, tuple(marks))


def _fate(one: Scored) -> str:
    if one.accepted:
        return "accepted"
    return "never" if one.reason in NEVER else "passed over"


def _mixture(runs: Runs) -> Iterator[Figure]:
    """What was learnt from, in `unit`."""
    counted = unit(runs) == "tokens"
    amounts = [((one.tokens or 0) if counted else one.drawn, one.source) for one in runs.sources if one.drawn]
    if amounts:
        rows = [Bar(words.name(source), float(n), words.count(n)) for n, source in sorted(amounts, reverse=True)]
        yield bars("mixture", rows)


def unit(runs: Runs) -> Literal["tokens", "examples"]:
    """What the mixture is told in: tokens where every source has them counted."""
    return "tokens" if all(one.tokens is not None for one in runs.sources if one.drawn) else "examples"


def _held_out(runs: Runs) -> Iterator[Figure]:
    """Loss on held-out users' examples, before (hollow) and after SFT; lower is better."""
    found = runs.tuned.evaluation if runs.tuned else ()
    if not found:
        return
    rows = [
        Row(
            "Every source" if one.source == "all" else words.name(one.source), one.after, _loss, before=one.before,
            note=f"{words.count(one.examples)} examples",
        )
        for one in found
    ]  # fmt: skip
    edges = [edge for row in rows for e in (row.estimate, row.before) if e for edge in (e.value, e.low, e.high)]
    yield dot_plot("held_out_loss", rows, nice_axis(edges, _loss, steps=5))


def _loss(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _tuning(runs: Runs) -> list[Panel]:
    """Losses of SFT and DPO, and how often DPO's implicit reward ranks pairs right; beside them held-out people's."""
    kept = runs.tuned.kept_step if runs.tuned else None
    early = runs.tuned is not None and kept is not None and 0 < kept < runs.tuned.steps

    def of(rows: Sequence[TuningLine], name: str) -> tuple[Line, Line]:
        trained = _line(rows, "training", "old", lambda r: getattr(r, name))
        return trained, _line(rows, "held out", "new", lambda r: getattr(r, f"evaluation_{name}"))

    return [
        Panel("sft", "SFT loss, nats a token", of(runs.sft, "loss"), _loss, chosen=kept if early else None),
        Panel("dpo", "DPO loss", of(runs.dpo, "loss"), _loss, zero=math.log(2)),
        Panel("dpo", "DPO, pairs ranked right", of(runs.dpo, "accuracy"), _percent, zero=0.5),
    ]


def _climbing(runs: Runs) -> Iterator[Panel]:
    """RL by step. A panel's red lines across are bounds, upright ones alarms that rang of this measure."""
    rows, bounds = runs.rl, runs.bounds

    def line(name: str, read: Callable[[RLLine], float | None], tone: Tone = "new") -> Line:
        return _line(rows, name, tone, read)

    def panel(title: str, *lines: Line, rang: str = "", **more: Any) -> Panel:
        return Panel("rl", title, lines, alarms=_rang(runs, rang), **more)

    apart = any(r.score is not None and r.reward is not None and abs(r.score - r.reward) > 1e-9 for r in rows)
    alone = line("without its terms", lambda r: r.score if apart else None, "old")
    yield panel("Reward", alone, line("with them", lambda r: r.reward), form=words.score)
    for name, read in TERMS.items():
        if any(read(r) for r in rows):
            yield panel(f"Of the reward: {name}, before its weight", line(name, read), form=words.score)
    for name, read in SHARES.items():
        if any(read(r) for r in rows):
            yield panel(f"Replies {name}", line(name, read), form=_percent, floor=True)
    start = line("KL to the start", lambda r: r.kl_to_start)
    yield panel("KL to the start, nats a reply", start, rang="kl", zero=0.0, bound=_near(bounds.kl_max, start))
    if any(r.kl for r in rows):
        yield panel("KL term of the loss, nats a token", line("KL term", lambda r: r.kl), floor=True)
    won = line("win rate", lambda r: r.win_rate)
    yield panel("Win rate over the start, by the reward", won, rang="win_rate", form=_percent, zero=0.5,
                bound=bounds.win_rate_max)  # fmt: skip
    gold = line("gold model", lambda r: r.gold_gain)
    if gold.points:
        climbed = line("the model climbed", lambda r: r.score_gain, "old")
        yield panel("Score over the start", climbed, gold, rang="gold", form=words.score, zero=0.0)
    yield panel("Entropy of the next token, nats", line("entropy", lambda r: r.entropy), rang="entropy", floor=True)
    yield panel("Words a reply", line("words", lambda r: r.words), rang="words", floor=True)
    used = line("effective share", lambda r: r.effective_share)
    yield panel("Effective share of samples after importance weights", used, form=_percent)
    if runs.climbed and runs.climbed.steps and runs.climbed.prompts and runs.climbed.equal_groups:
        groups = runs.climbed.prompts / runs.climbed.steps
        equal = line("equal groups", lambda r: None if r.equal_groups is None else r.equal_groups / groups)
        yield panel("Groups of equal rewards, which teach nothing", equal, form=_percent, floor=True)


TERMS: dict[str, Callable[[RLLine], float | None]] = {
    "length": lambda r: r.length_term, "repetition": lambda r: r.repetition_term, "style": lambda r: r.style_term,
}  # fmt: skip
SHARES: dict[str, Callable[[RLLine], float | None]] = {
    "refused by safety": lambda r: r.vetoed_share, "cut off": lambda r: r.cut_off_share,
}  # fmt: skip


def _rang(runs: Runs, kind: str) -> tuple[float, ...]:
    """Steps at which an alarm of a kind, or of a style feature, began to ring."""
    alarms = runs.climbed.alarms if runs.climbed else ()
    return tuple(sorted({float(one.step) for one in alarms if kind in (one.kind, one.feature)}))


def _near(bound: float | None, line: Line) -> float | None:
    """A bound that the line has come near; one far away would press the line flat."""
    return bound if bound is not None and any(value > bound / 2 for _, value in line.points) else None


def _percent(value: float) -> str:
    return f"{100 * value:g}%"


L = TypeVar("L", TuningLine, RLLine)


def _line(rows: Sequence[L], name: str, tone: Tone, read: Callable[[L], float | None]) -> Line:
    """A measure at every step that has it."""
    found = ((row.step, read(row)) for row in rows)
    return Line(name, tone, tuple((step, value) for step, value in found if value is not None))
