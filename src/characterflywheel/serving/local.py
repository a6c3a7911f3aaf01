"""Replies from a model in this process (DESIGN section 6): one worker thread writes for all local models, in turns.

Whatever waits is written together. The event loop only hands jobs over and takes pieces back, so a slow model never
stops the service; a client that leaves takes its job along. torch is imported with the first model, not before.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING

from ..errors import FlywheelError
from ..ids import derive_seed
from ..llm.base import ChatModel, Sampling
from ..records import ChatMessage
from .replies import BackendError, Chunk, Reply

if TYPE_CHECKING:
    from .writers import Writer

_log = logging.getLogger(__name__)


class Job:
    """One reply to be written. The worker calls `deliver`, the event loop takes `pieces` and may set `cancelled`."""

    __slots__ = ("_loop", "_pieces", "cancelled", "messages", "sampling", "seed", "streams")

    def __init__(self, messages: Sequence[ChatMessage], sampling: Sampling, seed: int, streams: bool) -> None:
        self.messages, self.sampling, self.seed, self.streams = messages, sampling, seed, streams
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Chunk | BackendError] = asyncio.Queue()

    def deliver(self, piece: Chunk | BackendError) -> None:
        """Hand a piece over, from any thread. The last one has a finish, or is an error."""
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def piece(self) -> Chunk:
        """The next piece; raises where it is an error."""
        piece = await self._pieces.get()
        if isinstance(piece, BackendError):
            raise piece
        return piece


class Worker:
    """The thread in which local models write. Each model with work gets a turn, one step of decoding, and so on."""

    def __init__(self) -> None:
        self._writers: list[Writer] = []
        self._wake = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="flywheel-models", daemon=True)
        self._thread.start()

    def add(self, writer: "Writer") -> None:
        with self._wake:
            self._writers.append(writer)

    def put(self, writer: "Writer", job: Job) -> None:
        """Have `writer` write this job."""
        with self._wake:
            if self._stopped or writer.closing:
                job.deliver(_closing())
                return
            writer.inbox.append(job)
            self._wake.notify()

    def remove(self, writer: "Writer") -> None:
        """Let a model go when it has written what it was given."""
        with self._wake:
            writer.closing = True
            self._wake.notify()

    def stop(self) -> None:
        """End the thread after its present step; what is not finished ends with an error."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join()
        for writer in self._writers:
            writer.fail(_closing(), everything=True)
        self._writers.clear()

    def _run(self) -> None:
        while writers := self._next():
            for writer in writers:
                self._turn(writer)

    def _next(self) -> "list[Writer]":
        """Wait for work; the models that have some. None when it is time to stop."""
        with self._wake:
            while not self._stopped:
                if busy := [writer for writer in self._writers if writer.busy]:
                    return busy
                self._writers = [writer for writer in self._writers if not writer.closing]
                self._wake.wait()
        return []

    def _turn(self, writer: "Writer") -> None:
        """One step. A boundary: whatever a model raises ends the replies it is writing, not the thread."""
        try:
            writer.turn()
        except Exception as error:
            _log.exception("model %r failed while writing", writer.model.name)
            detail = f"{type(error).__name__}: {error}"[:300]
            writer.fail(BackendError("the model failed while writing.", status=502, code="model_failed", detail=detail))


def _closing() -> BackendError:
    return BackendError("the model is being taken out of service: ask again.", status=503, code="closing")


class Local:
    """A model of this process (`Backend` Protocol). `load` runs in a thread, when the first reply is asked for."""

    def __init__(self, name: str, load: Callable[[], ChatModel], worker: Worker) -> None:
        self.name, self._load, self._worker = name, load, worker
        self._writer: Writer | None = None
        self._loading: asyncio.Task[None] | None = None

    async def complete(self, messages: Sequence[ChatMessage], sampling: Sampling, seed: int, n: int = 1) -> list[Reply]:
        """See `Backend.complete`; drafts are written side by side, from one run of the prompt."""
        writer = await self._ready()
        seeds = [seed, *(derive_seed(seed, "draft", i) for i in range(1, n))]
        jobs = [Job(messages, sampling, one, streams=False) for one in seeds]
        try:
            for job in jobs:
                self._worker.put(writer, job)
            return [Reply(*whole) for whole in [await job.piece() for job in jobs]]  # type: ignore[arg-type]
        finally:
            for job in jobs:
                job.cancelled = True

    async def stream(
        self, messages: Sequence[ChatMessage], sampling: Sampling, seed: int
    ) -> AsyncGenerator[Chunk, None]:
        """See `Backend.stream`; a model that writes step by step is heard step by step, another one at its end."""
        writer = await self._ready()
        job = Job(messages, sampling, seed, streams=True)
        try:
            self._worker.put(writer, job)
            chunk = await job.piece()
            while chunk.finish is None:
                yield chunk
                chunk = await job.piece()
            yield chunk
        finally:
            job.cancelled = True

    async def ready(self) -> None:
        await self._ready()

    async def close(self) -> None:
        """Take no more requests; those that came before are answered."""
        if self._loading:
            with contextlib.suppress(BackendError):
                await self._loading
        if self._writer:
            self._worker.remove(self._writer)

    async def _ready(self) -> "Writer":
        """Load the model, once for all who wait; what failed is tried again with the next request."""
        while self._writer is None:
            if self._loading is None:
                self._loading = asyncio.create_task(self._open())
                self._loading.add_done_callback(lambda task: task.cancelled() or task.exception())  # seen, if by none
            await asyncio.shield(self._loading)
        return self._writer

    async def _open(self) -> None:
        """A boundary: whatever loading raises is a `BackendError`."""
        try:
            model = await asyncio.to_thread(self._load)
            from .writers import writer_of  # noqa: PLC0415

            self._writer = writer_of(model)
            self._worker.add(self._writer)
        except BackendError:
            raise
        except Exception as error:
            _log.exception("model %r could not be loaded", self.name)
            said = str(error) if isinstance(error, FlywheelError) else "its files cannot be read: restore them."
            raise BackendError(
                f"model {self.name!r} could not be loaded: {said}", status=503, code="model_unloadable",
                detail=f"{type(error).__name__}: {error}"[:300],
            ) from error  # fmt: skip
        finally:
            self._loading = None
