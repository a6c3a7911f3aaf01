"""Identifiers for many rows at once: a simulated week has hundreds of thousands (DESIGN section 7, scale)."""

import numpy as np
from numpy.typing import NDArray


def uuid7_column(milliseconds: NDArray[np.int64], seed: int) -> list[str]:
    """A version-7 UUID (RFC 9562) for each time in milliseconds since 1970; a function of both arguments."""
    rng = np.random.default_rng(seed)
    n = len(milliseconds)
    high = milliseconds.astype(np.uint64) << np.uint64(16) | np.uint64(0x7000) | rng.integers(0, 1 << 12, n, np.uint64)
    low = np.uint64(1 << 63) | rng.integers(0, 1 << 62, n, np.uint64)
    text = np.column_stack([high, low]).astype(">u8").tobytes().hex()
    cuts = ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32))
    rows = (text[i : i + 32] for i in range(0, 32 * n, 32))
    return ["-".join([row[a:b] for a, b in cuts]) for row in rows]
