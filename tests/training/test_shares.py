"""Shares of the pool: exact by largest remainder, for each prompt and for all together."""

from fractions import Fraction
from math import ceil, floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from characterflywheel.errors import FlywheelError
from characterflywheel.training.selection.shares import allot, largest_remainder, totals

SHARES = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from([0.1, 0.05, 0.3, 1, 2.5, 7]), min_size=1)
IDS = [f"p{i}" for i in range(40)]


def test_a_tenth_of_eight_is_one_for_eight_prompts_in_ten() -> None:
    """8 candidates, shares 0.1 and 0.9, 10 prompts: 80 candidates, 8 of them of the small policy."""
    allotted = allot(IDS[:10], {"big": 0.1, "parent": 0.9}, 8, seed=1)
    assert totals(allotted) == {"big": 8, "parent": 72}
    assert sorted(allotted["big"].values()) == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]


@given(SHARES, st.integers(1, 12), st.integers(0, 40), st.integers(0, 3))
def test_every_prompt_and_every_policy_gets_its_share(
    shares: dict[str, float], candidates: int, prompts: int, seed: int
) -> None:
    """Each prompt n candidates, each policy its quota down or up; each policy's total its quota down or up."""
    ids = IDS[:prompts]
    allotted = allot(ids, shares, candidates, seed)
    whole = sum(Fraction(str(s)) for s in shares.values())
    for name, share in shares.items():
        quota = Fraction(str(share)) / whole * candidates
        assert all(floor(quota) <= allotted[name][p] <= ceil(quota) for p in ids)
        assert floor(quota * prompts) <= totals(allotted)[name] <= ceil(quota * prompts)
    assert all(sum(allotted[name][p] for name in shares) == candidates for p in ids)


@given(SHARES, st.integers(1, 12), st.permutations(IDS))
def test_neither_the_order_of_prompts_nor_of_policies_matters(
    shares: dict[str, float], candidates: int, ids: list[str]
) -> None:
    turned = dict(reversed(shares.items()))
    assert allot(ids, turned, candidates, 5) == allot(IDS, shares, candidates, 5)


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(0, 50), min_size=1), st.integers(1, 60))
def test_largest_remainder_keeps_the_sum_and_each_quota(weights: dict[str, int], seats: int) -> None:
    total = sum(weights.values())
    if total == 0:
        return
    quotas = {name: Fraction(weight, total) * seats for name, weight in weights.items()}
    found = largest_remainder(quotas)
    assert sum(found.values()) == seats
    assert all(floor(q) <= found[name] <= ceil(q) for name, q in quotas.items())


def test_hamiltons_example() -> None:
    """Quotas 41.74, 26.31, 15.50, 9.90, 6.55 of 100 seats: 97 whole ones, then to .90, .74 and .55."""
    quotas = {"a": "41.74", "b": "26.31", "c": "15.50", "d": "9.90", "e": "6.55"}
    found = largest_remainder({name: Fraction(quota) for name, quota in quotas.items()})
    assert found == {"a": 42, "b": 26, "c": 15, "d": 10, "e": 7}


def test_which_prompts_get_the_odd_ones_follows_the_seed() -> None:
    drawn = [allot(IDS, {"a": 0.1, "b": 0.9}, 1, seed)["a"] for seed in range(200)]
    assert {sum(one.values()) for one in drawn} == {4}
    times = [sum(one[p] for one in drawn) for p in IDS]
    assert 5 <= min(times) <= max(times) <= 40, "each prompt about 20 times in 200"


@pytest.mark.parametrize("shares", [{}, {"a": 0.0}, {"a": 1.0, "b": -1.0}])
def test_shares_must_be_above_zero(shares: dict[str, float]) -> None:
    with pytest.raises(FlywheelError, match="share above 0"):
        allot(["p"], shares, 2, 1)
