"""What preference models cannot learn from, taken out by name and never in silence (PAPER section 3)."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import FlywheelError
from ..records import Dropped, Preference
from .format import Form

STAGE = "reward"


class Screened(NamedTuple):
    """Pairs that can be learnt from or judged on, and the others with reasons."""

    kept: list[Preference]
    dropped: list[Dropped]

    @property
    def reasons(self) -> dict[str, int]:
        """How many pairs were dropped for each reason."""
        return dict(sorted(Counter(row.reason for row in self.dropped).items()))


def screen(pairs: Sequence[Preference], form: Form | None = None) -> Screened:
    """Drop pairs that say nothing: `empty_reply`, `equal_replies`, and with `form`, which reads them, also
    `equal_as_read` (they differ only beyond `max_reply_tokens` or in what the tokenizer cannot tell apart) and
    `prompt_too_long` (the system prompt leaves the history no room)."""
    kept: list[Preference] = []
    dropped: list[Dropped] = []
    for pair in pairs:
        reason, detail = _reason(pair, form)
        if reason:
            dropped.append(Dropped(id=pair.id, stage=STAGE, reason=reason, detail=detail, prompt_id=pair.prompt_id))
        else:
            kept.append(pair)
    return Screened(kept, dropped)


def check_trainable(training: Sequence[Preference], reasons: dict[str, int]) -> None:
    """Raise FlywheelError where training pairs cannot teach: there is none, or all are undecided."""
    if not training:
        why = ", ".join(f"{reason} {n}" for reason, n in reasons.items()) or "none"
        raise FlywheelError(f"no preference pairs to train on (dropped: {why}): annotate more prompts.")
    if all(pair.label == 0.5 for pair in training):
        raise FlywheelError(
            f"all {len(training)} training pairs are undecided (label 0.5): there is one class only; ask more "
            "reviewers (annotate.reviewers) or annotate more prompts."
        )


def _reason(pair: Preference, form: Form | None) -> tuple[str, str]:
    sides = [side[-1].content.strip() if side else "" for side in (pair.chosen, pair.rejected)]
    for name, text in zip(("chosen", "rejected"), sides, strict=True):
        if not text:
            return "empty_reply", name
    if sides[0] == sides[1]:
        return "equal_replies", ""
    if form is None:
        return "", ""
    if form.reply(pair.chosen[-1].content) == form.reply(pair.rejected[-1].content):
        return "equal_as_read", f"up to {form.max_reply_tokens} tokens"
    try:
        form.prompt(pair.prompt)
    except FlywheelError as error:
        return "prompt_too_long", str(error)
    return "", ""
