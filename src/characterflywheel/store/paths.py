"""The one way through a conversation with alternatives that it goes on from: what people see and what models learn."""

from collections.abc import Iterable, Sequence
from datetime import datetime

from ..records import Message


def parents(messages: Sequence[Message]) -> dict[str, str | None]:
    """Of every message's id, in order of arrival, that of the message it follows; None where it begins a path.

    Messages without a parent follow one another; a parent that has not come before (it is older than the window, say)
    is none, so that every way back ends.
    """
    found: dict[str, str | None] = {}
    before: str | None = None
    for message in messages:
        parent = before if message.parent_id is None else message.parent_id
        found[message.id] = parent if parent in found else None
        before = message.id
    return found


def path(
    messages: Sequence[Message], tip: str | None = None, picked: Iterable[tuple[str, datetime]] = ()
) -> list[Message]:
    """The messages from the beginning to where the conversation stands, in order.

    Args:
        messages: a conversation's messages in order of arrival (`parents` says which follows which).
        tip: end there; None for the newest activity: the message that came last, or that the user picked after it.
        picked: message ids with the time at which the user picked them among alternatives.
    """
    known = {message.id: message for message in messages}
    above = parents(messages)
    if tip is None and messages:
        tip = _newest(messages, above, picked)
    found: list[Message] = []
    while tip is not None and tip in known:
        found.append(known[tip])
        tip = above[tip]
    return found[::-1]


def _newest(messages: Sequence[Message], above: dict[str, str | None], picked: Iterable[tuple[str, datetime]]) -> str:
    chosen = max(((at, id) for id, at in picked if id in above), default=None)
    if chosen is None or chosen[0] < messages[-1].created_at:
        return messages[-1].id
    tip = chosen[1]
    for message in messages:  # what was said after the picked reply is newer than it
        if above[message.id] == tip:
            tip = message.id
    return tip
