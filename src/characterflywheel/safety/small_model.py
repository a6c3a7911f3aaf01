"""A small model of harm in context: character n-grams of a message and of the one before it, a linear score.

It catches some of what depends on context (PAPER section 9), where the rules read words, and costs tens of
microseconds. Its weights (`small_model.npz`) come from DiaSafety's training split (Sun et al. 2022, Apache-2.0) by
`scripts/train_safety.py`. What it is worth, and why it is not asked by default: docs/decisions/052.
"""

import math
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from ..errors import FlywheelError
from .classifiers import normalise

WEIGHTS = Path(__file__).parent / "small_model.npz"
LENGTHS = (3, 4, 5)
BITS = 16
WINDOW, STRIDE = 1000, 800  # characters; a longer text is as harmful as its worst window
_PRIME, _GOLDEN = np.uint32(16777619), np.uint32(2654435761)
_HALF, _KEPT = np.uint32(15), np.uint32(32 - BITS)
_SEEDS = {"text": 1, "context": 2}


class SmallModel:
    """A safety classifier: `unsafe` from a probability of `threshold`; see `policy.Classifier`."""

    def __init__(self, threshold: float, weights: Path = WEIGHTS) -> None:
        """Raises `FlywheelError` if the weights are missing or not of this version's shape."""
        try:
            with np.load(weights, allow_pickle=False) as file:
                self._text, self._context = (file[name].astype(np.float32) for name in _SEEDS)
                self._bias = float(file["bias"])
        except (OSError, KeyError, ValueError, BadZipFile) as error:
            raise FlywheelError(
                f"{weights} cannot be read ({type(error).__name__}): install the package again."
            ) from None
        if self._text.shape != (1 << BITS,) or self._context.shape != (1 << BITS,):
            raise FlywheelError(f"{weights} has {self._text.shape} weights, not {1 << BITS}: train it again.")
        self.threshold = threshold

    def __call__(self, text: str, context: str) -> tuple[str, ...]:
        """`unsafe` if `text`, said after `context`, is likely harmful."""
        return ("unsafe",) if self.probability(text, context) >= self.threshold else ()

    def probability(self, text: str, context: str) -> float:
        """How likely the message is harmful, from 0 to 1, where nearly half of all are, as in its training data."""
        said = normalise(text)
        worst = max(_score(self._text, said[i : i + WINDOW], "text") for i in range(0, max(len(said), 1), STRIDE))
        logit = worst + _score(self._context, normalise(context)[:WINDOW], "context") + self._bias
        return 1 / (1 + math.exp(-max(-500.0, min(500.0, logit))))


def ngrams(plain: str, field: str) -> NDArray[np.uint32]:
    """The hashed byte n-grams of a text that was made plain (FNV-1a, mixed), each below 2^16, repeats included."""
    data = np.frombuffer(f" {plain} ".encode("utf-8", "replace"), dtype=np.uint8).astype(np.uint32)
    hashed = np.full(len(data), _SEEDS[field], dtype=np.uint32)
    found = []
    for i in range(min(LENGTHS[-1], len(data))):
        hashed = hashed[: len(data) - i] ^ data[i:]
        hashed *= _PRIME
        if i + 1 in LENGTHS:
            found.append(hashed)
    every = np.concatenate(found) if found else np.zeros(0, dtype=np.uint32)
    every ^= every >> _HALF
    every *= _GOLDEN
    return every >> _KEPT


def _score(weights: NDArray[np.float32], plain: str, field: str) -> float:
    """The weights of a text's n-grams, summed, over the square root of how many there are."""
    found = ngrams(plain, field)
    return float(weights[found].sum()) / math.sqrt(max(len(found), 1))
