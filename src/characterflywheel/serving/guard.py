"""What stands between the chat service and a model, so that a slow or crashed one is an answer and never a hang.

A bounded number of requests is with the model, a bounded number waits in order of arrival, more are told when to come
back. Deadlines count from arrival, so waiting is part of them. After failures in a row a breaker answers for the
model for a few seconds, then lets one request through to see. Whatever happens, a place is given back exactly once.
"""

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..config import ServerConfig
from ..llm.base import Sampling
from ..records import ChatMessage
from .replies import Backend, BackendBusy, BackendError, Chunk, Reply

FAILURES_IN_A_ROW = 5
REST_S = 5.0
_UNENDED = Chunk("", "error")  # what a stream that just stops has said
_RECENT = 0.1  # weight of the newest request in the moving mean of service seconds


class Served(NamedTuple):
    """How one request went. `outcome` is `ok`, `cancelled` (the client left) or the error's code. Seconds.

    `waited_s` was spent in the queue, `first_s` until a stream's first piece (None otherwise), `seconds` in all.
    """

    model: str
    outcome: str
    waited_s: float
    first_s: float | None
    seconds: float


@dataclass
class Counters:
    """Sums since the start, for metrics. `outcomes` counts requests by `Served.outcome`; the rest are seconds."""

    outcomes: Counter[str] = field(default_factory=Counter)
    waited_s: float = 0.0
    seconds: float = 0.0


class _Turn:
    """One request's way through: when it came, when the model got it, when its first piece was there."""

    __slots__ = ("began", "came", "first")

    def __init__(self, came: float) -> None:
        self.came = came
        self.began: float | None = None
        self.first: float | None = None


