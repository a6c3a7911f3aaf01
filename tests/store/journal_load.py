"""A process that journals and says what was acknowledged; the tests kill it, or trace it, and look what is there.

    python journal_load.py WHERE FILE COUNT

Appends `ack NUMBER` to the file once request NUMBER is durable. Request NUMBER is the user's message `q-NUMBER`, the
reply `r-NUMBER` and a signal `s-NUMBER`.
"""

import asyncio
import itertools
import logging
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from characterflywheel.characters import bundled_characters
from characterflywheel.records import Conversation, Message, Signal, User
from characterflywheel.service_records import Events
from characterflywheel.store import EventStore, Journal, StoreUnavailable

AT = datetime(2026, 1, 5, tzinfo=UTC)


def beginnings() -> Events:
    """What the requests refer to."""
    talk = Conversation(
        id="c", user_id="ann", character_id="pirate", character_version=1, source="user", created_at=AT
    )  # fmt: skip
    ann = User(id="ann", population="user", created_at=AT)
    return Events(characters=(bundled_characters()["pirate"],), users=(ann,), conversations=(talk,))


def request(number: int) -> Events:
    """Three rows of one request."""
    place = {"conversation_id": "c", "user_id": "ann", "created_at": AT}
    asked = Message(id=f"q-{number}", role="user", content="Ahoy! " * 20, **place)
    reply = Message(id=f"r-{number}", role="assistant", content="Arr. " * 40, parent_id=asked.id, **place)
    signal = Signal(id=f"s-{number}", message_id=reply.id, user_id="ann", kind="love", created_at=AT)
    return Events(messages=(asked, reply), signals=(signal,))


async def load(where: Path | str, acknowledged: Path, numbers: Iterator[int], together: int) -> None:
    with EventStore.open(where) as store:
        journal = Journal(store)
        journal.start()
        await journal.put(beginnings())
        said = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

        async def client() -> None:
            for number in numbers:
                await journal.put(request(number))
                os.write(said, b"ack %d\n" % number)

        try:
            await asyncio.gather(*(client() for _ in range(together)))
        except StoreUnavailable:
            os.write(said, b"unavailable\n")
        await journal.stop()


def journal_for_ever(where: Path | str, acknowledged: Path, first: int) -> None:
    """64 clients that put one request after another, until the process is killed or the store is gone."""
    logging.disable()  # a store that is gone is what is tested
    asyncio.run(load(where, acknowledged, itertools.count(first), 64))


if __name__ == "__main__":
    asyncio.run(load(sys.argv[1], Path(sys.argv[2]), iter(range(int(sys.argv[3]))), 1))
