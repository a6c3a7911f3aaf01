"""Nothing acknowledged is lost, nothing is there twice: processes killed under load, a database that crashes, fsync."""

import multiprocessing
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import journal_load
import pytest

from characterflywheel.store import EventStore
from postgres_server import PostgresServer

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["characterflywheel.store", "characterflywheel.characters"])  # quick starts


def acknowledged(file: Path) -> set[int]:
    """The numbers of the requests that were acknowledged."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {int(line.removeprefix("ack ")) for line in lines if line.startswith("ack ")}


def journal_until_killed(where: Path | str, acks: Path, seconds: float, strike: Callable[[], None] | None) -> None:
    """Journal under load, and `seconds` after the first acknowledgement kill the process, or strike elsewhere.

    It begins a hundred requests before the last acknowledged one: those are put again.
    """
    before = len(known := acknowledged(acks))
    first = max(0, max(known, default=0) - 100)
    process = _processes.Process(target=journal_load.journal_for_ever, args=(where, acks, first))
    process.start()
    deadline = time.monotonic() + 60
    while len(acknowledged(acks)) == before and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(seconds)
    strike() if strike else process.kill()
    process.join(60)
    assert process.exitcode == (0 if strike else -9)


def missing_and_repeated(where: Path | str, acks: Path) -> tuple[int, int]:
    """Rows of acknowledged requests that are not in the store, and rows that are there more than once."""
    with EventStore.open(where) as store, store.read() as connection:
        ids = [
            *connection.exec_driver_sql("SELECT id FROM messages").scalars(),
            *connection.exec_driver_sql("SELECT id FROM signals").scalars(),
        ]
        halves = connection.exec_driver_sql(
            "SELECT count(*) FROM messages LEFT JOIN signals ON signals.message_id = messages.id "
            "WHERE messages.role = 'assistant' AND signals.id IS NULL"
        ).scalar_one()
    assert halves == 0  # a request is there whole or not at all
    wanted = {f"{row}-{number}" for number in acknowledged(acks) for row in "qrs"}
    return len(wanted - set(ids)), len(ids) - len(set(ids))


@pytest.mark.parametrize("rounds", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_nothing_acknowledged_is_lost_when_the_process_is_killed(
    where: Path | str, tmp_path: Path, rounds: int
) -> None:
    rng = random.Random(rounds)
    for _ in range(rounds):
        journal_until_killed(where, tmp_path / "acks", rng.uniform(0, 0.15), None)
        assert missing_and_repeated(where, tmp_path / "acks") == (0, 0)
    print(f"{rounds} kills, {len(acknowledged(tmp_path / 'acks'))} acknowledged requests, missing 0, repeated 0")
    assert len(acknowledged(tmp_path / "acks")) > rounds


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_nothing_acknowledged_is_lost_when_the_server_crashes(
    postgres: PostgresServer, tmp_path: Path, rounds: int
) -> None:
    rng, where = random.Random(rounds), postgres.new_database()
    for _ in range(rounds):
        journal_until_killed(where, tmp_path / "acks", rng.uniform(0, 0.3), lambda: postgres.stop("immediate"))
        postgres.start()
        assert missing_and_repeated(where, tmp_path / "acks") == (0, 0)
    print(f"{rounds} crashes, {len(acknowledged(tmp_path / 'acks'))} acknowledged requests, missing 0, repeated 0")
    assert (tmp_path / "acks").read_text().count("unavailable") == rounds


def test_a_commit_is_synced_to_disk_before_it_is_acknowledged(
    where: Path | str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """strace sees the client and the server: write to the log, fdatasync of the log, then `ack`; for each request."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not on this machine")
    server: list[str | Path] = []
    if not isinstance(where, Path):
        pid = (request.getfixturevalue("postgres").data / "postmaster.pid").read_text().split()[0]
        server = ["-p", pid]
    EventStore.open(where).close()
    trace, acks = tmp_path / "trace", tmp_path / "acks"
    tracer = subprocess.Popen(
        [strace, "-I", "2", "-f", "-y", "-o", trace, "-e", "trace=write,pwrite64,fsync,fdatasync", *server,
         sys.executable, journal_load.__file__, str(where), acks, "20"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(acknowledged(acks)) < 20 and tracer.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    tracer.terminate()  # the server goes on untraced
    _, said = tracer.communicate(timeout=60)
    if "ptrace" in said.lower():
        pytest.skip(f"strace may not trace here: {said.strip()}")
    steps = " ".join(log_steps(trace.read_text()))
    assert steps.count("ack") == 20, said
    assert re.match(r"((write )+(sync )+)*((write )+(sync )+ack ?){20}", steps), steps


def log_steps(trace: str) -> list[str]:
    """What happened to the database's log, and the acknowledgements, in order: `write`, `sync` (when done), `ack`."""
    steps: list[str] = []
    begun: dict[str, str] = {}
    for line in trace.splitlines():
        pid, _, call = line.partition(" ")
        call = call.strip()
        if call.startswith("<... "):
            call = begun.pop(pid, "")
        elif call.endswith("<unfinished ...>"):
            begun[pid] = call
            if "sync(" in call:
                continue  # counts when it is done
        if '"ack ' in call:
            steps.append("ack")
        elif "-wal>" in call or "/pg_wal/" in call:
            steps.append("sync" if "sync(" in call else "write")
    return steps
