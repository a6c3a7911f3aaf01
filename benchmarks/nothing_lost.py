"""Kill the chat service under load, again and again; then look for acknowledged events that are missing or doubled.

People talk (half of them streamed), leave in the middle of streams, go on with conversations and press hearts, each
request with an idempotency key, tried again with the same key until it is acknowledged. Meanwhile the service gets
SIGKILL at random moments and starts again. Acknowledged means: the whole answer came, or the stream's last chunk.
`--trace` shows, with strace on one request after another, that the log was synced to disk before each answer.

    python benchmarks/nothing_lost.py --kills 100 --database sqlite postgresql --json nothing_lost.json
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import sqlite3
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import aiohttp

import record
import servers

PACKAGES = ("characterflywheel", "aiohttp", "SQLAlchemy", "psycopg")
UNLIMITED = "key_requests_per_minute = 10000000\nuser_requests_per_minute = 10000000\n"
Rows = Sequence[tuple[Any, ...]]
Query = Callable[[str], Rows]
Found = TypeVar("Found")
Read = Callable[[aiohttp.ClientResponse], Awaitable[Found | None]]


class Answer(NamedTuple):
    """An acknowledged turn: the ids of utterance, reply and conversation, and what the reply said."""

    asked: str
    reply: str
    conversation: str
    text: str


class Turn(NamedTuple):
    """What somebody says. `again`: once more after it was acknowledged; `leave`: walks out of the stream once."""

    key: str
    user: str
    text: str
    stream: bool
    leave: bool
    again: bool
    conversation: str | None


@dataclass
class Ledger:
    """What the clients know. `acknowledged` by turn, `hearts` by reply."""

    acknowledged: dict[Turn, Answer] = field(default_factory=dict)
    hearts: dict[str, str] = field(default_factory=dict)
    retries: int = 0
    left: int = 0
    changed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


class Crowd:
    """People at the door: `people` of them, each one turn at a time, until `stop`."""

    def __init__(self, url: str, key: str, people: int, seed: int) -> None:
        self.url, self.people, self.rng = url, people, random.Random(seed)
        self.headers = {"Authorization": f"Bearer {key}"}
        self.ledger, self.count, self.stop = Ledger(), 0, asyncio.Event()

    async def talk(self) -> None:
        """Until `stop` is set, and then until everything that was begun is acknowledged."""
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=20)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self.headers) as self.http:
            await asyncio.gather(*(self._person(number) for number in range(self.people)))

    async def _person(self, number: int) -> None:
        conversation: str | None = None
        while not self.stop.is_set():
            self.count += 1
            stream = self.rng.random() < 0.5
            turn = Turn(
                key=f"turn-{self.count}", user=f"person-{number}",
                text=f"Turn {self.count}: tell me what happened then, and how it ended, please.", stream=stream,
                leave=stream and self.rng.random() < 0.2, again=self.rng.random() < 0.1, conversation=conversation,
            )  # fmt: skip
            answer = await self._until_acknowledged(turn)
            self.ledger.acknowledged[turn] = answer
            if turn.again and await self._until_acknowledged(turn._replace(leave=False)) != answer:
                self.ledger.changed.append(turn.key)
            conversation = answer.conversation if self.rng.random() < 0.6 else None
            if self.rng.random() < 0.5:
                self.ledger.hearts[answer.reply] = await self._heart(turn, answer)

    async def _until_acknowledged(self, turn: Turn) -> Answer:
        body: dict[str, Any] = {
            "model": servers.CHARACTER, "messages": [{"role": "user", "content": turn.text}], "user": turn.user,
            "stream": turn.stream,
        }  # fmt: skip
        if turn.conversation:
            body["flywheel_conversation"] = turn.conversation
        leave = turn.leave
        while True:
            read = partial(self._streamed, leave=leave) if turn.stream else _whole
            answer = await self._try("chat/completions", turn.key, body, read)
            if answer is not None:
                return answer
            leave = False  # once is enough
            self.ledger.retries += 1

    async def _heart(self, turn: Turn, answer: Answer) -> str:
        body = {"message_id": answer.reply, "kind": "love", "user": turn.user}
        while (id := await self._try("feedback", f"heart-{turn.key}", body, _id)) is None:
            self.ledger.retries += 1
        return id

    async def _try(self, path: str, key: str, body: Mapping[str, Any], read: Read[Found]) -> Found | None:
        """One try; None where the service was away, asked us to come back, or broke off."""
        try:
            headers = {"Idempotency-Key": key}
            async with self.http.post(f"{self.url}/{path}", json=body, headers=headers) as response:
                if response.status == 200:
                    return await read(response)
                if response.status not in (429, 503):
                    self.ledger.refused.append(f"{response.status} {await response.text()}")
        except (aiohttp.ClientError, ConnectionError, TimeoutError):
            pass  # killed: that is what this is about
        await asyncio.sleep(0.05)
        return None

    async def _streamed(self, response: aiohttp.ClientResponse, leave: bool) -> Answer | None:
        """The answer once its last chunk came; None where the stream ended before, or we left."""
        text, finished, found = "", False, None
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                return None
            found = chunk
            choice = chunk["choices"][0]
            text += choice["delta"].get("content") or ""
            finished = finished or choice["finish_reason"] is not None
            if leave and text:
                self.ledger.left += 1
                response.close()
                return None
        if not finished or found is None:
            return None
        return Answer(found["flywheel_message"], found["id"], found["flywheel_conversation"], text)


async def _id(response: aiohttp.ClientResponse) -> str:
    return str((await response.json())["id"])


async def _whole(response: aiohttp.ClientResponse) -> Answer:
    found = await response.json()
    text = found["choices"][0]["message"]["content"]
    return Answer(found["flywheel_message"], found["id"], found["flywheel_conversation"], text)


class Findings(NamedTuple):
    """Acknowledged events that the store lacks or holds in other words, and events that it holds twice."""

    missing: list[str]
    doubled: list[str]
    rows: dict[str, int]


def examine(query: Query, ledger: Ledger) -> Findings:
    """Compare the store with what the clients know; they may go on talking meanwhile."""
    acknowledged, hearts = dict(ledger.acknowledged), dict(ledger.hearts)  # before the store is read
    messages = {row[0]: row for row in query("SELECT id, role, content, parent_id, finish FROM messages")}
    signals = {row[0]: row for row in query("SELECT id, message_id, kind FROM signals")}
    missing = []
    for turn, answer in acknowledged.items():
        if (asked := messages.get(answer.asked)) is None or asked[2] != turn.text:
            missing.append(f"utterance {answer.asked} of {turn.key}: {asked and asked[2]!r}")
        if (reply := messages.get(answer.reply)) is None or reply[2].strip() != answer.text.strip():
            missing.append(f"reply {answer.reply} of {turn.key}: {reply and reply[2]!r}, acknowledged {answer.text!r}")
    missing += [f"heart {id} for {reply}" for reply, id in hearts.items() if id not in signals]
    once = {
        "message id": "SELECT id FROM messages GROUP BY id HAVING COUNT(*) > 1",
        "signal id": "SELECT id FROM signals GROUP BY id HAVING COUNT(*) > 1",
        "utterance": "SELECT content, COUNT(*) FROM messages WHERE role = 'user' GROUP BY content HAVING COUNT(*) > 1",
        "reply": "SELECT parent_id FROM messages WHERE role = 'assistant' AND finish <> 'cancelled' "
        "GROUP BY parent_id HAVING COUNT(*) > 1",
        "heart": "SELECT message_id FROM signals WHERE kind = 'love' GROUP BY message_id HAVING COUNT(*) > 1",
    }  # fmt: skip
    doubled = [f"{what} {row[0]}" for what, ask in once.items() for row in query(ask)]
    doubled += [f"answer to {key} changed when it was asked for again" for key in ledger.changed]
    count = {table: query(f"SELECT COUNT(*) FROM {table}")[0][0] for table in ("messages", "signals", "conversations")}
    return Findings(missing, doubled, count)


async def suffer(server: servers.Server, crowd: Crowd, query: Query, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill and restart under load; look after every restart and at the end."""
    server.start()
    talking = asyncio.create_task(crowd.talk())
    restarts, missing, began = [], 0, time.monotonic()
    for number in range(kills):
        await asyncio.sleep(rng.uniform(0.1, 0.8))
        server.kill()
        restarts.append(await asyncio.to_thread(server.start))
        found = await asyncio.to_thread(examine, query, crowd.ledger)
        missing = max(missing, len(found.missing))
        if number % 10 == 9 or found.missing:
            _say(f"  {number + 1} kills, {len(crowd.ledger.acknowledged)} turns acknowledged, {found.missing[:1]}")
    crowd.stop.set()
    await asyncio.wait_for(talking, 60)
    await asyncio.to_thread(server.stop)
    ledger, found = crowd.ledger, examine(query, crowd.ledger)
    return {
        "kills": kills, "seconds": time.monotonic() - began, "turns_acknowledged": len(ledger.acknowledged),
        "streamed": sum(turn.stream for turn in ledger.acknowledged), "feedback_acknowledged": len(ledger.hearts),
        "asked_again": sum(turn.again for turn in ledger.acknowledged),
        "retries": ledger.retries, "left_streams": ledger.left,
        "refused": len(ledger.refused), "refusals": ledger.refused[:5],
        "missing": max(missing, len(found.missing)), "duplicates": len(found.doubled),
        "examples": [*found.missing[:5], *found.doubled[:5]], "rows": found.rows,
        "restart_s_median": record.median(restarts) if restarts else None,
    }  # fmt: skip


