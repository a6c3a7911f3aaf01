"""Which of a conversation's messages it goes on from: replies to one message are alternatives, one is current."""

import hashlib
from collections.abc import Iterable, Sequence

from ..records import ChatMessage, Message
from ..store.paths import path

__all__ = ["WINDOW", "digest", "path", "said", "seen"]

WINDOW = 4
"""Messages by which a conversation is recognised where a client no longer sends its beginning: two turns."""


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
