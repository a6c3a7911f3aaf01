"""Attention in a forest of segments, by segment: nothing is computed that a mask would throw away (PAPER section 3).

Siblings of one length attend in one call, each to its ancestors and to itself.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .shared_prefix import Forest

KEYS_AT_ONCE = 16384  # keys copied for the siblings of one call


class Group(NamedTuple):
    """`size` sibling segments of one length, whose queries are rows `start:stop` of those asked for.

    `keys`: the rows that each of them looks at, shape (size, above + own). `mask`: which of these each of its queries
    sees, the same for all siblings, None for all; `causal`: those up to its own place.
    """

    start: int
    stop: int
    size: int
    keys: Tensor
    mask: Tensor | None
    causal: bool


def groups(forest: Forest, *, both_ways: bool, read: Sequence[int] | None = None) -> list[Group]:
    """Who attends to whom. `read`: ascending rows whose queries are wanted, without repetition; None: all rows."""
    device, nodes = forest.ids.device, forest.nodes
    asked = _asked(forest, read)
    out, at = [], 0
    for (line, length, offsets), same in groupby(
        asked, key=lambda i: (nodes[i].line[:-1], nodes[i].stop - nodes[i].start, asked[i])
    ):
        above = torch.cat([torch.arange(0), *(torch.arange(nodes[a].start, nodes[a].stop) for a in line)])
        own = torch.stack([torch.arange(nodes[i].start, nodes[i].stop) for i in same])
        seen = torch.arange(len(above) + length) <= len(above) + torch.tensor(offsets).unsqueeze(1)
        causal = not both_ways and not line and 1 < len(offsets) == length
        mask = None if both_ways or causal or bool(seen.all()) else seen.to(device)
        for some in torch.split(own, max(1, KEYS_AT_ONCE // (len(above) + length))):
            keys = torch.cat([above.expand(len(some), -1), some], dim=1).to(device)
            stop = at + len(some) * len(offsets)
            out.append(Group(at, stop, len(some), keys, mask, causal))
            at = stop
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, among: Sequence[Group]) -> Tensor:
    """(queries, heads, size), keys and values of all rows (rows, kv heads, size) -> (queries, heads * size)."""
    out = []
    for group in among:
        queries = q[group.start : group.stop].view(group.size, -1, *q.shape[1:]).transpose(1, 2)
        keys, values = (
            t.index_select(0, group.keys.flatten()).view(*group.keys.shape, *t.shape[1:]).transpose(1, 2)
            for t in (k, v)
        )
        mixed = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=group.mask, is_causal=group.causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        out.append(mixed.transpose(1, 2).reshape(group.stop - group.start, -1))
    return torch.cat(out)


def _asked(forest: Forest, read: Sequence[int] | None) -> dict[int, tuple[int, ...]]:
    """For each node with queries, their places in its segment."""
    if read is None:
        return {i: tuple(range(node.stop - node.start)) for i, node in enumerate(forest.nodes)}
    asked: dict[int, tuple[int, ...]] = {}
    left = list(reversed(read))
    for i, node in enumerate(forest.nodes):
        while left and left[-1] < node.stop:
            asked[i] = (*asked.get(i, ()), left.pop() - node.start)
    return asked
