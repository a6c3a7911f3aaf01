"""How much a key and a user may ask: token buckets (DESIGN section 10, HTTP: 429 with Retry-After).

A bucket is one number, the moment when it will be full again (the generic cell rate algorithm). Buckets lie in two
generations: one that was looked at moves to the young one, and what is left in the old one is dropped together, after
the time in which any bucket fills up, or earlier where too many people came. Memory is bounded and nothing is swept.
Several processes of a service each count for themselves.
"""

import time
from collections.abc import Callable

from ..errors import FlywheelError


class RateLimiter:
    """At most `burst` requests at once and `per_minute` in the long run, for each name.

    Args:
        per_minute: how many tokens a bucket regains in a minute.
        burst: how many it holds; a minute's worth if not said.
        most: how many buckets are kept. Where more people come within the time that fills a bucket, those who have
            not been seen for longest start with a full one.
        clock: seconds that never go backwards.
    """

    def __init__(
        self, per_minute: float, burst: float | None = None, most: int = 200_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        if per_minute <= 0:
            raise FlywheelError(f"per_minute = {per_minute:g}, must be above 0.")
        if burst is not None and burst < 1:
            raise FlywheelError(f"burst = {burst:g}, must be at least 1: a smaller bucket lets nobody pass.")
        self._interval = 60.0 / per_minute
        self._depth = self._interval * max(1.0, per_minute if burst is None else burst)
        self._half = max(1, most // 2)
        self._clock = clock
        self._young: dict[str, float] = {}
        self._old: dict[str, float] = {}
        self._turned = clock()

    def take(self, who: str) -> float | None:
        """Take a token from this name's bucket: None, or, where it is empty, the seconds until there is one."""
        now = self._clock()
        full = self._young.get(who)
        if full is None:
            if len(self._young) >= self._half or now - self._turned > self._depth:
                self._old, self._young, self._turned = self._young, {}, now
            full = self._old.pop(who, now)
        after = max(full, now) + self._interval
        wait = after - now - self._depth
        if wait > 1e-9:  # less is rounding
            self._young[who] = full
            return wait
        self._young[who] = after
        return None

    def __len__(self) -> int:
        """How many buckets are kept."""
        return len(self._young) + len(self._old)
