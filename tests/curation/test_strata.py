"""Trades bring the shares of the chosen to those of the traffic, and change nothing else."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from characterflywheel.curation.strata import adjust, compare, shares


def distance(kept: NDArray[np.bool_], levels: dict[str, list[str]], target: dict[str, dict[str, float]]) -> float:
    total = 0.0
    for name, wanted in target.items():
        column = np.array(levels[name])
        for level in set(levels[name]) | set(wanted):
            total += float((column[kept] == level).sum() - wanted.get(level, 0.0) * kept.sum()) ** 2
    return total


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 60))
def test_never_further_from_the_target_and_as_many_kept(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    levels = {"source": list(rng.choice(["internal", "user"], n)), "character": list(rng.choice(list("abcd"), n))}
    target = {name: shares(column) for name, column in levels.items()}
    kept = rng.random(n) < 0.6
    result = adjust(kept, rng.permutation(n), levels, target)
    assert result.sum() == kept.sum()
    assert distance(result, levels, target) <= distance(kept, levels, target) + 1e-9


def test_restores_a_stratum_that_pruning_emptied() -> None:
    """Half the traffic is internal, pruning kept user prompts only: after trades half of the chosen are internal,
    the most distinct (lowest rank) of them, and the least distinct user prompts have gone."""
    levels = {"source": ["internal"] * 4 + ["user"] * 4}
    kept = np.array([False] * 4 + [True] * 4)
    rank = np.array([3, 2, 1, 0, 0, 1, 2, 3])
    result = adjust(kept, rank, levels, {"source": {"internal": 0.5, "user": 0.5}})
    assert result.tolist() == [False, False, True, True, True, True, False, False]


def test_table_names_constrained_and_monitored() -> None:
    rows = compare(
        {"source": ["user", "user", "internal", "user"], "length": ["a", "b", "b", "b"]},
        {"source": ["user", "internal"], "length": ["b", "b"]},
        constrained=("source",),
    )
    found = [(r.dimension, r.level, r.constrained, r.before, r.after, r.n_before, r.n_after) for r in rows]
    assert found == [
        ("source", "internal", True, 0.25, 0.5, 1, 1),
        ("source", "user", True, 0.75, 0.5, 3, 1),
        ("length", "a", False, 0.25, 0.0, 1, 0),
        ("length", "b", False, 0.75, 1.0, 3, 2),
    ]
