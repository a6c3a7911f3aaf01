"""Find any of many byte strings in a file of any size, in one pass: what an erasure proves itself with.

Every needle is known by its last eight bytes. Each place of the data is looked up in a table of their hashes, eight
places at a time through NumPy, and only where the table says yes are bytes compared; so a hundred thousand needles
cost as much as one. A match is exact: nothing is missed, nothing is guessed.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import escape
from numpy.typing import NDArray

SHORTEST = 8
"""A needle has at least so many bytes."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_AT_ONCE = 1 << 24


class Hit(NamedTuple):
    """A needle, by its number, and where it begins, in bytes."""

    needle: int
    start: int


class Scanner:
    """Looks for `needles`, each at least `SHORTEST` bytes long."""

    def __init__(self, needles: Iterable[bytes]) -> None:
        self.needles = tuple(needles)
        if any(len(needle) < SHORTEST for needle in self.needles):
            raise ValueError(f"needle {min(self.needles, key=len)!r} is shorter than {SHORTEST} bytes")
        self._by_tail: defaultdict[int, list[int]] = defaultdict(list)
        for number, needle in enumerate(self.needles):
            self._by_tail[int.from_bytes(needle[-8:], "little")].append(number)
        self._tails = np.array(sorted(self._by_tail), np.uint64)
        self._bits = np.uint64(64 - max(12, (16 * len(self._tails)).bit_length()))  # the table fits a cache if it can
        self._table = np.zeros(1 << (64 - int(self._bits)), np.bool_)
        self._table[self._slots(self._tails)] = True
        self.longest = max(map(len, self.needles), default=0)

    def hits(self, data: bytes) -> list[Hit]:
        """Every occurrence in `data`, overlapping ones too, in order."""
        found = []
        for offset in range(8 if self.needles else 0):
            count = (len(data) - offset) // 8
            if count <= 0:
                break
            words = np.frombuffer(data, "<u8", count, offset)
            maybe = np.flatnonzero(self._table[self._slots(words)])
            for place in maybe[np.isin(words[maybe], self._tails)].tolist():
                end = offset + 8 * place + 8
                for number in self._by_tail[int(words[place])]:
                    needle = self.needles[number]
                    if data.endswith(needle, max(0, end - len(needle)), end):
                        found.append(Hit(number, end - len(needle)))
        return sorted(found, key=lambda hit: (hit.start, hit.needle))

    def in_file(self, path: Path) -> Iterator[Hit]:
        """Every occurrence in a file, read a piece at a time."""
        with path.open("rb") as file:
            before, passed = b"", 0
            while piece := file.read(_AT_ONCE):
                data = before + piece
                for needle, start in self.hits(data):
                    if start + len(self.needles[needle]) > len(before):  # else it was found in the piece before
                        yield Hit(needle, passed + start)
                kept = min(len(data), max(0, self.longest - 1))
                passed += len(data) - kept
                before = data[len(data) - kept :]

    def _slots(self, words: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return (words * _MULTIPLIER) >> self._bits


def spellings(text: str) -> set[bytes]:
    """A text as it may stand in a file: plain, as JSON with and without escapes of its letters, as HTML."""
    plain = [json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True)]
    return {one.encode("utf-8", "surrogatepass") for one in (text, *plain, str(escape(text)))}
