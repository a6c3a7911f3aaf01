"""Is the crowd like the people it was fitted to? Real against simulated distributions (DESIGN section 7).

Simulated people are given real people's answers, as the real ones were, so what differs is the crowd's doing and not
the model's.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import special

from ..ids import derive_seed
from ..records import Record
from .chitchat import WEEK, words
from .lore import Lore
from .reactions import p_continue, utility
from .talking import MOOD
from .users import Column, draw_crowd

LONGEST = 400
SHOWN = (10, 25, 50, 75, 90)
SPEAKERS = 300


class Comparison(Record):
    """One measure: percentiles 10, 25, 50, 75, 90 of both, and the largest distance between the two distributions.

    `distance` is Kolmogorov and Smirnov's: the largest difference in the share of people below any value.
    """

    measure: str
    real: tuple[float, ...]
    simulated: tuple[float, ...]
    distance: float
    n: int


def measure(lore: Lore, n: int, seed: int) -> tuple[Comparison, ...]:
    """Compare stays (turns), words a turn, pauses (seconds), days of the six after a visit, and ratings."""
    rng = np.random.default_rng(derive_seed(seed, "fidelity"))
    crowd = draw_crowd(lore.real.fits, n, seed, "fidelity")
    stays, liking = np.ones(n), np.zeros(n)
    there = np.arange(n)
    for _ in range(LONGEST):
        who = crowd[there]
        value = utility(lore.answers[rng.integers(0, len(lore.answers), there.size)], who, lore.anchor)
        liking[there] += value
        going = rng.random(there.size) < p_continue(value, who)
        there = there[going]
        stays[there] += 1
    pauses = np.clip(np.exp(crowd.pause + lore.real.fits.lag.within * rng.standard_normal(n)), 1, 600)
    came = rng.random((WEEK, n)) < special.expit(crowd.visit)
    speakers = crowd[np.arange(min(n, SPEAKERS))]
    heard = [lore.words.answers[i] for i in rng.integers(0, len(lore.words.answers), len(speakers))]
    spoken = lore.words.answer(speakers, heard, [{text} for text in heard], rng)
    simulated: dict[str, Column | list[float]] = {
        "stay": stays,
        "words": [float(len(words(text))) for text in spoken],
        "lag": pauses,
        "days": came[1:].sum(axis=0).astype(np.float64),
        "rating": [lore.rating(value) for value in liking / stays + MOOD * rng.standard_normal(n)],
    }
    return tuple(compare(name, lore.real.observed[name], np.asarray(values)) for name, values in simulated.items())


def compare(measure: str, real: Sequence[float], simulated: NDArray[np.float64]) -> Comparison:
    """Compare a sample with the 101 percentiles of a real distribution."""
    grid = np.unique(np.concatenate([np.asarray(real), simulated]))
    below_real = np.searchsorted(np.sort(np.asarray(real)), grid, side="right") / len(real)
    below_simulated = np.searchsorted(np.sort(simulated), grid, side="right") / len(simulated)
    return Comparison(
        measure=measure,
        real=tuple(round(real[percent], 3) for percent in SHOWN),
        simulated=tuple(np.round(np.percentile(simulated, SHOWN), 3).tolist()),
        distance=round(float(np.abs(below_real - below_simulated).max()), 4),
        n=len(simulated),
    )
