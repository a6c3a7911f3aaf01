"""Group commit: all is stored, each learns of its own, and a store that fails does not end the journal."""

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing
from pathlib import Path

import journal_load
import pytest
from journal_load import AT, request
from sqlalchemy import event

from characterflywheel.errors import FlywheelError
from characterflywheel.records import Signal
from characterflywheel.service_records import Events
from characterflywheel.store import EventStore, Journal, JournalFull, StoreUnavailable
from postgres_server import PostgresServer


@pytest.fixture
def store(where: Path | str) -> Iterator[EventStore]:
    with EventStore.open(where, patience_s=0.3) as opened:
        opened.append_events(journal_load.beginnings())
        yield opened


def running(store: EventStore, work: Callable[[Journal], Coroutine[object, object, None]], **options: float) -> Journal:
    """Run `work` with a journal from start to stop."""

    async def whole() -> Journal:
        journal = Journal(store, **options)  # type: ignore[arg-type]
        journal.start()
        try:
            await asyncio.wait_for(work(journal), 30)
        finally:
            await journal.stop()
        return journal

    return asyncio.run(whole())


def stored(store: EventStore) -> list[str]:
    said = store.conversation("c")
    assert said is not None
    return [message.id for message in said.messages]


def test_what_waits_is_committed_together_and_in_order(store: EventStore) -> None:
    async def work(journal: Journal) -> None:
        waiting = [journal.put(request(number)) for number in range(300)]
        assert journal.waiting == 300
        await asyncio.gather(*waiting)
        assert journal.waiting == 0

    journal = running(store, work)
    assert stored(store) == [f"{one}-{number}" for number in range(300) for one in "qr"]
    assert journal.rows == 900
    assert 1 <= journal.commits <= 30
    assert journal.commit_seconds > 0
    assert journal.failed == 0


def test_company_is_waited_for_where_that_is_wished(store: EventStore) -> None:
    async def work(journal: Journal) -> None:
        first = journal.put(request(0))
        await asyncio.sleep(0.05)
        await asyncio.gather(first, journal.put(request(1)))

    assert running(store, work, commit_ms=500).commits == 1


def test_a_bad_row_fails_its_own_future_only(store: EventStore, caplog: pytest.LogCaptureFixture) -> None:
    dangling = Events(
        signals=(Signal(id="s", message_id="nowhere", user_id="ann", kind="love", created_at=AT),)
    )  # fmt: skip
    lone = request(40).messages[0].model_copy(update={"id": "lone", "content": "\ud800"})

    async def work(journal: Journal) -> None:
        events = [request(number) for number in range(20)]
        events[3:3] = [dangling]
        events[11:11] = [Events(messages=(lone,))]
        done = await asyncio.gather(*map(journal.put, events), return_exceptions=True)
        assert [i for i, error in enumerate(done) if error is not None] == [3, 11]
        assert isinstance(done[3], FlywheelError)
        assert "foreign key" in str(done[3]).lower()
        assert "surrogates" in str(done[11])
        await journal.put(request(20))

    with caplog.at_level(logging.ERROR):
        journal = running(store, work)
    assert journal.failed == 2
    assert len(caplog.records) == 2
    assert stored(store) == [f"{one}-{number}" for number in range(21) for one in "qr"]


def test_the_same_events_again_are_harmless(store: EventStore) -> None:
    async def work(journal: Journal) -> None:
        await asyncio.gather(*(journal.put(request(number % 3)) for number in range(30)))

    assert running(store, work).rows == 9
    assert len(stored(store)) == 6


def test_too_much_waiting_is_refused_and_a_gone_caller_does_no_harm(store: EventStore) -> None:
    async def work(journal: Journal) -> None:
        held = threading.Event()
        holder = threading.Thread(target=lambda: hold(store, held))
        holder.start()
        await asyncio.to_thread(held.wait)
        waiting = [journal.put(request(number)) for number in range(5)]
        with pytest.raises(JournalFull, match="5 requests wait"):
            journal.put(request(5))
        waiting[2].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.to_thread(holder.join)
        await journal.put(request(5))

    running(store, work, max_waiting=5)
    assert len(stored(store)) == 12  # what was handed over is stored, even if nobody waits for it any more


