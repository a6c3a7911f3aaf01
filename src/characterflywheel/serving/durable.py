"""Handing events to the store and waiting until they are durable; what fails is an answer that says so."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from ..errors import FlywheelError
from ..service_records import Events
from ..store.database import StoreUnavailable
from ..store.journal import JournalFull
from .errors import ApiError, store_away

if TYPE_CHECKING:
    from .hub import Hub

PATIENCE_SECONDS = 15.0
P = ParamSpec("P")
T = TypeVar("T")


async def ask(read: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """What a method of the store returns, without blocking anybody else.

    Raises:
        ApiError: 503, the store does not answer in time.
    """
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await asyncio.to_thread(read, *arguments, **named)
    except (StoreUnavailable, TimeoutError) as error:
        raise store_away(error) from error


def put(hub: "Hub", events: Events) -> asyncio.Future[None]:
    """Hand events to the journal; too many waiting is an answer of 429."""
    try:
        stored = hub.journal.put(events)
    except JournalFull as error:
        hub.metrics.limited.labels("store").inc()
        raise ApiError(429, "store_busy", str(error), headers={"Retry-After": "1"}) from error
    stored.add_done_callback(_seen)  # the journal notes what fails; of two that do, only one may be waited for
    return stored


def _seen(stored: asyncio.Future[None]) -> None:
    if not stored.cancelled():
        stored.exception()


async def durable(future: asyncio.Future[None]) -> None:
    """Wait until the store has it; a client that leaves does not undo what was begun.

    Raises:
        ApiError: 503 where the store does not answer in time, 409 where what the events belong to is gone.
    """
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await asyncio.shield(future)
    except (StoreUnavailable, TimeoutError) as error:
        raise store_away(error) from error
    except FlywheelError as error:  # what it belongs to is gone, erased meanwhile
        raise ApiError(409, "not_stored", "This could not be stored: what it belongs to is no longer there.") from error
