"""How much of a signal comes from circumstances rather than from the reply (PAPER section 3: noisy and biased).

Circumstances are the position in the conversation, the reply's length, the character and the user. Each is asked how
well it alone foretells the signal of unseen users, and how well the model ranks replies for which it is the same.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...ids import derive_seed
from ...records import Estimate, Record
from .concordance import auc
from .inputs import Reply
from .logistic import cross_fit

Floats = NDArray[np.float64]
LEVELS = 8  # bins of position and of length
CHARACTERS = 50  # rarer characters count as one


class Bias(Record):
    """One circumstance: the AUC of it alone, and the model's among replies for which it is the same."""

    alone: Estimate
    model_within: Estimate


class Circumstances(NamedTuple):
    """What is not the reply's doing, a value for each reply."""

    position: tuple[int, ...]
    length: tuple[int, ...]
    character: tuple[str, ...]
    user: tuple[str, ...]


def circumstances(replies: Sequence[Reply]) -> Circumstances:
    """Messages said before the reply, its words, whose it is, and to whom."""
    return Circumstances(
        tuple(sum(m.role != "system" for m in reply.history) for reply in replies),
        tuple(len(reply.text.split()) for reply in replies),
        tuple(reply.character_id for reply in replies),
        tuple(reply.user_id for reply in replies),
    )


def nuisance_ranks(y: Floats, found: Circumstances, seed: int) -> dict[str, Floats]:
    """Held-out scores of every row, shape (rows, labels), by circumstances alone; `all` by the first three together.

    Position, length and character are cross-fitted over users on the folds that the model is judged on. A user's own
    habit is the smoothed share of the other half of that user's replies: nothing else is known of an unseen one.
    """
    columns = {
        "position": _bins(found.position), "length": _bins(found.length), "character": _levels(found.character),
    }  # fmt: skip
    columns["all"] = np.hstack([columns[name] for name in ("position", "length", "character")])
    ranks = {
        name: cross_fit(x, y, found.user, seed, np.full(x.shape[1], x.shape[1] ** -0.5)).ranks
        for name, x in columns.items()
    }
    return ranks | {"user": habits(y, found.user, derive_seed(seed, "halves"))}


def habits(y: Floats, users: Sequence[str], seed: int) -> Floats:
    """For every row the share of 1 among the labels of its user's other half, one label of the base rate added.

    A row's own half says nothing of it, so that where users do not differ the AUC is one half.
    """
    _, member = np.unique(np.asarray(users), return_inverse=True)
    half = np.random.default_rng(seed).integers(2, size=len(y))
    cell = 2 * member + half
    known, target = ~np.isnan(y), np.nan_to_num(y)
    out = np.zeros_like(y)
    for label in range(y.shape[1]):
        size = 2 * (member.max(initial=-1) + 1)
        n, ones = (np.bincount(cell, side[:, label], size)[cell ^ 1] for side in (known, target))
        rate = target[:, label].sum() / max(1, known[:, label].sum())
        out[:, label] = (ones + rate) / (n + 1)
    return out


def biases(label: Floats, ranks: Floats, alone: Mapping[str, Floats], found: Circumstances) -> dict[str, Bias]:
    """The report of one signal on rows whose label is known: `ranks` are the model's, `alone` those of nuisances."""
    report = {}
    for name, values in found._asdict().items():
        if len(set(values)) < 2:
            none = Estimate(value=None, n=len(label), reason=f"all replies have the same {name}")
            report[name] = Bias(alone=none, model_within=auc(label, ranks, found.user))
            continue
        report[name] = Bias(
            alone=auc(label, alone[name], found.user), model_within=auc(label, ranks, found.user, values)
        )
    return report


def _bins(values: Sequence[int]) -> Floats:
    edges = np.unique(np.quantile(values, np.linspace(0, 1, LEVELS + 1)[1:-1]))
    return _levels([str(i) for i in np.searchsorted(edges, values, side="right")])


def _levels(values: Sequence[str]) -> Floats:
    """One column for each frequent value, shape (rows, values)."""
    names = sorted(name for name, _ in Counter(values).most_common(CHARACTERS))
    return np.asarray(np.array(values)[:, None] == np.array(names)[None, :], dtype=float)
