"""The crowd: people with patience, habits and tastes, as columns of arrays (DESIGN section 7).

Patience, visits, message length and pauses follow the distributions fitted to real people (`chitchat.Fits`). Tastes
have no such data; they spread around one common taste, `TASTE`, by a third or so either way.
"""

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import special

from ..ids import derive_seed
from .chitchat import Fits
from .senses import WEIGHED

Column = NDArray[np.float64]

# What each noticed feature adds to the log-odds of writing again, at its full strength of 1.
TASTE = {
    "relevance": 1.2, "question": 0.5, "curiosity": 0.4, "in_character": 0.8, "broken_rules": -0.9, "novelty": 0.8,
    "warmth": 0.4, "humour": 0.35, "lists": -0.8, "wall": -1.0, "preachy": -0.8, "refusal": -1.6, "unsafe": -2.0,
    "unfinished": -0.9, "gibberish": -1.3, "repetition": -1.2,
}  # fmt: skip
SPREAD = 0.35
# Utilities of real answers vary by about 0.75, which flattens the chance to stay when averaged over them. Log-odds
# larger by sqrt(1 + 0.346 * 0.75 ** 2) make up for it (the usual approximation of a logistic-normal mean).
STAY_SCALE = 1.09


@dataclass(frozen=True)
class Crowd:
    """`n` people; every field has one row a person.

    Attributes:
        weights: (n, len(WEIGHED)) log-odds of writing again for each feature.
        words: mean log number of words they write; also sets the length of reply they like.
        likes_words: log(1 + words) of the reply they like best; `length_care` what a misfit costs.
        emoji_taste: log-odds for one emoji; a quarter of people dislike them.
        stay: log-odds of writing again after an answer as good as people give.
        visit: log-odds of coming on a day.
        pause: mean log seconds before they write.
        thumbs: log-odds added to every kind of feedback: most people hardly give any.
        consents: whether their words may be used for training.
    """

    weights: Column
    words: Column
    likes_words: Column
    length_care: Column
    emoji_taste: Column
    stay: Column
    visit: Column
    pause: Column
    thumbs: Column
    consents: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, people: NDArray[np.int64] | slice) -> Self:
        return type(self)(**{f.name: getattr(self, f.name)[people] for f in fields(self)})


def draw_crowd(fits: Fits, n: int, *seed: object) -> Crowd:
    """Draw `n` people; the same seed parts give the same people."""
    rng = np.random.default_rng(derive_seed("crowd", *seed))
    talkative = rng.normal(0, 1, n)
    leave = rng.beta(fits.leave.a, fits.leave.b, n)
    visit = rng.beta(fits.visit.a, fits.visit.b, n)
    common = np.array([TASTE[name] for name in WEIGHED])
    words = fits.words.mean + fits.words.between * talkative
    return Crowd(
        weights=common * np.exp(rng.normal(-(SPREAD**2) / 2, SPREAD, (n, len(WEIGHED)))),
        words=words,
        likes_words=0.5 * words + 0.5 * fits.words.mean + 0.35 + rng.normal(0, 0.25, n),
        length_care=0.9 * np.exp(rng.normal(0, SPREAD, n)),
        emoji_taste=rng.normal(0.27, 0.4, n),
        stay=-STAY_SCALE * special.logit(np.clip(leave, 1e-3, 1 - 1e-3)),
        visit=special.logit(np.clip(visit, 1e-3, 1 - 1e-3)),
        pause=fits.lag.mean + rng.normal(0, fits.lag.between, n),
        thumbs=rng.normal(-0.5, 1.0, n),
        consents=rng.random(n) < 0.95,
    )
