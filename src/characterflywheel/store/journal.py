"""Group commit: many requests become durable together, and each learns when its own events are (DESIGN section 5).

One writer thread takes whatever waits into one transaction. While the disk syncs it, the next ones gather, so the
number of commits adapts to the load: alone, a request waits for one sync; under load hundreds share it. A future that
resolved means fsynced. A bad row fails its own future only.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import FlywheelError
from ..service_records import Events
from .database import StoreUnavailable
from .events import EventStore

_log = logging.getLogger(__name__)

_STOP_SECONDS = 30.0  # a database that is silent must not keep the process


class JournalFull(FlywheelError):  # noqa: N818 - a state, not a mistake
    """Too much waits to be stored: the caller must slow down (HTTP 429 or 503)."""


class _Entry(NamedTuple):
    events: Events
    done: "asyncio.Future[None]"


class _Outcome(NamedTuple):
    done: "asyncio.Future[None]"
    error: Exception | None


class Journal:
    """Makes events durable from an event loop without blocking it.

    `commit_ms` is how long, in milliseconds, a commit waits for company; 0 commits at once what waits. To be read by
    metrics: `commits` and `rows` so far, `failed` futures, `commit_seconds` of the last commit, `waiting` now,
    `trouble` why the store took nothing at the last try (None: it did).
    """

    def __init__(self, store: EventStore, max_waiting: int = 10_000, commit_ms: float = 0.0) -> None:
        if max_waiting < 1 or commit_ms < 0:
            raise FlywheelError(
                f"max_waiting = {max_waiting}, commit_ms = {commit_ms}: a journal needs at least 1 and 0."
            )
        self.store = store
        self.max_waiting = max_waiting
        self.commit_ms = commit_ms
        self.commits = 0
        self.rows = 0
        self.failed = 0
        self.commit_seconds = 0.0
        self.trouble: str | None = None
        self._waiting = 0
        self._count = threading.Lock()
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()  # None: nothing comes any more
        self._open = False
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)

    @property
    def waiting(self) -> int:
        """How many calls of `put` are not yet resolved."""
        return self._waiting

    def start(self) -> None:
        """Start the writer thread. A journal runs once."""
        self._open = True
        self._thread.start()

    def put(self, events: Events) -> "asyncio.Future[None]":
        """Hand events over; the future resolves in the caller's loop once they are committed and fsynced.

        It fails with FlywheelError where a row is bad, with StoreUnavailable where the store could not be written;
        putting the same events again is harmless. Raises JournalFull where `max_waiting` calls wait already.
        """
        if not self._open:
            raise FlywheelError(
                "the journal is not running: start() it before the first put(), and put nothing after stop()."
            )
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._count:
            if self._waiting >= self.max_waiting:
                raise JournalFull(
                    f"{self._waiting} requests wait for the store, the most is {self.max_waiting}; slow down."
                )
            self._waiting += 1
        self._queue.put(_Entry(events, done))
        return done

    async def stop(self) -> None:
        """Take nothing more, and return once everything that waits is stored (or has failed)."""
        if self._open:
            self._open = False
            self._queue.put(None)
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, _STOP_SECONDS)

    def _write(self) -> None:
        """The writer thread."""
        for batch in self._batches():
            outcomes = self._commit(batch)
            with self._count:
                self._waiting -= len(batch)
                self.failed += sum(outcome.error is not None for outcome in outcomes)
            _tell(outcomes)

    def _batches(self) -> Iterator[list[_Entry]]:
        """Whatever waits, again and again, until `stop`."""
        while (first := self._queue.get()) is not None:
            if self.commit_ms:
                time.sleep(self.commit_ms / 1000)
            batch = [first]
            more = True
            while more:
                try:
                    entry = self._queue.get_nowait()
                except queue.Empty:
                    break
                if entry is None:
                    more = False
                else:
                    batch.append(entry)
            yield batch
            if not more:
                return

    def _commit(self, batch: list[_Entry]) -> list[_Outcome]:
        """Store a batch in one transaction. Where a row is bad, halves are tried until it stands alone."""
        began = time.perf_counter()
        try:
            self.rows += self.store.append_all([entry.events for entry in batch])
        except StoreUnavailable as error:
            self.trouble = str(error)
            _log.error("%d requests could not be stored: %s", len(batch), error)
            return [_Outcome(entry.done, error) for entry in batch]
        except Exception as error:  # a boundary: whatever a row brings about, the thread goes on
            if len(batch) == 1:
                _log.error("events refused: %s", error, exc_info=not isinstance(error, FlywheelError))
                return [_Outcome(batch[0].done, error)]
            half = len(batch) // 2
            return self._commit(batch[:half]) + self._commit(batch[half:])
        self.commits += 1
        self.trouble = None
        self.commit_seconds = time.perf_counter() - began
        return [_Outcome(entry.done, None) for entry in batch]


def _tell(outcomes: list[_Outcome]) -> None:
    """Resolve futures in their own loops, with one wake-up a loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Outcome]] = {}
    for outcome in outcomes:
        by_loop.setdefault(outcome.done.get_loop(), []).append(outcome)
    for loop, theirs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, theirs)
        except RuntimeError:
            _log.warning("%d requests were stored after their event loop had ended", len(theirs))


def _resolve(outcomes: list[_Outcome]) -> None:
    for done, error in outcomes:
        if not done.done():  # who waited may have gone
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)
