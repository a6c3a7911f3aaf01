"""Replies in their context, and the comparison of two models on the same prompts, as offline evaluation needs them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from .. import intervals
from ..ledger import Compared
from ..records import Character, Estimate, Prompt

Worse = Literal["up", "down"] | None


class Answer(NamedTuple):
    """One model's reply to one prompt, with the character that should have given it."""

    prompt: Prompt
    character: Character
    text: str
    tokens: int
    finish_reason: Literal["stop", "length"]

    @property
    def said(self) -> str:
        """The user's last message."""
        return next((m.content for m in reversed(self.prompt.messages) if m.role == "user"), "")


class Comparison(NamedTuple):
    """A measurement of both models, and the new one's less the old one's with its paired interval."""

    both: Compared
    change: Estimate


def compare_shares(old: Sequence[float], new: Sequence[float], users: Sequence[str], worse: Worse) -> Comparison:
    """Shares of paired rows (0 to 1 each) with Wilson intervals clustered by user."""
    return _compare(intervals.share(old, users), intervals.share(new, users), old, new, worse)


def compare_means(
    old: Sequence[float], new: Sequence[float], users: Sequence[str], worse: Worse, *, unit: str
) -> Comparison:
    """Means of paired rows in `unit` with Student's intervals clustered by user."""
    both, change = _compare(intervals.mean(old, users), intervals.mean(new, users), old, new, worse)
    return Comparison(both.model_copy(update={"unit": unit}), change)


def _compare(before: Estimate, after: Estimate, old: Sequence[float], new: Sequence[float], worse: Worse) -> Comparison:
    together = intervals.correlation(old, new) if len(old) else 0.0
    change = intervals.difference(before, after, together)
    return Comparison(Compared(**after.model_dump(), before=before, worse=worse), change)
