"""Disjoint splits by user (PAPER section 1): what evaluates was never said by someone whose words train."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import get_args

from .. import ids
from ..records import Source, Split

SPLITS: tuple[Split, ...] = get_args(Split)


def split_users(users: Sequence[str], sources: Sequence[Source], shares: Mapping[Split, float]) -> dict[str, Split]:
    """A split for every user, from one entry a prompt: `users[i]` with its `sources[i]`.

    Within a source, users stand in the order of a hash that is the same in every generation and are cut where the
    prompts of those before them reach the shares. So each split gets each source, sizes are met to within a user's
    prompts, and a returning user mostly returns to the same split. With four users of a source or more, no split
    lacks that source.
    """
    prompts = Counter(users)
    home: dict[str, Source] = {}
    for user, source in zip(users, sources, strict=True):
        home[user] = min(source, home.get(user, source))
    limits = [sum(shares[split] for split in SPLITS[: number + 1]) for number in range(len(SPLITS) - 1)]
    result: dict[str, Split] = {}
    for source in sorted(set(home.values())):
        members = sorted((u for u, s in home.items() if s == source), key=lambda u: (ids.derive_seed("split", u), u))
        sizes = [prompts[user] for user in members]
        for user, number in zip(members, _cut(sizes, limits), strict=True):
            result[user] = SPLITS[number]
    return result


def _cut(sizes: Sequence[int], limits: Sequence[float]) -> list[int]:
    """The split of each user in turn: where the middle of their prompts falls between the limits."""
    total, before, last, out = sum(sizes), 0, -1, []
    for position, size in enumerate(sizes):
        number = sum(limit * total <= before + size / 2 for limit in limits)
        if len(sizes) > len(limits):
            remaining = len(sizes) - position
            number = max(min(number, last + 1), len(limits) + 1 - remaining, last)
        before, last = before + size, number
        out.append(number)
    return out
