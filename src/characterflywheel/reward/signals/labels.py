"""What is known of how users took each reply: labels out of conversations and signals (PAPER section 3).

Unknown is not 0. An act that did not happen is a 0 only where it could have happened and there was time for it.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from math import isfinite
from typing import NamedTuple, get_args

from ...errors import FlywheelError
from ...records import GIVEN, ChatMessage, Conversation, Message, Signal, SignalKind
from ...store.paths import parents
from .inputs import Reply

TIME_TO_ACT = timedelta(hours=24)
GOOD_RATING = 4.0
_NOT_READ = ("cancelled", "error")


class _Said(NamedTuple):
    """A message in its place: its path from the beginning, and the message it follows."""

    message: Message
    history: tuple[ChatMessage, ...]
    parent: str | None


class _Known(NamedTuple):
    """What decides a reply's labels: the last word on each matter, and what could be said."""

    values: Mapping[str, float]
    settled: bool
    offered: frozenset[str]
    picked: bool | None


def collect(
    conversations: Sequence[Conversation], signals: Sequence[Signal], kinds: Sequence[str], *,
    within: timedelta = TIME_TO_ACT,
) -> list[Reply]:  # fmt: skip
    """Every reply a model wrote with at least one known label, labels in the order of `kinds`, by conversation id.

    A conversation may hold alternatives (messages with the same parent): each is judged in its own history, so that
    what was regenerated away is seen. Left out: greetings, canned replies, what a client brought, and what nobody
    read to its end (cancelled, failed, empty). The last word counts: a thumb up taken back, or turned down, is none.

    - `continue`: as its row says; unknown without one (the conversation's cap, too recent, regenerated away).
    - `rating`: 1 from 4 of 5 on; unknown where nobody rated.
    - `pick`: known among alternatives of which one was picked: 1 for the last picked, 0 for the others.
    - other acts: known once the outcome is (a `continue` row) or the log goes on for `within` after the reply, and
      only if anybody used that act on a reply by the same model: imported chats came without thumbs.

    Raises:
        FlywheelError: a kind that is none, or a signal whose value is no finite number.
    """
    unknown = sorted(set(kinds) - set(get_args(SignalKind)))
    if unknown:
        raise FlywheelError(f"no signal is called {', '.join(unknown)}: there are {', '.join(get_args(SignalKind))}.")
    values, picks = _last_words(signals)
    model = {m.id: m.model for conversation in conversations for m in conversation.messages}
    offered: defaultdict[str | None, set[str]] = defaultdict(set)
    for signal in signals:
        if signal.message_id in model:
            offered[model[signal.message_id]].add(signal.kind)
    times = [m.created_at for c in conversations for m in c.messages] + [s.created_at for s in signals]
    newest = max(times, default=None)
    replies = []
    for conversation in sorted(conversations, key=lambda c: c.id):
        said = _in_place(conversation)
        winners = _winners(said, picks)
        for one in said:
            if not _by_a_model(one):
                continue
            message, mine = one.message, values.get(one.message.id, {})
            known = _Known(
                mine, "continue" in mine or (newest is not None and newest - message.created_at >= within),
                frozenset(offered[message.model]),
                winners[one.parent] == message.id if one.parent in winners else None,
            )  # fmt: skip
            labels = tuple(_RULES.get(kind, _act)(kind, known) for kind in kinds)
            if any(label is not None for label in labels):
                replies.append(
                    Reply(conversation.user_id, one.history, message.content, labels, conversation.character_id)
                )
    return replies


def _last_words(signals: Sequence[Signal]) -> tuple[dict[str, dict[str, float]], dict[str, datetime]]:
    """For each message the newest value of each matter, thumbs being one (up is +, down is -), and when picked."""
    values: defaultdict[str, dict[str, float]] = defaultdict(dict)
    picks: dict[str, datetime] = {}
    for signal in sorted(signals, key=lambda s: s.created_at):  # stable: of one moment, the later row
        if not isfinite(signal.value):
            raise FlywheelError(f"signal {signal.id} has value {signal.value}, must be a finite number.")
        matter, sign = {"thumb_up": ("thumb", 1), "thumb_down": ("thumb", -1)}.get(signal.kind, (signal.kind, 1))
        values[signal.message_id][matter] = sign * signal.value
        if signal.kind == "pick":
            picks.pop(signal.message_id, None)
            if signal.value > 0:
                picks[signal.message_id] = signal.created_at
    return values, picks


def _in_place(conversation: Conversation) -> list[_Said]:
    """Messages in order of arrival, each with what was said on the way to it."""
    found: dict[str, _Said] = {}
    above = parents(conversation.messages)
    for message in conversation.messages:
        parent = found.get(above[message.id] or "")
        history: tuple[ChatMessage, ...] = ()
        if parent is not None:
            history = parent.history
            if parent.message.role != "system":
                history += (ChatMessage(role=parent.message.role, content=parent.message.content),)
        found[message.id] = _Said(message, history, above[message.id])
    return list(found.values())


def _winners(said: Sequence[_Said], picks: Mapping[str, datetime]) -> dict[str | None, str]:
    """For each message with several replies of which one was picked, the reply picked last."""
    alternatives: defaultdict[str | None, list[str]] = defaultdict(list)
    for one in said:
        if one.message.role == "assistant" and one.parent is not None:
            alternatives[one.parent].append(one.message.id)
    return {
        parent: max((m for m in mine if m in picks), key=lambda m: picks[m])
        for parent, mine in alternatives.items()
        if len(mine) > 1 and any(m in picks for m in mine)
    }


def _by_a_model(one: _Said) -> bool:
    message = one.message
    return (
        message.role == "assistant"
        and not message.fallback
        and message.model != GIVEN
        and message.finish not in _NOT_READ
        and bool(message.content.strip())
        and any(m.role == "user" for m in one.history)
    )


def _act(kind: str, known: _Known) -> float | None:
    could = known.settled and kind in known.offered
    return float(known.values.get(kind, 0.0) > 0) if could else None


def _thumb(kind: str, known: _Known) -> float | None:
    if not known.settled or known.offered.isdisjoint(("thumb_up", "thumb_down")):
        return None
    value = known.values.get("thumb", 0.0)
    return float(value > 0 if kind == "thumb_up" else value < 0)


def _continue(kind: str, known: _Known) -> float | None:
    return float(known.values[kind] > 0) if kind in known.values else None


def _rating(kind: str, known: _Known) -> float | None:
    return float(known.values[kind] >= GOOD_RATING) if kind in known.values else None


def _pick(kind: str, known: _Known) -> float | None:
    return None if known.picked is None else float(known.picked)


_RULES: Mapping[str, Callable[[str, _Known], float | None]] = {
    "continue": _continue, "thumb_up": _thumb, "thumb_down": _thumb, "rating": _rating, "pick": _pick,
}  # fmt: skip
