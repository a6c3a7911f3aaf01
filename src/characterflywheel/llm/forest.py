"""The layout of token sequences that share prefixes in one flat batch (DESIGN section 6).

Sequences are paths of segments; equal segments under the same parent are laid out once, so paths form trees.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import FlywheelError

PLAIN_PAIRS = 512**2  # a family with more (query, key) pairs attends by flash, whose backward pass is slower
SLACK = 8  # siblings this much, or by half, longer than the shortest go to a family of their own

Segment = tuple[int, ...]
Path = tuple[Segment, ...]


class Tree(NamedTuple):
    """Rows `start:stop` of the flat batch and their (stop - start)² attention mask, True where a row may look."""

    start: int
    stop: int
    mask: Tensor


class Node(NamedTuple):
    """A segment laid out in rows `start:stop`; `line`: the nodes on its path from the root down to itself."""

    start: int
    stop: int
    line: tuple[int, ...]


class Family(NamedTuple):
    """Siblings of about one length: rows `start:stop` of the forest, `size` spans of at most `longest` rows.

    `above`: their ancestors, root first, as (number of a family, first row, last row + 1), rows counted in that
    family. Where spans differ in length, `rows` (size x longest,) are their rows, counted from `start`, filled up with
    row 0, and `back` (stop - start,) the place of each row in `rows`; else both are None.
    """

    start: int
    stop: int
    size: int
    longest: int
    above: tuple[tuple[int, int, int], ...]
    rows: Tensor | None
    back: Tensor | None


@dataclass(frozen=True)
class Forest:
    """Token paths laid out in one flat batch of N rows.

    `ids`, `positions`: shape (N,). `rows[i]`: the rows of path i from root to leaf, shape (length of path i,).
    `nodes`: the segments in the order of their rows; a tree's nodes follow one another, parents before children,
    siblings of equal length together.
    """

    ids: Tensor
    positions: Tensor
    nodes: tuple[Node, ...]
    rows: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        return int(self.ids.numel())

    @cached_property
    def trees(self) -> tuple[Tree, ...]:
        """Each tree's rows and mask: a row sees its own segment up to itself, and every segment above."""
        return self.masked(both_ways=False)

    @cached_property
    def families(self) -> tuple[Family, ...]:
        """Siblings that attend together (see `family_attention`)."""
        return families(self.nodes, self.ids.device)

    def masked(self, both_ways: bool) -> tuple[Tree, ...]:
        """As `trees`; with `both_ways` a row sees all of its own segment, as in an encoder."""
        out = []
        for first, tree in groupby(self.nodes, key=lambda node: node.line[0]):
            nodes = list(tree)
            sees = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
            for i, node in enumerate(nodes):
                sees[i, [above - first for above in node.line]] = True
            owner = torch.repeat_interleave(torch.tensor([node.stop - node.start for node in nodes]))
            mask = sees[owner][:, owner]
            mask = mask if both_ways else mask.tril()
            out.append(Tree(nodes[0].start, nodes[-1].stop, mask.to(self.ids.device)))
        return tuple(out)


def plant(paths: Sequence[Path], device: torch.device | str = "cpu") -> Forest:
    """Lay paths out, each distinct (parent, segment) once. Paths need at least one token."""
    children: dict[tuple[int, Segment], int] = {}
    segments: list[Segment] = []
    lines: list[tuple[int, ...]] = []
    leaves: list[int] = []
    for path in paths:
        node = -1
        for segment in path:
            if not segment:
                continue
            key = (node, segment)
            if key not in children:
                children[key] = len(segments)
                lines.append((*(lines[node] if node >= 0 else ()), len(segments)))
                segments.append(segment)
            node = children[key]
        if node < 0:
            raise FlywheelError("an empty token sequence cannot be run: give each path at least one token.")
        leaves.append(node)
    order = sorted(range(len(segments)), key=lambda n: (lines[n][0], lines[n][-2:-1], len(segments[n]), n))
    place = {node: i for i, node in enumerate(order)}
    nodes: list[Node] = []
    ids: list[int] = []
    positions: list[int] = []
    for node in order:
        depth, size = sum(len(segments[above]) for above in lines[node][:-1]), len(segments[node])
        nodes.append(Node(len(ids), len(ids) + size, tuple(place[above] for above in lines[node])))
        ids.extend(segments[node])
        positions.extend(range(depth, depth + size))
    spans = ([nodes[above] for above in nodes[place[leaf]].line] for leaf in leaves)
    rows = tuple(torch.cat([torch.arange(n.start, n.stop) for n in line]).to(device) for line in spans)
    return Forest(torch.tensor(ids, device=device), torch.tensor(positions, device=device), tuple(nodes), rows)


class _Span(NamedTuple):
    """A chain of nodes in rows `start:stop`; `line`: the spans above it."""

    start: int
    stop: int
    line: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.stop - self.start


def families(nodes: Sequence[Node], device: torch.device) -> tuple[Family, ...]:
    """The families of a forest's nodes, in the order of their rows, which they partition."""
    spans = _spans(nodes)
    groups: list[list[int]] = []
    for number, span in enumerate(spans):
        if groups and _joins(span, [spans[i] for i in groups[-1]], spans):
            groups[-1].append(number)
        else:
            groups.append([number])
    home = {span: family for family, group in enumerate(groups) for span in group}
    made = []
    for group in groups:
        start, lengths = spans[group[0]].start, torch.tensor([spans[i].length for i in group])
        longest, rows, back = int(lengths.max()), None, None
        if int(lengths.min()) < longest:
            real = torch.arange(longest) < lengths.unsqueeze(1)
            rows = torch.zeros(real.shape, dtype=torch.long)
            rows[real] = torch.arange(int(lengths.sum()))
            rows, back = rows.flatten().to(device), real.flatten().nonzero().squeeze(1).to(device)
        above = tuple(
            (home[i], spans[i].start - (base := spans[groups[home[i]][0]].start), spans[i].stop - base)
            for i in spans[group[0]].line
        )
        made.append(Family(start, spans[group[-1]].stop, len(group), longest, above, rows, back))
    return tuple(made)


def _spans(nodes: Sequence[Node]) -> list[_Span]:
    """Nodes, an only child joined to its parent where it follows at once."""
    children = Counter(node.line[-2] for node in nodes if len(node.line) > 1)
    spans: list[_Span] = []
    home: list[int] = []
    for node in nodes:
        above = home[node.line[-2]] if len(node.line) > 1 else None
        if above == len(spans) - 1 and children[node.line[-2]] == 1:
            spans[-1] = spans[-1]._replace(stop=node.stop)
        else:
            spans.append(_Span(node.start, node.stop, () if above is None else (*spans[above].line, above)))
        home.append(len(spans) - 1)
    return spans


def _joins(span: _Span, group: Sequence[_Span], spans: Sequence[_Span]) -> bool:
    """Whether a span is of the group's family: a sibling of about its length, and not too many pairs together."""
    if not span.line or span.line != group[0].line:
        return False
    lengths = [s.length for s in (*group, span)]
    pairs = len(lengths) * max(lengths) * (max(lengths) + sum(spans[i].length for i in span.line))
    return max(lengths) <= 1.5 * min(lengths) + SLACK and pairs <= PLAIN_PAIRS
