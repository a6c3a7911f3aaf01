"""UUIDv7 identifiers (RFC 9562) and seeds derived from names.

A simulated crowd and a resumed run must produce the same ids, so ids can be drawn from a given clock and a
seeded generator; without them they come from the wall clock and the operating system.
"""

import hashlib
import os
import random
import threading
import time
import uuid
from datetime import UTC, datetime


class _Randomness:
    """Bits from the operating system, asked for by the block: where system calls are dear, one an id costs too much."""

    def __init__(self) -> None:
        self._lock, self._block, self._at = threading.Lock(), b"", 0
        os.register_at_fork(after_in_child=self.__init__)  # type: ignore[misc]

    def getrandbits(self, bits: int) -> int:
        size = (bits + 7) // 8
        with self._lock:
            if self._at + size > len(self._block):
                self._block, self._at = os.urandom(4096), 0
            taken = self._block[self._at : self._at + size]
            self._at += size
        return int.from_bytes(taken, "big") >> (8 * size - bits)


_FRESH = _Randomness()


def uuid7(at: datetime | None = None, rng: random.Random | None = None) -> str:
    """A version-7 UUID whose first 48 bits are milliseconds since 1970 at `at` (now if None)."""
    milliseconds = int(at.timestamp() * 1000) if at else time.time_ns() // 1_000_000
    bits = (rng or _FRESH).getrandbits(74)
    value = (milliseconds & (1 << 48) - 1) << 80 | 0x7 << 76 | (bits >> 62) << 64 | 0b10 << 62 | bits & (1 << 62) - 1
    return str(uuid.UUID(int=value))


def derive_id(*parts: object, at: datetime | None = None) -> str:
    """A UUIDv7 that is a function of `parts` (and of the time `at`): the same parts give the same id.

    This makes derived rows idempotent: a killed stage that runs again writes the same ids.
    """
    moment = at or datetime(2026, 1, 1, tzinfo=UTC)
    return uuid7(moment, random.Random(derive_seed(*parts)))


def prompt_id(message_id: str, at: datetime) -> str:
    """The id of the prompt that ends with a user's message, written `at`; erasure finds dropped prompts by it."""
    return derive_id("prompt", message_id, at=at)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from a name, e.g. `derive_seed(config.seed, "sft", 3)`; independent for different parts."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
