"""Real processes that are killed (SIGKILL) at random moments and started again, as on a machine that loses power.

A job is a function of a module, `job(folder, *arguments)`, that can be called again on what it left behind. For kills
at a named point see `killed`.
"""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import FORKS

PATIENCE = 120.0
Job = Callable[..., None]


def run(job: Job, folder: Path, *arguments: Any, kill_after: float | None = None) -> tuple[int, float]:
    """Run a job in a process of its own, to its end or until it is killed; its exit code and seconds."""
    process = FORKS.Process(target=_begin, args=(job, folder, arguments))
    (folder / "began").unlink(missing_ok=True)
    process.start()
    while not (folder / "began").exists() and process.is_alive():
        time.sleep(0.002)
    began = time.monotonic()
    process.join(PATIENCE if kill_after is None else kill_after)
    if process.is_alive():
        process.kill()
        process.join()
    code = process.exitcode
    process.close()
    assert code is not None
    return code, time.monotonic() - began


def survive(job: Job, folder: Path, *arguments: Any, kills: int, seconds: float, seed: int = 0) -> int:
    """Kill a job `kills` times, each within `seconds` of its start, then let it end; how often it was really killed."""
    chance = random.Random(seed)
    codes = [run(job, folder, *arguments, kill_after=chance.uniform(0, seconds))[0] for _ in range(kills)]
    assert set(codes) <= {0, -signal.SIGKILL}, f"a job failed by itself: {codes}"
    code, _ = run(job, folder, *arguments)
    assert code == 0
    return codes.count(-signal.SIGKILL)


def same_files(one: Path, two: Path) -> set[str]:
    """The files that two finished jobs left, which must be the same, byte for byte (partial results aside)."""
    kept = [
        {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and _counts(p)}
        for folder in (one, two)
    ]
    assert kept[0].keys() == kept[1].keys()
    different = {name for name in kept[0] if kept[0][name] != kept[1][name]}
    assert not different, f"other bytes in {different}"
    return set(kept[0])


def _counts(path: Path) -> bool:
    return ".partial" not in path.parts and path.name != "began"


def _begin(job: Job, folder: Path, arguments: tuple[Any, ...]) -> None:
    import torch  # noqa: PLC0415 - in the child, where it is there already

    torch.set_num_threads(1)
    (folder / "began").touch()
    job(folder, *arguments)
