"""Handing events to the store and waiting until they are durable; what fails is an answer that says so."""

import asyncio

from ..errors import FlywheelError
from ..service_records import Events
from ..store.database import StoreUnavailable
from ..store.journal import JournalFull
from .errors import ApiError
from .hub import Hub


def put(hub: Hub, events: Events) -> asyncio.Future[None]:
    """Hand events to the journal; too many waiting is an answer of 429."""
    try:
        return hub.journal.put(events)
    except JournalFull as error:
        hub.metrics.limited.labels("store").inc()
        raise ApiError(429, "store_busy", str(error), headers={"Retry-After": "1"}) from error


async def durable(future: asyncio.Future[None]) -> None:
    """Wait until the store has it; a client that leaves does not undo what was begun."""
    try:
        await asyncio.shield(future)
    except StoreUnavailable as error:
        raise ApiError(503, "store_unavailable", str(error), headers={"Retry-After": "2"}) from error
    except FlywheelError as error:  # what it belongs to is gone, erased meanwhile
        raise ApiError(409, "not_stored", "This could not be stored: what it belongs to is no longer there.") from error
