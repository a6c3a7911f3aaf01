"""Where a step's seconds go: sampling, scoring, forward, backward, update and so on, for `timing.jsonl`.

Seconds differ from run to run, so they are kept out of every file whose bytes a resumed run must repeat.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds by part of a step; a part that runs several times adds up."""

    def __init__(self, device: str = "cpu") -> None:
        self._device, self._seconds = device, dict[str, float]()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the block's seconds; on a GPU, with the work it queued."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self._device.startswith("cuda"):
                torch.cuda.synchronize(self._device)
            self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - started

    def lap(self) -> dict[str, float]:
        """The seconds since the last lap, rounded to 0.1 ms."""
        seconds, self._seconds = self._seconds, {}
        return {part: round(value, 4) for part, value in seconds.items()}
