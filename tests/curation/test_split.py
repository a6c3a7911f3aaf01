"""Splits are disjoint by user, near their shares, and have both sources."""

from collections import Counter
from typing import get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from characterflywheel.curation.split import split_users
from characterflywheel.records import Source, Split

SHARES: dict[Split, float] = {"annotate": 0.35, "train": 0.35, "evaluate": 0.15, "experiment": 0.15}


def rows(sizes: dict[str, int], source: Source) -> tuple[list[str], list[Source]]:
    users = [user for user, size in sizes.items() for _ in range(size)]
    return users, [source] * len(users)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=4, max_size=40), st.lists(st.integers(1, 6), min_size=4, max_size=12))
def test_every_split_has_both_sources(user_sizes: list[int], internal_sizes: list[int]) -> None:
    sides = (
        rows({f"u{i}": n for i, n in enumerate(user_sizes)}, "user"),
        rows({f"t{i}": n for i, n in enumerate(internal_sizes)}, "internal"),
    )
    split = split_users(sides[0][0] + sides[1][0], sides[0][1] + sides[1][1], SHARES)
    for users, _ in sides:
        assert {split[user] for user in users} == set(get_args(Split))


def test_shares_are_met_with_many_users() -> None:
    users, sources = rows({f"u{i}": 1 + i % 3 for i in range(600)}, "user")
    split = split_users(users, sources, SHARES)
    counts = Counter(split[user] for user in users)
    for name, share in SHARES.items():
        assert abs(counts[name] / len(users) - share) < 0.01


def test_returning_users_mostly_keep_their_split() -> None:
    first = rows({f"u{i}": 2 for i in range(400)}, "user")
    later = rows({f"u{i}": 1 + i % 2 for i in range(100, 500)}, "user")
    before, after = split_users(*first, SHARES), split_users(*later, SHARES)
    both = sorted(before.keys() & after.keys())
    assert sum(before[user] == after[user] for user in both) / len(both) > 0.9


def test_too_few_users_for_all_splits() -> None:
    assert split_users(*rows({"a": 1}, "user"), SHARES) == {"a": "train"}
    assert split_users([], [], SHARES) == {}
