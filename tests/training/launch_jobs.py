"""Functions that the tests of `launch` run in workers."""

import os
import signal
import time
from pathlib import Path

from characterflywheel.errors import FlywheelError
from characterflywheel.pipeline import Work
from characterflywheel.progress import Advance
from characterflywheel.training.parallel import Parallel


def add(
    work: Work, numbers: list[float], offset: float, *, threads: int, device: str = "cpu",
    on_progress: Advance = lambda done, total: None, parallel: Parallel | None = None,
) -> tuple[float, int]:  # fmt: skip
    """The numbers' sum and the threads that one process has."""
    parallel = parallel or Parallel.alone()
    work.notes["device"] = device
    on_progress(1, 2)
    total = parallel.sum(sum(parallel.share(numbers)))
    on_progress(2, 2)
    return total + offset, threads


def refuse(work: Work, rank: int, *, device: str = "cpu", on_progress: Advance, parallel: Parallel) -> None:
    """One process finds bad input while the other waits for it."""
    if parallel.rank == rank:
        raise FlywheelError("rate == -1, must be > 0.")
    parallel.barrier()


def crash(work: Work, rank: int, *, device: str = "cpu", on_progress: Advance, parallel: Parallel) -> None:
    if parallel.rank == rank:
        raise ZeroDivisionError("a programmer's mistake")
    parallel.barrier()


def die(work: Work, rank: int, *, device: str = "cpu", on_progress: Advance, parallel: Parallel) -> None:
    """One process is killed, as by the system when memory runs out."""
    if parallel.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    parallel.barrier()


def wait(work: Work, *, device: str = "cpu", on_progress: Advance, parallel: Parallel) -> None:
    """Every process writes its number down and goes on until it is ended."""
    (work.folder / f"pid-{parallel.rank}").write_text(str(os.getpid()), "utf-8")
    parallel.barrier()
    on_progress(1, 2)
    while True:
        time.sleep(0.1)


def open_offset(device: str) -> float:
    """What a worker opens for itself."""
    return float(len(device))


def pids(folder: Path) -> list[int]:
    return [int(path.read_text("utf-8")) for path in sorted(folder.glob("pid-*"))]
