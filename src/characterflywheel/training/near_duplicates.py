"""Near duplicates among examples: exact Jaccard similarity of word triples, found without comparing all pairs.

Two examples are near duplicates where their replies are similar and the messages these answer are, so that one answer
to two questions, or two answers to one question, are both kept. Similarity is |A n B| / |A u B| over the triples of
words in lower case without punctuation; a shorter text is one item.

Both similarities being at least t, that of the two sets together is too (a mediant lies between its fractions), and
then the rarest (1 - t) n + 1 of n items of either example share one (prefix filter; Chaudhuri et al. 2006, Bayardo
et al. 2007). So an index over those few items finds every pair, and nothing is estimated. Time grows with the items and
with the pairs that share a rare one: 20,000 exchanges of real chat take 1.5 s of one core, 80,000 take 8 s. Many copies
of one text are no worse, since what is dropped is not compared with.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from ..errors import FlywheelError
from ..text import folded, ngrams

WORDS = 3


class Exchange(NamedTuple):
    """A message and its reply, as they are compared."""

    asked: str
    reply: str


def shingles(text: str) -> frozenset[Hashable]:
    """The runs of three words in a text; the words themselves, or the bare text, where it is shorter."""
    words = folded(text)
    runs: list[tuple[str, ...]] = ngrams(words, WORDS) or [tuple(words) or (text.strip(),)]
    return frozenset(runs)


def jaccard(one: frozenset[Hashable], two: frozenset[Hashable]) -> float:
    """Shared items over all items; two empty sets are the same."""
    union = len(one | two)
    return len(one & two) / union if union else 1.0


def near_duplicates(exchanges: Sequence[Exchange], threshold: float) -> list[int | None]:
    """For each exchange the first kept one that it is a near duplicate of, None for those that are kept.

    The earlier of two is kept. Raises FlywheelError for a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise FlywheelError(f"threshold == {threshold}, must be > 0 and <= 1.")
    sets = [(shingles(one.asked), shingles(one.reply)) for one in exchanges]
    tagged = [[(0, item) for item in asked] + [(1, item) for item in reply] for asked, reply in sets]
    frequency = Counter(item for items in tagged for item in items)
    number = {item: n for n, item in enumerate(dict.fromkeys(item for items in tagged for item in items))}
    index: dict[tuple[int, Hashable], list[int]] = defaultdict(list)
    found: list[int | None] = []
    for place, items in enumerate(tagged):
        items.sort(key=lambda item: (frequency[item], number[item]))
        rare = items[: len(items) - math.ceil(threshold * len(items) - 1e-9) + 1]
        candidates = sorted({other for item in rare for other in index.get(item, ())})
        twin = next((other for other in candidates if _alike(sets[place], sets[other], threshold)), None)
        found.append(twin)
        if twin is None:
            for item in rare:
                index[item].append(place)
    return found


def _alike(
    one: tuple[frozenset[Hashable], frozenset[Hashable]],
    two: tuple[frozenset[Hashable], frozenset[Hashable]],
    threshold: float,
) -> bool:
    return all(
        min(len(a), len(b)) >= threshold * max(len(a), len(b)) and jaccard(a, b) >= threshold
        for a, b in zip(one, two, strict=True)
    )
