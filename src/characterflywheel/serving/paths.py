"""Which of a conversation's messages it goes on from: replies to one message are alternatives, one is current."""

import hashlib
from collections.abc import Iterable, Sequence
from datetime import datetime

from ..records import ChatMessage, Message

WINDOW = 4
"""Messages by which a conversation is recognised where a client no longer sends its beginning: two turns."""


def path(
    messages: Sequence[Message], tip: str | None = None, picked: Iterable[tuple[str, datetime]] = ()
) -> list[Message]:
    """The messages from the beginning to where the conversation stands, in order.

    Args:
        messages: a conversation's messages in order of arrival. Those without a parent follow one another.
        tip: end there; None for the newest activity: the message that came last, or that the user picked after it.
        picked: message ids with the time at which the user picked them among alternatives.
    """
    known = {message.id: message for message in messages}
    parents: dict[str, str | None] = {}
    before: str | None = None
    for message in messages:
        parents[message.id] = message.parent_id or before
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


def seen(messages: Sequence[Message]) -> tuple[ChatMessage, ...]:
    """What the user was shown of a path, canned replies too: what a client that keeps its own history sends."""
    return tuple(ChatMessage(role=message.role, content=message.content) for message in messages)


def said(messages: Sequence[Message]) -> tuple[ChatMessage, ...]:
    """What the model is shown of a path: canned replies and what they answered are left out, as no model said them."""
    canned = {message.id for message in messages if message.fallback}
    declined = {message.parent_id for message in messages if message.fallback}
    return tuple(
        ChatMessage(role=message.role, content=message.content)
        for message in messages
        if message.id not in canned and message.id not in declined
    )


def digest(user_id: str, character_id: str, messages: Iterable[ChatMessage], what: str = "whole") -> str:
    """The id of a tip: who talked to whom, and what was said. Space around a message does not count."""
    running = hashlib.sha256(f"{what}\x1f{user_id}\x1f{character_id}".encode())
    for message in messages:
        running.update(f"\x1e{message.role}\x1f{message.content.strip()}".encode())
    return running.hexdigest()
