"""Trainers side by side: each in a process of its own with its own peak memory, taking turns at their steps.

A side is a function that trains and calls `turn.over(...)` after every optimiser step; it waits there until it is its
turn again. Seconds by part come from clocks around the functions that do the work, in our package and in the peer's.
"""

import functools
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
GIB = 2**30
PARTS = ("sampling", "scoring", "reference", "forward", "backward", "optimiser", "other")


class Step(NamedTuple):
    """What a side did in one turn: seconds, those of its processor cores, the parts of the former, its counts and
    losses, and its memory at most until now in bytes."""

    seconds: float
    core_seconds: float
    parts: dict[str, float]
    figures: dict[str, float]
    peak: int


class Turn:
    """The child's end: a clock by part, and the end of a turn."""

    def __init__(self, pipe: Connection, device: str) -> None:
        self.pipe, self.device = pipe, device
        self.spent: dict[str, float] = defaultdict(float)
        self.added: dict[str, float] = {}
        self.inside = False
        self.began, self.used = self.now(), time.process_time()

    def now(self) -> float:
        if self.device != "cpu":
            import torch  # noqa: PLC0415

            torch.cuda.synchronize()
        return time.perf_counter()

    def clock(self, owner: Any, name: str, part: str) -> None:
        """Count the time that `owner.name` takes as `part`'s, unless it runs inside another part."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return original(*args, **kwargs)
            self.inside, began = True, self.now()
            try:
                return original(*args, **kwargs)
            finally:
                self.spent[part] += self.now() - began
                self.inside = False

        setattr(owner, name, timed)

    def once(self, owner: Any, name: str, part: str, *, share: int) -> None:
        """Add one `share`-th of the seconds that `owner.name` takes, before the first turn, to every turn as `part`."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.inside, began = True, self.now()
            try:
                return original(*args, **kwargs)
            finally:
                self.added[part] = self.added.get(part, 0.0) + (self.now() - began) / share
                self.inside = False

        setattr(owner, name, timed)

    def over(self, **figures: float) -> None:
        """Report the step and wait for the next turn."""
        seconds = self.now() - self.began
        parts = {part: self.spent[part] for part in PARTS if part in self.spent}
        parts["other"] = seconds - sum(parts.values())
        parts |= self.added
        seconds += sum(self.added.values())
        self.pipe.send(Step(seconds, time.process_time() - self.used, parts, figures, self._peak()))
        self.pipe.recv()
        self.spent.clear()
        self.began, self.used = self.now(), time.process_time()

    def _peak(self) -> int:
        if self.device == "cpu":
            return resident("VmHWM")
        import torch  # noqa: PLC0415

        return torch.cuda.max_memory_allocated()


def product(turn: Turn, precision: str, threads: int) -> list[dict[str, float]]:
    """Clock our training core, which runs in `precision` ("fast" or "float32"); what every update logs from here on.

    To be called before any training stage is imported: they hold on to the functions that are clocked here.
    """
    import torch  # noqa: PLC0415

    from characterflywheel.llm import native, shared_prefix  # noqa: PLC0415

    torch.set_num_threads(threads)
    if precision == "float32":
        native.fast_dtype = lambda device="cpu": torch.float32
    turn.clock(shared_prefix, "reply_logprobs", "forward")
    turn.clock(torch.Tensor, "backward", "backward")
    turn.clock(torch.optim.AdamW, "step", "optimiser")

    from characterflywheel.training import learner  # noqa: PLC0415

    learner.CHECKPOINT_SECONDS = float("inf")  # TRL saves nothing on the way either
    log: list[dict[str, float]] = []
    update = learner.Learner.update

    def kept(self: Any, **metrics: float) -> None:
        update(self, **metrics)
        log.append(self.log[-1])

    learner.Learner.update = kept  # type: ignore[method-assign]
    return log


class Side:
    """The parent's end of one trainer; its process starts with its first step, so that no two begin at once."""

    def __init__(self, name: str, run: Callable[..., None], settings: Mapping[str, Any], device: str) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_child, args=(theirs, run, dict(settings), device), daemon=True)
        self._theirs = theirs

    def step(self) -> Step:
        """The next step; the first also builds everything."""
        if self.process.pid is None:
            self.process.start()
            self._theirs.close()
        else:
            self.pipe.send("go")
        try:
            found = self.pipe.recv()
        except EOFError as ended:
            self.process.join()
            raise SystemExit(f"{self.name} ended with status {self.process.exitcode}; see above.") from ended
        assert isinstance(found, Step)
        return found

    def end(self) -> None:
        """Stop it, wherever it is."""
        if self.process.pid is not None:
            self.process.terminate()
            self.process.join()


def take_turns(sides: Sequence[Side], repeats: int) -> dict[str, list[Step]]:
    """Every side's steps after its first; in each round all sides make one. Ends all of them."""
    found: dict[str, list[Step]] = {side.name: [] for side in sides}
    try:
        for turn in range(repeats + 1):
            for side in sides:
                last = side.step()
                first = "" if turn else " to start"
                say(f"{side.name}: {last.seconds:.1f} s, {last.core_seconds:.1f} core seconds{first}")
                if turn:
                    found[side.name].append(last)
    finally:
        for side in sides:
            side.end()
    return found


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def resident(kind: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most since its program began (ru_maxrss counts its parent's)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this system does not tell a process's {kind}.")


def limit_threads(threads: int) -> None:
    """For the processes that are started from here on."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)


def middle(steps: Iterable[Step]) -> Step:
    """The step of median seconds (the lower of two)."""
    ordered = sorted(steps, key=lambda step: step.seconds)
    return ordered[(len(ordered) - 1) // 2]


def told(steps: Sequence[Step]) -> dict[str, Any]:
    """Everything about a side, its parts and seconds from the median step."""
    one = middle(steps)
    return {
        "seconds": one.seconds, "seconds_all": [s.seconds for s in steps],
        "core_seconds": [s.core_seconds for s in steps], "parts": one.parts, "peak_bytes": max(s.peak for s in steps),
        "figures": [s.figures for s in steps],
    }  # fmt: skip


def apart(make: Callable[..., T], *args: Any) -> T:
    """What `make(*args)` returns, called in a process of its own, so that what it imports stays out of this one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(make, args)
        pool.close()
        pool.join()
    return found


def _child(pipe: Connection, run: Callable[..., None], settings: dict[str, Any], device: str) -> None:
    run(Turn(pipe, device), **settings)