@contextlib.contextmanager
def database(kind: str, scratch: Path) -> Iterator[tuple[str | None, Query]]:
    """A database's address (None: the workspace's file), and a way to ask it that is not ours."""
    if kind == "sqlite":
        path = scratch / "product" / "flywheel.db"

        def ask(sql: str) -> Rows:
            with contextlib.closing(sqlite3.connect(path, timeout=30)) as connection:
                return connection.execute(sql).fetchall()

        yield None, ask
        problems = ask("PRAGMA integrity_check")
        assert problems == [("ok",)], problems
        return
    import psycopg  # noqa: PLC0415

    with servers.postgres(scratch / "postgres") as url:

        def ask_server(sql: str) -> Rows:
            with psycopg.connect(url) as connection:
                return connection.execute(sql.encode()).fetchall()

        yield url, ask_server


def trial(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """All kills on one kind of database."""
    _say(f"{kind}: {args.kills} kills")
    with tempfile.TemporaryDirectory() as folder, database(kind, Path(folder)) as (url, query):
        product = Path(folder) / "product"
        key = servers.workspace(product, f"[server]\n{UNLIMITED}" + (f'[store]\nurl = "{url}"\n' if url else ""))
        server = servers.flywheel(product, "--backend", "echo")
        crowd = Crowd(server.url, key, args.people, args.seed)
        try:
            return asyncio.run(suffer(server, crowd, query, args.kills, random.Random(args.seed)))
        finally:
            server.kill()


def trace(requests: int = 20) -> dict[str, Any]:
    """How many answers ended after the database was synced for them, by strace; one at a time, every other streamed."""
    with tempfile.TemporaryDirectory() as folder:
        product, calls = Path(folder) / "product", Path(folder) / "calls"
        key = servers.workspace(product)
        watched = "trace=recvfrom,read,fsync,fdatasync,sendto,write,writev,sendmsg"
        prefix = ("strace", "-f", "-y", "-s", "200", "-e", watched, "-o", str(calls))
        server = servers.flywheel(product, "--backend", "echo", prefix=prefix)

        async def ask() -> None:
            headers = {"Authorization": f"Bearer {key}"}
            async with aiohttp.ClientSession(headers=headers) as http:
                for i in range(requests):
                    said = [{"role": "user", "content": f"Request {i}"}]
                    body = {"model": servers.CHARACTER, "messages": said, "stream": i % 2 == 1}
                    async with http.post(f"{server.url}/chat/completions", json=body) as response:
                        assert response.status == 200, await response.text()
                        await response.read()

        with servers.running(server):
            asyncio.run(ask())
        return _synced(calls.read_text(encoding="utf-8", errors="replace").splitlines())


_SYNC = re.compile(r"(?:fsync|fdatasync)(?:\(\d+<[^>]*flywheel\.db[^>]*>\)| resumed>\)).*= 0$")
_ASKED = re.compile(r'"POST /v1/chat/completio')
_ENDED = re.compile(r"(?:write|writev|sendto|sendmsg)\(.*(?:application/json|finish_reason\\\\?\":\\\\?\"|DONE)")


def _synced(calls: Sequence[str]) -> dict[str, Any]:
    """Read a trace: before an answer, or the last chunk of a streamed one, the database was synced for it."""
    answers, synced, seen, waiting = 0, 0, False, False
    for call in calls:
        if _ASKED.search(call):
            seen, waiting = False, True
        elif _SYNC.search(call):
            seen = True
        elif waiting and _ENDED.search(call):
            answers, synced, waiting = answers + 1, synced + seen, False
    return {"answers": answers, "synced_before": synced}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--database", nargs="+", choices=["sqlite", "postgresql"], default=["sqlite", "postgresql"])
    parser.add_argument("--people", type=int, default=24, help="clients that talk at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trace", action="store_true", help="show the syncs before the answers (needs strace)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    figures: dict[str, Any] = record.circumstances(args, PACKAGES)
    figures |= {kind: trial(kind, args) for kind in args.database}
    done = [figures[kind] for kind in args.database]
    figures |= {name: sum(one[name] for one in done) for name in ("kills", "missing", "duplicates")}
    if args.trace:
        figures["trace"] = trace()
    names = ("kills", "turns_acknowledged", "feedback_acknowledged", "retries", "left_streams", "refused", "missing",
             "duplicates", "restart_s_median")  # fmt: skip
    record.show(figures, ["", *args.database], [[name, *(one[name] for one in done)] for name in names])
    print(f"\n{[one['examples'] for one in done]} {figures.get('trace', '')}")
    record.write(args.json, figures)
    early = args.trace and figures["trace"]["answers"] != figures["trace"]["synced_before"]
    sys.exit(1 if figures["missing"] or figures["duplicates"] or early else 0)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    main()
