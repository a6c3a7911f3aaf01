"""Run a training stage's function in several processes and wait for them (DESIGN section 9).

Nothing here schedules machines: torchrun starts the workers, or the command that `[parallel] launch` names does. Each
worker calls the same function with the same inputs and its own `Parallel`. What the function needs lies beside its
partial results, as a pickle that this process wrote and only its workers read.
"""

import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..config import ParallelConfig
from ..errors import FlywheelError
from ..pipeline import Work, release_memory
from ..progress import Advance

S = TypeVar("S")
PROGRESS = "flywheel-progress"
LIFELINE = "FLYWHEEL_LIFELINE"
PATIENCE_SECONDS = 40.0  # torchrun gives its workers 30 to end


@dataclass(frozen=True)
class Later:
    """An argument that every worker opens for itself, as it cannot be sent: `open(device)`, or that attribute of it.

    Arguments with one `open` are parts of one thing, which is opened once.
    """

    open: Callable[[str], Any]
    part: str | None = None


def opened(arguments: Sequence[Any], settings: Mapping[str, Any], device: str) -> tuple[list[Any], dict[str, Any]]:
    """Arguments and settings, with what they open on this device."""
    made: dict[int, Any] = {}

    def one(value: Any) -> Any:
        if not isinstance(value, Later):
            return value
        key = id(value.open)  # also what cannot be hashed or compared; a pickle keeps who is who
        if key not in made:
            made[key] = value.open(device)
        return made[key] if value.part is None else getattr(made[key], value.part)

    return [one(value) for value in arguments], {name: one(value) for name, value in settings.items()}


@dataclass(frozen=True)
class Job:
    """What every worker is told: `function(work, *arguments, **settings)`."""

    function: Callable[..., Any]
    work: Work
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    parallel: ParallelConfig


@dataclass(frozen=True)
class Failure:
    """The first worker's error. `told` is one a user can act on, in words; else `trace` is all there is."""

    rank: int
    told: str | None
    trace: str


@dataclass(frozen=True)
class Result:
    """What the main worker returned, and what it noted for `artifact.json`."""

    summary: Any
    notes: dict[str, str]


def spread(
    parallel: ParallelConfig, function: Callable[..., S], work: Work, *arguments: Any, on_progress: Advance,
    **settings: Any,
) -> S:  # fmt: skip
    """`function(work, *arguments, on_progress=..., **settings)`, here or by `parallel.processes` workers.

    With more than one, the function is also given `parallel` and its worker's `device`; `threads` are shared out.

    Raises:
        FlywheelError: a worker failed or died. What it had checkpointed is kept: run again to go on from there.
    """
    if parallel.processes == 1:
        device = settings.get("device", "cpu")
        here, named = opened(arguments, settings, device)
        return function(work, *here, on_progress=on_progress, **named)
    release_memory()  # the workers' GPUs are this process's too
    places = {name: work.partial / f"{name}.pickle" for name in ("job", "result", "failure")}
    for place in places.values():
        place.unlink(missing_ok=True)
    places["job"].write_bytes(pickle.dumps(Job(function, work, arguments, settings, parallel)))
    log = work.partial / "workers.log"
    status = _run(command(parallel, places["job"]), log, on_progress)
    if status != 0 or not places["result"].exists():
        failure = pickle.loads(places["failure"].read_bytes()) if places["failure"].exists() else None
        raise FlywheelError(_explain(status, failure, log))
    result: Result = pickle.loads(places["result"].read_bytes())
    work.notes |= result.notes
    return result.summary  # type: ignore[no-any-return]


def command(parallel: ParallelConfig, job: Path) -> list[str]:
    """The words that start the workers of a job."""
    torchrun = (
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={parallel.processes}",
    )  # fmt: skip
    return [*(parallel.launch or torchrun), "-m", "characterflywheel.training.worker", str(job)]


def _run(words: Sequence[str], log: Path, on_progress: Advance) -> int:
    """Start the workers, pass their progress on, and end them with this process however it ends.

    They hold the other end of a pipe to this process: when it is gone, so are they.
    """
    with log.open("w", encoding="utf-8") as errors:
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
                env={**os.environ, LIFELINE: "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            )  # fmt: skip
        except OSError as error:
            raise FlywheelError(
                f"{words[0]!r} cannot be started ({error.strerror}): look at [parallel] launch."
            ) from None
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(PROGRESS):
                    done, total = map(int, line.split()[1:])
                    on_progress(done, total)
                else:
                    sys.stderr.write(line)
            return process.wait()
        finally:
            if process.poll() is None:
                _end(process)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _end(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _explain(status: int, failure: Failure | None, log: Path) -> str:
    if failure is not None and failure.told is not None:
        return failure.told
    again = "Run the same command again: training goes on from its last checkpoint."
    killed = re.search(
        r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*-(\d+)", log.read_text("utf-8", "replace"), re.DOTALL
    )
    if killed:
        name = signal.Signals(int(killed[2])).name
        why = " (the system does that when memory runs out)" if name == "SIGKILL" else ""
        return f"training worker {killed[1]} was ended by {name}{why}; log: {log}. {again}"
    if failure is not None:
        return f"training worker {failure.rank} failed: {failure.trace.strip().splitlines()[-1]}; log: {log}. {again}"
    return f"the training workers ended with status {status} and without a result; log: {log}. {again}"
