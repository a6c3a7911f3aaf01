"""One of several processes that train together: `torchrun -m characterflywheel.training.worker JOB` (see `launch`)."""

import os
import pickle
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from ..errors import FlywheelError
from ..pipeline import peak_memory_mb
from .launch import LIFELINE, PROGRESS, Failure, Job, Result, opened
from .parallel import Parallel


def main(path: Path) -> int:
    """Do this process's part of the job; the main one writes the result. Returns the exit status."""
    if os.environ.get(LIFELINE):
        threading.Thread(target=_die_with_the_parent, daemon=True).start()
    rank = int(os.environ.get("RANK", "0"))
    try:
        result = _work(pickle.loads(path.read_bytes()))
    except Exception as error:  # the boundary of this process: told to the parent, which raises it again
        told = str(error) if isinstance(error, FlywheelError) else None
        _tell_first(path.with_name("failure.pickle"), Failure(rank, told, traceback.format_exc()))
        traceback.print_exc()
        return 1
    if rank == 0:
        writing = path.with_name("result.writing")
        writing.write_bytes(pickle.dumps(result))
        writing.replace(path.with_name("result.pickle"))
    return 0


def _work(job: Job) -> Result:
    settings: dict[str, Any] = dict(job.settings)
    parallel = Parallel.join(job.parallel.sharding, settings.get("device", "cpu"))
    if parallel.world != job.parallel.processes:
        raise FlywheelError(
            f"{parallel.world} workers were started, [parallel] processes is {job.parallel.processes}: "
            "they must be the same."
        )
    settings["device"] = device = parallel.device or "cpu"
    if "threads" in settings and device == "cpu":
        settings["threads"] = max(1, settings["threads"] // parallel.local)
    arguments, settings = opened(job.arguments, settings, device)
    advance = _tell_progress if parallel.main else _say_nothing
    summary = job.function(job.work, *arguments, parallel=parallel, on_progress=advance, **settings)
    peaks = parallel.gather([peak_memory_mb()])
    noted = f"{parallel.world} processes, sharding {parallel.sharding}, {max(peaks):.0f} MiB of memory at most each"
    parallel.leave()
    return Result(summary, {**job.work.notes, "trained by": noted})


def _tell_progress(done: int, total: int, /) -> None:
    print(PROGRESS, done, total, flush=True)


def _say_nothing(done: int, total: int, /) -> None:
    """Only the main process tells how far it is."""


def _tell_first(path: Path, failure: Failure) -> None:
    """Keep the first failure: the others' follow from it."""
    try:
        with path.open("xb") as file:
            file.write(pickle.dumps(failure))
    except FileExistsError:
        pass


def _die_with_the_parent() -> None:
    """Nobody writes to standard input: reading ends when the process that started the workers is gone."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
