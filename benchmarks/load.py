"""An open-loop load generator for chat completions, cheap enough to run beside what it measures.

`fire(Plan(...))` runs it in a process of its own. Requests have times at which they are due, drawn before the start;
a late answer does not delay the next request, and latency counts from the due time, so waiting in any queue counts
(Tene's "coordinated omission" cannot hide it). It speaks HTTP/1.1 itself, over as many kept-alive connections as are
needed at once, on uvloop and httptools.

    python benchmarks/load.py < plan.json > fired.json
"""

import asyncio
import gc
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import httptools
import numpy as np
import uvloop

_SAID = re.compile(rb'"content": ?"[^"]')
_ID = re.compile(rb'"id": ?"([^"]+)"')
_SENTENCES = (
    "Good evening! What did you see out there today?", "I had a long day and could use a story.",
    "Tell me how you came to live here, and leave nothing out.", "Do you ever miss the people you left behind?",
    "My sister is getting married on Saturday, and I have to give a speech. I am rather nervous about it.",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What to fire: `rate` requests a second for `seconds` at `url` + /chat/completions, as `users` people in turn."""

    url: str
    rate: float
    seconds: float
    key: str = "none"
    model: str = "mock"
    stream: bool = False
    poisson: bool = True
    users: int = 500
    seed: int = 0
    patience: float = 30.0
    deadline: float = 60.0


@dataclass(frozen=True)
class Fired:
    """What became of each request, in the order of the due times; seconds, NaN where it did not come to that.

    `lag` is how late the generator itself sent (part of `total` and `first`), `ids` what the answers were called,
    `cpu` the generator's own processor time.
    """

    due: list[float]
    lag: list[float]
    first: list[float]
    total: list[float]
    ids: list[str]
    failures: dict[str, int]
    cpu: float
    connections: int
    wall: float = field(default=0.0)

    @property
    def success(self) -> float:
        """Share of requests with a whole, well-formed answer."""
        return len(self.ids) / len(self.due)


def fire(plan: Plan) -> Fired:
    """Run the generator in its own process and wait for it."""
    command, order = [sys.executable, str(Path(__file__))], json.dumps(asdict(plan))
    done = subprocess.run(command, input=order, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the load generator failed: {done.stderr[-2000:]}")
    return Fired(**json.loads(done.stdout))


def due_times(plan: Plan) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Seconds after the start at which each request is due."""
    if not plan.poisson:
        return np.arange(round(plan.rate * plan.seconds)) / plan.rate
    rng = np.random.default_rng(plan.seed)
    count = round(plan.rate * plan.seconds)  # given their number, a Poisson process's arrivals are uniform
    return np.sort(rng.uniform(0, plan.seconds, count))


def requests(plan: Plan, count: int) -> list[bytes]:
    """The requests as bytes, made before the clock starts."""
    at = urlsplit(plan.url)
    head = (
        f"POST {at.path}/chat/completions HTTP/1.1\r\nHost: {at.netloc}\r\nAuthorization: Bearer {plan.key}\r\n"
        "Content-Type: application/json\r\nContent-Length: "
    )
    made = []
    for i in range(count):
        body = {
            "model": plan.model,
            "messages": [{"role": "user", "content": f"{_SENTENCES[i % len(_SENTENCES)]} ({plan.seed}-{i})"}],
            "user": f"visitor-{i % plan.users}",
            "max_tokens": 64,
        } | ({"stream": True} if plan.stream else {})
        text = json.dumps(body).encode()
        made.append(f"{head}{len(text)}\r\n\r\n".encode() + text)
    return made


class _Shot:
    """One request on its way."""

    __slots__ = ("body", "connection", "due", "first", "number", "over", "request", "retried", "sent")

    def __init__(self, number: int, due: float, request: bytes) -> None:
        self.number, self.due, self.request = number, due, request
        self.sent = self.first = float("nan")
        self.connection: _Connection | None = None
        self.body, self.retried, self.over = b"", False, False


class _Connection(asyncio.Protocol):
    """One kept-alive connection; at most one request on it at a time."""

    def __init__(self, gun: "_Gun") -> None:
        self.gun = gun
        self.shot: _Shot | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def send(self, shot: _Shot) -> None:
        assert self.transport is not None
        self.shot, self.parser, shot.connection = shot, httptools.HttpResponseParser(self), self
        self.transport.write(shot.request)

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except Exception as error:  # what is not HTTP is a failed request, not the end of the measurement
            self.fail(type(error).__name__)

    def on_body(self, body: bytes) -> None:
        shot = self.shot
        if shot is not None:
            shot.body += body
            if shot.first != shot.first and _SAID.search(shot.body):
                shot.first = time.perf_counter()

    def on_message_complete(self) -> None:
        shot, self.shot = self.shot, None
        if shot is None:
            return
        self.gun.answered(shot, self.parser.get_status_code())
        if self.parser.should_keep_alive() and self.transport is not None:
            self.gun.free.append(self)
        elif self.transport is not None:
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.fail("connection lost" if error is None else type(error).__name__)

    def fail(self, why: str) -> None:
        """Give the connection up. A server may close an idle one just when it is used: such a request goes again."""
        if self in self.gun.free:
            self.gun.free.remove(self)
        shot, self.shot, transport, self.transport = self.shot, None, self.transport, None
        if transport is not None:
            transport.close()
        if shot is not None and not shot.body and not shot.retried and why != "timed out":
            shot.retried = True
            self.gun.shoot(shot)
        elif shot is not None:
            self.gun.failed(shot, why)


class _Gun:
    """Fires the plan once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.free: list[_Connection] = []
        self.failures: Counter[str] = Counter()
        self.connections = 0
        self.tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> Fired:
        self.loop = asyncio.get_running_loop()
        dues = due_times(self.plan)
        shots = [_Shot(i, 0.0, r) for i, r in enumerate(requests(self.plan, len(dues)))]
        count = len(shots)
        self.left, self.over = count, asyncio.Event()
        self.first, self.total, self.lag = np.full((3, count), np.nan)
        self.ids: list[str | None] = [None] * count
        cpu, self.start = time.process_time(), time.perf_counter() + 0.2
        for shot, due in zip(shots, dues, strict=True):
            shot.due = self.start + float(due)
        threading.Thread(target=self.trigger, args=(shots,), daemon=True).start()
        try:
            await asyncio.wait_for(self.over.wait(), self.plan.seconds + self.plan.deadline)
        except TimeoutError:
            self.failures["unanswered at the deadline"] += self.left
        return Fired(
            due=dues.tolist(), lag=self.lag.tolist(), first=self.first.tolist(), total=self.total.tolist(),
            ids=[one for one in self.ids if one], failures=dict(self.failures), cpu=time.process_time() - cpu,
            connections=self.connections, wall=time.perf_counter() - self.start,
        )  # fmt: skip

    def trigger(self, shots: Sequence[_Shot]) -> None:
        """Wake the loop when a request is due: a thread's sleep is exact to 0.1 ms, the loop's timers to 1 ms."""
        for shot in shots:
            wait = shot.due - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
            self.loop.call_soon_threadsafe(self.shoot, shot)

    def shoot(self, shot: _Shot) -> None:
        if shot.sent != shot.sent:
            shot.sent = time.perf_counter()
            self.lag[shot.number] = shot.sent - shot.due
            self.loop.call_later(self.plan.patience, self.impatient, shot)
        while self.free:
            connection = self.free.pop()
            if connection.transport is not None and not connection.transport.is_closing():
                connection.send(shot)
                return
        task = self.loop.create_task(self.connect(shot))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def connect(self, shot: _Shot) -> None:
        at = urlsplit(self.plan.url)
        try:
            _, connection = await self.loop.create_connection(
                lambda: _Connection(self), at.hostname or "", at.port or 80
            )
        except OSError as error:
            self.failed(shot, type(error).__name__)
            return
        self.connections += 1
        connection.send(shot)

    def impatient(self, shot: _Shot) -> None:
        if not shot.over and shot.connection is not None:
            shot.connection.fail("timed out")
        elif not shot.over:
            self.failed(shot, "timed out")

    def answered(self, shot: _Shot, status: int) -> None:
        done, found = time.perf_counter(), _ID.search(shot.body)
        whole = not self.plan.stream or b"data: [DONE]" in shot.body[-64:]
        if status != 200:
            self.failed(shot, f"status {status}")
        elif not (found and whole and shot.first == shot.first):
            self.failed(shot, "malformed answer")
        elif not shot.over:
            self.ids[shot.number] = found[1].decode()
            self.first[shot.number], self.total[shot.number] = shot.first - shot.due, done - shot.due
            self.settle(shot)

    def failed(self, shot: _Shot, why: str) -> None:
        if not shot.over:
            self.failures[why] += 1
            self.settle(shot)

    def settle(self, shot: _Shot) -> None:
        shot.over = True
        self.left -= 1
        if self.left == 0:
            self.over.set()


def main() -> None:
    plan = Plan(**json.load(sys.stdin))
    gc.disable()  # neither a collection nor the other thread's turn may delay a request
    sys.setswitchinterval(1e-4)
    fired = uvloop.run(_Gun(plan).run())
    json.dump(asdict(fired), sys.stdout)


if __name__ == "__main__":
    main()
