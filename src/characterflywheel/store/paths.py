"""The one way through a conversation with alternatives that it goes on from: what people see and what models learn."""

from collections.abc import Iterable, Sequence
from datetime import datetime

from ..records import Message


def path(
    messages: Sequence[Message], tip: str | None = None, picked: Iterable[tuple[str, datetime]] = ()
) -> list[Message]:
    """The messages from the beginning to where the conversation stands, in order.

    A parent that is not among the messages before it (it is older than the window, say) begins the path.

    Args:
        messages: a conversation's messages in order of arrival. Those without a parent follow one another.
        tip: end there; None for the newest activity: the message that came last, or that the user picked after it.
        picked: message ids with the time at which the user picked them among alternatives.
    """
    known: dict[str, Message] = {}
    parents: dict[str, str | None] = {}
    before: str | None = None
    for message in messages:
        parent = before if message.parent_id is None else message.parent_id
        parents[message.id] = parent if parent in known else None  # earlier ones only, so the way back ends
        known[message.id] = message
        before = message.id
    if tip is None and messages:
        tip = _newest(messages, parents, picked)
    found: list[Message] = []
    while tip is not None and tip in known:
        found.append(known[tip])
        tip = parents[tip]
    return found[::-1]


def _newest(messages: Sequence[Message], parents: dict[str, str | None], picked: Iterable[tuple[str, datetime]]) -> str:
    chosen = max(((at, id) for id, at in picked if id in parents), default=None)
    if chosen is None or chosen[0] < messages[-1].created_at:
        return messages[-1].id
    tip = chosen[1]
    for message in messages:  # what was said after the picked reply is newer than it
        if parents[message.id] == tip:
            tip = message.id
    return tip
