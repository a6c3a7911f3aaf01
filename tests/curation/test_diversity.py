"""Clusters and pruning: the greedy order against a literal reference, and invariants."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from characterflywheel.curation.diversity import cluster_rows, pruning_order, sample_diverse


def unit(seed: int, n: int, width: int = 8) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).normal(size=(n, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def closest_pair(vectors: NDArray[np.float32], alive: list[int]) -> set[int]:
    """The two rows that lie closest, by looking at every pair."""
    pairs = [(float(vectors[a] @ vectors[b]), a, b) for a in alive for b in alive if a < b]
    return set(max(pairs)[1:])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 14))
def test_each_step_drops_one_of_the_closest_pair(seed: int, n: int) -> None:
    vectors = unit(seed, n)
    order = pruning_order(vectors).tolist()
    alive = list(range(n))
    for gone in order[: n - 1]:
        assert gone in closest_pair(vectors, alive)
        alive.remove(gone)
    assert sorted(order) == list(range(n))


def test_near_duplicates_go_first() -> None:
    vectors = np.eye(4, dtype=np.float32)[[0, 1, 2, 2, 3]]
    assert pruning_order(vectors)[0] == 3
    kept = sample_diverse(vectors, clusters=1, keep_share=0.8, seed=0).kept
    assert kept.tolist() == [True, True, True, False, True]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40), st.floats(0.05, 1.0))
def test_keeps_the_share_of_every_cluster(seed: int, n: int, share: float) -> None:
    vectors = unit(seed, n)
    diverse = sample_diverse(vectors, clusters=4, keep_share=share, seed=seed)
    for label in set(diverse.cluster.tolist()):
        rows = diverse.cluster == label
        keep = int(np.ceil(share * rows.sum()))
        assert diverse.kept[rows].sum() == keep
        assert sorted(diverse.rank[rows & diverse.kept].tolist()) == list(range(keep))


def test_clusters_recover_groups_and_repeat() -> None:
    centres = np.eye(8, dtype=np.float32)[:3]
    vectors = np.repeat(centres, 10, axis=0) + 0.05 * unit(1, 30)
    labels = cluster_rows(vectors, clusters=3, seed=5)
    assert labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert np.array_equal(labels, cluster_rows(vectors, clusters=3, seed=5))
    assert set(cluster_rows(np.repeat(centres[:1], 5, axis=0), clusters=3, seed=5).tolist()) == {0}
