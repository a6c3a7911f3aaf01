"""Packing: which token paths run together, so that a step of any size fits in memory (PAPER section 4).

A micro-batch is one flat forest of token paths without padding (`llm.shared_prefix`), so packing is only a matter of
which items share a forest. Losses are sums divided by totals of the whole step: however a step is cut, its gradient
is that of the full batch.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise

from ..llm.shared_prefix import Path, Segment

MICRO_BATCH_TOKENS = 1536
WORTH_SHARING = (
    16  # tokens in common from the start; fewer (the template's own) would only join trees, whose mask grows
)


def plan(items: Sequence[Sequence[Path]], limit: int = MICRO_BATCH_TOKENS) -> list[list[int]]:
    """Numbers of the items of each micro-batch, whose forest has at most `limit` rows.

    An item that is larger alone has a micro-batch with those that lie wholly within it. An item's paths stay together.
    The longest items come first, so that the first micro-batch meets the peak of memory; each item joins the
    micro-batch where it adds the fewest rows, since what it shares with others there runs once.
    """
    numbers: dict[Path, int] = {}
    trees = [{numbers.setdefault(key, len(numbers)): size for key, size in _tree(paths).items()} for paths in items]
    sizes = [sum(tree.values()) for tree in trees]
    batches: list[list[int]] = []
    forests: list[dict[int, int]] = []
    rows: list[int] = []
    for item in sorted(range(len(items)), key=lambda i: (-sizes[i], i)):
        added = [sum(size for key, size in trees[item].items() if key not in forest) for forest in forests]
        fits = [i for i, more in enumerate(added) if not more or rows[i] + more <= limit]
        best = min(fits, key=lambda i: (added[i], i), default=len(batches))
        if best == len(batches):
            batches.append([])
            forests.append({})
            rows.append(0)
            added.append(sizes[item])
        batches[best].append(item)
        forests[best].update(trees[item])
        rows[best] += added[best]
    return batches


def forest_rows(paths: Sequence[Path]) -> int:
    """The rows of these paths in one forest: each distinct (path so far, segment) once."""
    return sum(_tree(paths).values())


def _tree(paths: Sequence[Path]) -> dict[Path, int]:
    """The segments of a forest, named by the path that leads to them, with their lengths."""
    return {path[:depth]: len(path[depth - 1]) for path in paths for depth in range(1, len(path) + 1)}


def share_prefixes(paths: Sequence[Path]) -> list[Path]:
    """The same token sequences with segments cut where they part, so that all that two prompts share runs once.

    The first segment (a system prompt) and the last (the reply, whose tokens are learnt) stay whole. A reply that is
    part of another path's history, as in a conversation learnt turn by turn, is shared with it.
    """
    flat = [tuple(chain.from_iterable(path)) for path in paths]
    order = sorted(range(len(paths)), key=lambda i: (paths[i][0], flat[i]))
    shared = [_shared(paths[a], paths[b], flat[a], flat[b]) for a, b in pairwise(order)]
    asked = [len(flat[i]) - len(paths[i][-1]) for i in order]
    cuts = [_ends(paths[i]) for i in order]
    forward, backward = list(pairwise(range(len(order)))), [(i + 1, i) for i in reversed(range(len(order) - 1))]
    for (before, here), length in zip(forward + backward, shared + shared[::-1], strict=True):
        cuts[here] |= {cut for cut in cuts[before] if cut <= length}
        if length <= min(asked[here], asked[before]):
            cuts[here].add(length)
    out = list(paths)
    for i, start, places in zip(order, asked, cuts, strict=True):
        head = len(paths[i][0])
        ends = sorted(cut for cut in places if head <= cut <= start or cut == len(flat[i]))
        out[i] = tuple(_pieces(flat[i], ends))
    return out


def _shared(one: Path, two: Path, flat_one: Segment, flat_two: Segment) -> int:
    """How many tokens two sequences have in common from their start; 0 under different first segments, or if few."""
    if one[0] != two[0]:
        return 0
    longest = min(len(flat_one), len(flat_two))
    common = next((i for i in range(longest) if flat_one[i] != flat_two[i]), longest)
    return common if common >= WORTH_SHARING else 0


def _ends(path: Path) -> set[int]:
    ends, at = set(), 0
    for segment in path:
        at += len(segment)
        ends.add(at)
    return ends


def _pieces(tokens: Segment, ends: Sequence[int]) -> Iterator[Segment]:
    for start, stop in pairwise((0, *ends)):
        if stop > start:
            yield tokens[start:stop]