def hold(store: EventStore, held: threading.Event, seconds: float = 0.2) -> None:
    with store.write():
        held.set()
        threading.Event().wait(seconds)


def test_stopping_stores_what_waits_and_takes_nothing_more(store: EventStore) -> None:
    async def whole() -> None:
        journal = Journal(store)
        with pytest.raises(FlywheelError, match="not running"):
            journal.put(request(0))
        journal.start()
        waiting = [journal.put(request(number)) for number in range(50)]
        await journal.stop()
        await journal.stop()
        with pytest.raises(FlywheelError, match="not running"):
            journal.put(request(99))
        assert await asyncio.gather(*waiting) == [None] * 50

    asyncio.run(whole())
    assert len(stored(store)) == 100
    with pytest.raises(FlywheelError, match="max_waiting = 0"):
        Journal(store, max_waiting=0)


async def fails_then_recovers(journal: Journal, broken: Callable[[], None], mended: Callable[[], None]) -> str:
    """Put events while the store is out of order and again afterwards; returns the error of the first time."""
    await journal.put(request(0))
    broken()
    failed = await asyncio.gather(*(journal.put(request(number)) for number in (1, 2)), return_exceptions=True)
    mended()
    await asyncio.gather(*(journal.put(request(number)) for number in (1, 2, 3)))
    assert all(isinstance(error, StoreUnavailable) for error in failed)
    return str(failed[0])


def test_a_locked_database_is_unavailable_until_it_is_free(tmp_path: Path) -> None:
    path = tmp_path / "flywheel.db"
    with EventStore.open(path, patience_s=0.1) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        store.append_events(journal_load.beginnings())

        async def work(journal: Journal) -> None:
            error = await fails_then_recovers(
                journal, lambda: other.execute("BEGIN IMMEDIATE"), lambda: other.execute("ROLLBACK")
            )  # fmt: skip
            assert "database is locked" in error

        assert running(store, work).failed == 2
        assert len(stored(store)) == 8


def test_a_full_disk_is_unavailable_until_there_is_room(tmp_path: Path) -> None:
    pages = "PRAGMA max_page_count=1"  # SQLite then says what it says of a full disk, and never shrinks a file

    with EventStore.open(tmp_path / "flywheel.db") as store:
        store.append_events(journal_load.beginnings())

        async def work(journal: Journal) -> None:
            def full(connection: object, *_: object) -> None:
                connection.execute(pages)  # type: ignore[attr-defined]

            await journal.put(request(0))
            event.listen(store._engine, "checkout", full)
            big = request(9).messages[0].model_copy(update={"content": "x" * 200_000})
            with pytest.raises(StoreUnavailable, match="disk is full"):
                await journal.put(Events(messages=(big,)))
            event.remove(store._engine, "checkout", full)
            store.close()  # the next connection has no such bound
            await journal.put(Events(messages=(big,)))

        assert running(store, work).failed == 1
        assert stored(store) == ["q-0", "r-0", "q-9"]


def test_a_server_that_is_down_is_unavailable_until_it_is_up(postgres: PostgresServer) -> None:
    with EventStore.open(postgres.new_database()) as store:
        store.append_events(journal_load.beginnings())

        async def work(journal: Journal) -> None:
            await fails_then_recovers(journal, lambda: postgres.stop("immediate"), postgres.start)

        assert running(store, work).failed == 2
        assert len(stored(store)) == 8
        postgres.stop()
        postgres.start()
        assert len(stored(store)) == 8  # a connection that died unnoticed is replaced


def test_a_lock_that_is_held_too_long_on_postgresql(postgres: PostgresServer) -> None:
    where = postgres.new_database()
    with EventStore.open(where, patience_s=0.1) as store, EventStore.open(where) as other:
        store.append_events(journal_load.beginnings())
        with other.write(), pytest.raises(StoreUnavailable, match="lock timeout"):
            store.append_events(request(0))
        store.append_events(request(0))
        assert stored(store) == ["q-0", "r-0"]
