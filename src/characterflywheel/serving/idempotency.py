"""Requests with an idempotency key: the same key and body get the same answer, another body is refused (409).

Two rows make that hold over crashes: one when a request begins, with its body's digest, and one with the answer, in the
transaction that makes the answer true. Within a process such requests also pass one after the other; between processes
the row that was there first wins, and both answer with it.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime

from ..service_records import Remembered
from .durable import ask
from .errors import ApiError
from .hub import Hub


def body_digest(raw: bytes) -> str:
    """What tells one request body from another."""
    return hashlib.sha256(raw).hexdigest()


@asynccontextmanager
async def alone(hub: Hub, key: str | None) -> AsyncIterator[None]:
    """Let requests with one key pass one after the other: the second finds the first's answer."""
    if key is None:
        yield
        return
    while (running := hub.being_answered.get(key)) is not None:
        await asyncio.wait([running])
    answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    hub.being_answered[key] = answered
    try:
        yield
    finally:
        del hub.being_answered[key]
        answered.set_result(None)


async def remembered(hub: Hub, key: str | None, digest: str | None) -> Remembered | None:
    """The answer that a key was given; None where it has none yet, perhaps because the first try failed.

    Raises:
        ApiError: 409, the key came with another body.
    """
    if key is None:
        return None
    for id in (key, _begun(key)):
        known = await ask(hub.store.remembered, id)
        if known is not None and known.body != digest:
            raise ApiError(409, "idempotency_conflict", "This Idempotency-Key came with another body before.")
        if known is not None and id == key:
            return known
    return None


def begun(key: str, digest: str, user_id: str, at: datetime) -> Remembered:
    """The row that says with which body a key began."""
    return Remembered(id=_begun(key), user_id=user_id, body=digest, status=0, response="", created_at=at)


async def as_stored(hub: Hub, memory: Remembered | None, answer: str) -> str:
    """The answer that the store has under this key: ours, unless another process was faster."""
    if memory is None:
        return answer
    known = await remembered(hub, memory.id, memory.body)
    return known.response if known else answer


def _begun(key: str) -> str:
    return f"{key}-begun"
