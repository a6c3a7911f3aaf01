"""Diversity sampling (PAPER section 1): embed prompts, cluster them, prune within clusters what lies close together."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits


class TextEncoder(Protocol):
    """Texts to rows of unit length (`llm.encoder.Encoder` is one)."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]: ...


class Diverse(NamedTuple):
    """`cluster[i]` of each row; `kept[i]`; `rank[i]` counts from 0 the rows that pruning would keep longest."""

    cluster: NDArray[np.int64]
    kept: NDArray[np.bool_]
    rank: NDArray[np.int64]


def sample_diverse(vectors: NDArray[np.float32], clusters: int, keep_share: float, seed: int) -> Diverse:
    """Cluster unit `vectors` (n, width) and keep `keep_share` of each cluster, at least one row of it.

    `rank` orders the rows of one cluster by the order of pruning, reversed: rank 0 outlives all others.
    """
    cluster = cluster_rows(vectors, clusters, seed)
    kept = np.zeros(len(vectors), dtype=np.bool_)
    rank = np.zeros(len(vectors), dtype=np.int64)
    for label in np.unique(cluster):
        rows = np.flatnonzero(cluster == label)
        order = rows[pruning_order(vectors[rows])]
        keep = int(np.ceil(keep_share * len(rows)))
        rank[order[::-1]] = np.arange(len(rows))
        kept[order[len(rows) - keep :]] = True
    return Diverse(cluster, kept, rank)


def cluster_rows(vectors: NDArray[np.float32], clusters: int, seed: int) -> NDArray[np.int64]:
    """K-means labels (n,), numbered by first appearance. One thread, as the order of a sum changes its last bits."""
    distinct = len(np.unique(vectors, axis=0))
    with threadpool_limits(limits=1):
        from sklearn.cluster import KMeans  # noqa: PLC0415 - takes a second, which a plan can do without

        model = KMeans(min(clusters, distinct), n_init=4, random_state=seed % 2**32).fit(vectors.astype(np.float64))
    _, first, labels = np.unique(model.labels_, return_index=True, return_inverse=True)
    return np.asarray(np.argsort(np.argsort(first))[labels], dtype=np.int64)


def pruning_order(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """Rows (n, width) in the order in which a greedy pruner drops them; the last stands furthest from the rest.

    At each step goes the row whose nearest remaining neighbour is closest by cosine; of such a pair, the one that
    is closer to the rest on the whole, then the later one. Every step is one pass over a row of similarities.
    """
    n = len(vectors)
    similar = (vectors @ vectors.T).astype(np.float64)
    np.fill_diagonal(similar, -np.inf)
    closeness = np.where(np.isfinite(similar), similar, 0).sum(axis=1)
    alive = np.ones(n, dtype=np.bool_)
    nearest = similar.argmax(axis=1) if n else np.zeros(0, dtype=np.int64)
    best = similar[np.arange(n), nearest]
    order = np.empty(n, dtype=np.int64)
    for step in range(n):
        first = int(np.where(alive, best, -np.inf).argmax()) if alive.sum() > 1 else int(alive.argmax())
        pair = (first, int(nearest[first])) if alive.sum() > 1 else (first,)
        gone = max(pair, key=lambda row: (closeness[row], row))
        order[step] = gone
        alive[gone] = False
        closeness -= np.where(np.isfinite(similar[gone]), similar[gone], 0)
        similar[:, gone] = -np.inf
        for row in np.flatnonzero(alive & (nearest == gone)):
            nearest[row] = similar[row].argmax()
            best[row] = similar[row, nearest[row]]
    return order
