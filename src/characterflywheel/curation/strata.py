"""Constraint-based adjustment (PAPER section 1): the chosen prompts have the statistics of the traffic.

Pruning is blind to where a prompt comes from. Here chosen and pruned prompts trade places, without changing their
number, until the shares of every constrained dimension stand as near those of the traffic as trades can bring them.
Other dimensions are monitored: reported beside, not held.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..records import Record

Levels = Mapping[str, Sequence[str]]
"""By dimension, the level of every row."""


class StratumRow(Record):
    """One level of one dimension: its share in the traffic and among the chosen, with their numbers."""

    dimension: str
    level: str
    constrained: bool
    before: float
    after: float
    n_before: int
    n_after: int


class _Axis(NamedTuple):
    """A dimension over the cells: `code[cell]` is a level, `target[level]` the number that is wanted of it."""

    code: NDArray[np.int64]
    target: NDArray[np.float64]


def adjust(
    kept: NDArray[np.bool_], rank: NDArray[np.int64], levels: Levels, target: Mapping[str, Mapping[str, float]]
) -> NDArray[np.bool_]:
    """Trade kept rows (n,) for others until the kept shares are nearest `target[dimension][level]`.

    Least-squares distance over the counts of all levels of all constrained dimensions; every trade lowers it, so it
    ends. Within a cell of equal levels the rows of highest `rank` go first and those of lowest come back first.
    The work is by cell, not by row.
    """
    names = sorted(target)
    table = np.array([levels[name] for name in names], dtype=object).T.reshape(len(kept), len(names))
    keys = sorted({tuple(row) for row in table})
    place = {key: number for number, key in enumerate(keys)}
    cell = np.array([place[tuple(row)] for row in table], dtype=np.int64)
    inside = np.bincount(cell[kept], minlength=len(keys))
    wanted = _trade(inside.copy(), np.bincount(cell, minlength=len(keys)), _axes(names, keys, target, int(kept.sum())))
    result = np.array(kept)
    for number in np.flatnonzero(wanted != inside):
        rows = np.flatnonzero(cell == number)
        # rows that pruning kept stay before those it dropped; among equals the most distinct first
        first = rows[np.lexsort((rows, rank[rows], ~kept[rows]))]
        result[rows] = False
        result[first[: wanted[number]]] = True
    return result


def _axes(
    names: Sequence[str], keys: Sequence[tuple[str, ...]], target: Mapping[str, Mapping[str, float]], total: int
) -> list[_Axis]:
    axes = []
    for column, name in enumerate(names):
        known = sorted({key[column] for key in keys})
        code = np.array([known.index(key[column]) for key in keys], dtype=np.int64)
        axes.append(_Axis(code, np.array([target[name].get(level, 0.0) * total for level in known])))
    return axes


def _trade(inside: NDArray[np.int64], available: NDArray[np.int64], axes: Sequence[_Axis]) -> NDArray[np.int64]:
    """Best drop, then best return, while the pair lowers the distance. `inside` counts kept rows by cell."""
    while True:
        drop = np.where(inside > 0, _change(inside, axes, -1), np.inf)
        out = int(drop.argmin())
        if not np.isfinite(drop[out]):
            return inside
        inside[out] -= 1
        back = np.where(inside < available, _change(inside, axes, +1), np.inf)
        into = int(back.argmin())
        inside[into] += 1
        if drop[out] + back[into] >= -1e-9:
            inside[into] -= 1
            inside[out] += 1
            return inside


def _change(inside: NDArray[np.int64], axes: Sequence[_Axis], by: int) -> NDArray[np.float64]:
    """How the squared distance changes if a cell gains `by` rows, for every cell."""
    change = np.zeros(len(inside))
    for axis in axes:
        gap = np.bincount(axis.code, weights=inside, minlength=len(axis.target)) - axis.target
        change += (2 * by * gap + 1)[axis.code]
    return change


def shares(levels: Sequence[str]) -> dict[str, float]:
    """The share of every level, levels sorted."""
    names, counts = np.unique(np.array(levels, dtype=str), return_counts=True)
    return {str(name): float(count) / len(levels) for name, count in zip(names, counts, strict=True)}


def compare(before: Levels, after: Levels, constrained: Sequence[str]) -> tuple[StratumRow, ...]:
    """The table of constrained and monitored dimensions: shares in the traffic and among the chosen."""
    rows = []
    for dimension in sorted(before, key=lambda name: (name not in constrained, name)):
        old, new = shares(before[dimension]), shares(after[dimension])
        n_old, n_new = len(before[dimension]), len(after[dimension])
        for level in sorted(old | new):
            a, b = old.get(level, 0.0), new.get(level, 0.0)
            rows.append(
                StratumRow(
                    dimension=dimension, level=level, constrained=dimension in constrained,
                    before=a, after=b, n_before=round(a * n_old), n_after=round(b * n_new),
                )
            )  # fmt: skip
    return tuple(rows)
