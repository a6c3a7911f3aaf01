"""A value read from the store again and again, so that what was changed elsewhere takes effect within seconds.

Keys that are revoked and experiments that are stopped by a command reach a running service this way (DESIGN section
8), without a query for every request.
"""

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

from ..errors import FlywheelError

T = TypeVar("T")
_log = logging.getLogger(__name__)
_STOP_SECONDS = 10.0  # the thread may be waiting for a silent database


class Reloaded(Generic[T]):
    """What `load` returned last. The first load is made at once, and its errors are the caller's.

    After `start()` a thread loads every `seconds`, and `get` only looks; before it, `get` itself loads what is older.
    Where a load fails the last value stays, and `age` tells how old it is.
    """

    def __init__(self, load: Callable[[], T], seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._load, self._clock = seconds, load, clock
        self._value = load()
        self._loaded = self._tried = clock()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def get(self) -> T:
        """The value, at most about `seconds` old while loading works."""
        if self._thread is None and self._clock() - self._tried >= self.seconds:
            self.reload()
        return self._value

    @property
    def age(self) -> float:
        """Seconds since the value was read."""
        return self._clock() - self._loaded

    @property
    def since_tried(self) -> float:
        """Seconds since reading it was last tried."""
        return self._clock() - self._tried

    def reload(self) -> None:
        """Read the value now. A boundary: where that fails the last value stays, and the failure is in the log."""
        self._tried = begun = self._clock()
        try:
            value = self._load()
        except Exception as error:
            _log.error(
                "reading again failed; what was read %.0f s ago stays in force: %s", self.age, error,
                exc_info=not isinstance(error, FlywheelError),
            )  # fmt: skip
            return
        with self._lock:
            if begun >= self._loaded:  # else somebody who began later was faster
                self._value, self._loaded = value, begun

    def start(self) -> None:
        """Load from now on in a thread of its own, so that no request waits for it."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="reload", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop the thread."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join(_STOP_SECONDS)
            self._thread = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _run(self) -> None:
        while not self._stop.wait(self.seconds):
            self.reload()
