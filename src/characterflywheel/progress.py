"""Progress bars for whatever takes over two seconds, and one summary line a stage.

On a terminal a bar with rate and remaining time; elsewhere (a log, CI) a plain line every ten seconds. Both go to
standard error, so that standard output carries results only.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

PATIENCE_SECONDS = 2.0
LINE_SECONDS = 10.0


class Advance(Protocol):
    """What a stage calls: `done` of `total` items are finished."""

    def __call__(self, done: int, total: int, /) -> None: ...


@contextmanager
def progress(
    description: str,
    total: int | None = None,
    *,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Advance]:
    """Show how far some work is. Yields a callback `(done, total)`; nothing is shown in the first two seconds."""
    console = console or Console(stderr=True)
    show = _Bar(description, total, console) if console.is_terminal else _Lines(description, console, clock)
    started = clock()

    def advance(done: int, total: int, /) -> None:
        if clock() - started >= PATIENCE_SECONDS:
            show.update(done, total)

    try:
        yield advance
    finally:
        show.close()


def announce(stage: str, line: str, *, console: Console | None = None) -> None:
    """One summary line a stage: its name, its time, what came out."""
    (console or Console(stderr=True)).print(
        f"[bold]{escape(stage):<20}[/bold] {escape(line)}", highlight=False, soft_wrap=True
    )


class _Bar:
    """A bar that removes itself when the work is done, as the stage's summary line takes its place."""

    def __init__(self, description: str, total: int | None, console: Console) -> None:
        self.bar = Progress(
            TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn(),
            console=console, transient=True, refresh_per_second=4,
        )  # fmt: skip
        self.task = self.bar.add_task(escape(description), total=total)

    def update(self, done: int, total: int) -> None:
        self.bar.start()
        self.bar.update(self.task, completed=done, total=total)

    def close(self) -> None:
        self.bar.stop()


class _Rate(ProgressColumn):
    """Items a second, to two digits."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.2g}/s" if speed else "")


class _Lines:
    """Lines for a log: never more often than every ten seconds."""

    def __init__(self, description: str, console: Console, clock: Callable[[], float]) -> None:
        self.description, self.console, self.clock = description, console, clock
        self.started = self.last = clock()

    def update(self, done: int, total: int) -> None:
        now = self.clock()
        if done == 0 or now - self.last < LINE_SECONDS:
            return
        self.last = now
        rate = done / (now - self.started)
        left = (total - done) / rate
        line = f"{self.description:<20} {done}/{total}, {rate:.2g}/s, {left:.0f} s left"
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Lines need no cleaning up."""
