"""What happened, in plain sentences that claim no more than the intervals allow (PAPER sections 7 and 8).

A generation is called better only when the experiment promoted it, worse only when it was rolled back, and
otherwise not known. A lift whose interval holds zero is never told as a lift.
"""

from dataclasses import dataclass
from typing import Literal

from ..ledger import Experiment, LedgerRow
from ..records import Estimate
from . import words

Tone = Literal["better", "worse", "unknown"]


@dataclass(frozen=True)
class Headline:
    """One sentence, those that explain it, and its tone."""

    tone: Tone
    sentence: str
    details: tuple[str, ...]


def headline(row: LedgerRow) -> Headline:
    """The generation in one honest sentence."""
    if row.experiment is None:
        return _untried(row)
    experiment = row.experiment
    details = [lift_sentence("breadth", experiment.breadth_lift, row.parent, experiment.confidence)]
    details.append(lift_sentence("depth", experiment.depth_lift, row.parent, experiment.confidence))
    if row.gate.decision == "hold":
        open_ = sum(criterion.passed is not True for criterion in row.gate.criteria)
        details.append(
            f"The gate held {row.model} back: {open_} of its {len(row.gate.criteria)} criteria did not pass. This "
            "workspace lets users decide about what is held."
        )
    if row.verdict_reason and row.verdict != "promote":
        details.append(words.sentence(row.verdict_reason))
    if row.verdict == "promote":
        return Headline("better", f"{row.model} is better company than {row.parent}.", tuple(details))
    if row.verdict == "roll_back":
        return Headline("worse", f"{row.model} is worse company than {row.parent}.", tuple(details))
    question = f"Whether {row.model} is better company than {row.parent} is not known."
    return Headline("unknown", question, tuple(details))


def _untried(row: LedgerRow) -> Headline:
    reason = words.sentence(row.gate.reason or row.verdict_reason)
    if row.gate.decision == "ship":
        return Headline(
            "unknown", f"{row.model} passed the gate; people have not tried it yet.", (reason,) if reason else ()
        )
    held = "held back" if row.gate.decision == "hold" else "rejected"
    failed = [c.name.replace("_", " ") for c in row.gate.criteria if c.passed is False]
    unmeasured = [c.name.replace("_", " ") for c in row.gate.criteria if c.passed is None]
    details = [reason] if reason else []
    if failed and not reason:
        details.append(f"It missed {_listed(failed)}.")
    if unmeasured:
        details.append(f"Not measured, so not passed: {_listed(unmeasured)}.")
    details.append(f"{row.parent} stays in service; whether people would have liked {row.model} is not known.")
    return Headline("unknown", f"{row.model} was {held} before anyone met it.", tuple(details))


def lift_sentence(what: Literal["breadth", "depth"], lift: Estimate, parent: str, confidence: float) -> str:
    """A lift told so that its interval decides the words: more, fewer, or no difference that can be seen."""
    if lift.value is None:
        subject = "How many people engage" if what == "breadth" else "How much they write"
        return f"{subject} is not known: {lift.reason or 'not measured'}."
    span = words.interval(lift, words.signed_share)
    about = f"{100 * confidence:g}% interval {span}" if span else "no interval"
    if lift.low is None or lift.high is None or lift.low <= 0 <= lift.high:
        subject = "how many people engage" if what == "breadth" else "how much they then write"
        return f"No difference in {subject} that this test can see: {words.signed_share(lift.value)} ({about})."
    change = f"{words.share(abs(lift.value))} {'more' if lift.value > 0 else 'fewer'}"
    if what == "breadth":
        return f"{change} people engaged than with {parent} ({about})."
    return f"Those who engaged wrote {change} messages than with {parent} ({about})."


def truth_sentence(row: LedgerRow) -> str | None:
    """Whether the lifts that truly exist in the embedded world lie inside the intervals that were reported."""
    if row.truth is None or row.experiment is None:
        return words.sentence(row.truth.note) if row.truth and row.truth.note else None
    parts = []
    pairs = (
        ("breadth", row.truth.breadth_lift, row.experiment.breadth_lift),
        ("depth", row.truth.depth_lift, row.experiment.depth_lift),
    )
    for label, true, reported in pairs:
        if true is not None and reported.low is not None and reported.high is not None:
            where = "inside" if reported.low <= true <= reported.high else "outside"
            parts.append(f"the true {label} lift is {words.signed_share(true)}, {where} the interval reported")
    told = words.sentence("; ".join(parts))
    return " ".join(filter(None, [told, words.sentence(row.truth.note)])) or None


def srm_sentence(experiment: Experiment) -> str:
    """The sample-ratio check, first because nothing after it counts when it fails."""
    if experiment.srm_p is None:
        return "Sample ratio: not checked."
    p = f"p = {experiment.srm_p:.2g}" if experiment.srm_p >= 0.0001 else "p < 0.0001"
    if experiment.srm_p < 0.001:
        return f"Sample ratio: the arms' sizes do not fit their shares ({p}), so this comparison cannot be trusted."
    return f"Sample ratio: the arms' sizes fit their shares ({p})."


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