class Guarded:
    """A backend with a bounded queue, deadlines and a breaker; itself a `Backend`. One event loop only.

    `running` and `waiting` are the present numbers of requests, `counters` the sums; `on_served` hears of each request
    as it ends. A request for several drafts takes one place.
    """

    def __init__(
        self,
        backend: Backend,
        server: ServerConfig,
        *,
        on_served: Callable[[Served], None] | None = None,
        failures_in_a_row: int = FAILURES_IN_A_ROW,
        rest_s: float = REST_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend, self.counters, self.running = backend, Counters(), 0
        self._server, self._on_served, self._clock = server, on_served, clock
        self._queue: deque[asyncio.Future[None]] = deque()
        self._limit, self._rest_s = failures_in_a_row, rest_s
        self._failures = 0
        self._opened: float | None = None
        self._probe: _Turn | None = None
        self._mean_s: float | None = None
        self._oldest: dict[_Turn, None] = {}  # those with the model, in order

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def broken(self) -> bool:
        """Whether the breaker answers for the model."""
        return self._opened is not None

    async def complete(self, messages: Sequence[ChatMessage], sampling: Sampling, seed: int, n: int = 1) -> list[Reply]:
        """See `Backend.complete`.

        Raises:
            BackendBusy: too much waits.
            BackendError: the model failed, is not there, or took longer than `timeout_s`.
        """
        turn, outcome = _Turn(self._clock()), "cancelled"
        try:
            async with asyncio.timeout(self._server.timeout_s):
                await self._enter(turn)
                replies = await self.backend.complete(messages, sampling, seed, n)
            outcome = "ok"
            return replies
        except TimeoutError:
            error = self._too_slow(turn, "timeout", self._server.timeout_s)
            outcome = error.code
            raise error from None
        except BackendError as error:
            outcome = error.code
            self._note(turn, error)
            raise
        finally:
            self._leave(turn, outcome)

    async def stream(
        self, messages: Sequence[ChatMessage], sampling: Sampling, seed: int
    ) -> AsyncGenerator[Chunk, None]:
        """See `Backend.stream`; raises what `complete` raises, and when no piece has come after `first_token_s`."""
        turn, outcome = _Turn(self._clock()), "cancelled"
        loop = asyncio.get_running_loop()
        last = loop.time() + self._server.timeout_s
        code, limit = "first_token_timeout", min(self._server.first_token_s, self._server.timeout_s)
        deadline = loop.time() + limit
        source: AsyncGenerator[Chunk, None] | None = None
        final: Chunk | None = None
        try:
            async with asyncio.timeout_at(deadline):
                await self._enter(turn)
            source = self.backend.stream(messages, sampling, seed)
            while final is None:
                async with asyncio.timeout_at(deadline):
                    chunk = await anext(source, None) or _UNENDED  # a tuple as the default trips Python 3.11
                if turn.first is None:
                    turn.first = self._clock()
                    code, limit, deadline = "timeout", self._server.timeout_s, last
                if chunk.finish is None:
                    yield chunk
                else:
                    final, outcome = chunk, "ok"
        except TimeoutError:
            error = self._too_slow(turn, code, limit)
            outcome = error.code
            raise error from None
        except BackendError as error:
            outcome = error.code
            self._note(turn, error)
            raise
        finally:
            try:
                if source is not None:
                    await source.aclose()
            finally:
                self._leave(turn, outcome)
        yield final  # the place is free by now, however slowly the client reads

    async def ready(self) -> None:
        """See `Backend.ready`; asks the model itself, past queue and breaker, for at most `first_token_s`."""
        try:
            async with asyncio.timeout(self._server.first_token_s):
                await self.backend.ready()
        except TimeoutError:
            raise BackendError(
                f"model {self.name!r} was not ready within {self._server.first_token_s:g} s.",
                status=503,
                code="loading",
            ) from None

    async def close(self) -> None:
        await self.backend.close()

    async def _enter(self, turn: _Turn) -> None:
        """Wait for a place with the model; the caller's deadline cancels the wait."""
        self._check_breaker()
        if self.running >= self._server.concurrent:
            if len(self._queue) >= self._server.waiting:
                raise BackendBusy(
                    f"{len(self._queue)} requests wait for model {self.name!r} already, the limit is "
                    f"{self._server.waiting}: come back later.",
                    retry_after=self._expected_wait(),
                )
            place = asyncio.get_running_loop().create_future()
            self._queue.append(place)
            try:
                await place
            except asyncio.CancelledError:
                if place.cancelled():
                    with contextlib.suppress(ValueError):  # passed over already
                        self._queue.remove(place)
                else:  # it was given the place in the same moment
                    self._next()
                raise
        else:
            self.running += 1
        try:
            self._check_breaker()
        except BackendError:
            self._next()
            raise
        if self._opened is not None:
            self._probe = turn
        turn.began = self._clock()
        self._oldest[turn] = None

    def _leave(self, turn: _Turn, outcome: str) -> None:
        """Give the place to the next in line and count."""
        now = self._clock()
        if turn.began is not None:
            del self._oldest[turn]
            if outcome == "ok":
                spent = now - turn.began
                self._mean_s = spent if self._mean_s is None else self._mean_s + _RECENT * (spent - self._mean_s)
                self._failures, self._opened = 0, None
            if self._probe is turn:
                self._probe = None
            self._next()
        waited = (now if turn.began is None else turn.began) - turn.came
        self.counters.outcomes[outcome] += 1
        self.counters.waited_s += waited
        self.counters.seconds += now - turn.came
        if self._on_served:
            first = None if turn.first is None else turn.first - turn.came
            self._on_served(Served(self.name, outcome, waited, first, now - turn.came))

    def _next(self) -> None:
        """Hand a place that has become free to the one that has waited longest."""
        while self._queue:
            place = self._queue.popleft()
            if not place.done():
                place.set_result(None)
                return
        self.running -= 1

    def _expected_wait(self) -> float:
        """Seconds until a newcomer would be served, from the measured mean; before one, from the oldest's age."""
        mean = self._mean_s
        if mean is None:
            oldest = next(iter(self._oldest), None)
            mean = 0.0 if oldest is None or oldest.began is None else self._clock() - oldest.began
        line = (len(self._queue) + 1) / self._server.concurrent
        return min(mean * line, self._server.timeout_s)

    def _check_breaker(self) -> None:
        if self._opened is None:
            return
        left = self._opened + self._rest_s - self._clock()
        if left > 0 or self._probe is not None:
            raise BackendError(
                f"model {self.name!r} failed {self._failures} times in a row and is left alone for "
                f"{self._rest_s:g} s: come back later.",
                status=503, code="resting", retry_after=max(left, 0.0) or self._rest_s, blames_backend=False,
            )  # fmt: skip

    def _note(self, turn: _Turn, error: BackendError) -> None:
        """Count a failure that the model is to blame for; the breaker opens, or opens again after a bad probe."""
        if turn.began is not None and error.blames_backend:
            self._failures += 1
            if self._failures >= self._limit:
                self._opened = self._clock()

    def _too_slow(self, turn: _Turn, code: str, limit: float) -> BackendError:
        """The error for a deadline that has passed.

        A request that spent its time in the queue does not speak against the model.
        """
        if turn.began is None:
            return BackendError(
                f"the request waited {limit:g} s for model {self.name!r} and was not served: come back later.",
                status=503, code="queue_timeout", retry_after=self._expected_wait(), blames_backend=False,
            )  # fmt: skip
        what = "no piece of a reply" if code == "first_token_timeout" else "no whole reply"
        error = BackendError(f"model {self.name!r} gave {what} within {limit:g} s.", status=504, code=code)
        error.blames_backend = self._clock() - turn.began >= (self._mean_s or 0.0)
        self._note(turn, error)
        return error
