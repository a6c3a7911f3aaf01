"""How people take a reply: a hidden utility, and the acts that follow from it (DESIGN section 7).

The utility of 0 is the average answer of a real person to a real message, in character as well as not: there the
chance to write again is the one fitted to real conversations. Nothing in the pipeline may read it.
"""

from typing import NamedTuple

import numpy as np
from scipy import special

from ..records import SignalKind
from .senses import NOTICED, WEIGHED, Matrix
from .users import Column, Crowd

LENGTH_WIDTH = 0.6
CEILING = 2.5
# Log-odds of coming back for each unit of satisfaction. The real conversations cannot say; chosen so that breadth moves
# clearly but less than depth, as in the paper's results (PAPER section 8: +8.8% and +19.4%).
RETURN = 0.8
_EMOJIS, _WORDS, _UNSAFE = (NOTICED.index(name) for name in ("emojis", "log_words", "unsafe"))
_WARMTH, _GIBBERISH = (NOTICED.index(name) for name in ("warmth", "gibberish"))


class Act(NamedTuple):
    """One kind of feedback: log-odds for an average giver at utility 0, and how utility moves them."""

    kind: SignalKind
    base: float
    slope: float


ACTS = (
    Act("thumb_up", -3.0, 0.7),
    Act("thumb_down", -4.6, -0.7),
    Act("love", -4.5, 0.9),
    Act("regenerate", -4.4, -0.5),
    Act("report", -7.5, -0.6),
)


def raw_utility(seen: Matrix, crowd: Crowd) -> Column:
    """Sum of a person's likings of one reply each, shape (n,); `seen` is (n, len(NOTICED)), row i for person i."""
    linear = (seen[:, : len(WEIGHED)] * crowd.weights).sum(axis=1)
    return np.asarray(linear + _length(seen[:, _WORDS], crowd) + crowd.emoji_taste * _emoji(seen[:, _EMOJIS]))


def utility(seen: Matrix, crowd: Crowd, anchor: float) -> Column:
    """Utility of row i of `seen` to person i, shape (n,), within +-2.5; `anchor` is a real answer's raw utility."""
    return _saturated(raw_utility(seen, crowd) - anchor)


def p_continue(value: Column, crowd: Crowd) -> Column:
    """Chance to write again after a reply of this utility."""
    return np.asarray(special.expit(crowd.stay + value))


def p_visit(satisfaction: Column, crowd: Crowd) -> Column:
    """Chance to come today; `satisfaction` is a fading mean of the utilities met on earlier days."""
    return np.asarray(special.expit(crowd.visit + RETURN * satisfaction))


def p_act(act: Act, value: Column, seen: Matrix, crowd: Crowd, turn: Column) -> Column:
    """Chance of one kind of feedback. Each is biased in its own way, as real feedback is.

    Thumbs come early in a conversation, up for warm words; love goes to emoji; boredom and brevity make people ask
    for another; reports follow what is unsafe or unreadable.
    """
    bias = {
        "thumb_up": 0.6 * seen[:, _WARMTH] + 0.4 * (turn == 0),
        "thumb_down": 0.4 * (turn == 0),
        "love": 0.5 * _emoji(seen[:, _EMOJIS]),
        "regenerate": 0.5 * (seen[:, _WORDS] < np.log1p(6)),
        "report": 4 * seen[:, _UNSAFE] + 1.5 * seen[:, _GIBBERISH],
    }[act.kind]
    return np.asarray(special.expit(act.base + act.slope * value + crowd.thumbs + bias))


def _saturated(x: Column) -> Column:
    return np.asarray(CEILING * np.tanh(x / CEILING))


def _length(log_words: Column, crowd: Crowd) -> Column:
    """0 at the length a person likes, falling smoothly to `-length_care` far from it."""
    misfit = (log_words - crowd.likes_words) / LENGTH_WIDTH
    return np.asarray(-crowd.length_care * (1 - np.exp(-(misfit**2) / 2)))


def _emoji(count: Column) -> Column:
    """1 at one emoji, 0 at none, falling below 0 beyond four."""
    return np.asarray(count * np.exp(1 - count) - 0.5 * (1 - np.exp(-np.maximum(0, count - 2) / 2)))
