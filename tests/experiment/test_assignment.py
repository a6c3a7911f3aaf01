"""Assignment: shares hold, ramps move nobody between arms, salts are independent."""

import itertools
import math

import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from characterflywheel.errors import FlywheelError
from characterflywheel.experiment.assignment import assign, place, territories

USERS = [f"user-{number}" for number in range(20_000)]
TENTHS = {"control": 0.1, "treatment": 0.1}


def test_the_same_user_always_meets_the_same_arm() -> None:
    # Pinned: a change of the hash would move every user of a running experiment.
    assert place("user-1", "g1") == pytest.approx(0.28942065398965866, abs=1e-15)
    assert [assign(user, "g1", TENTHS) for user in USERS[:500]] == [assign(user, "g1", TENTHS) for user in USERS[:500]]


def test_places_are_uniform() -> None:
    assert scipy.stats.kstest([place(user, "g1") for user in USERS], "uniform").pvalue > 0.01


def test_shares_hold() -> None:
    shares = {"control": 0.1, "treatment": 0.3}
    arms = [assign(user, "shares", shares) for user in USERS]
    observed = [arms.count("control"), arms.count("treatment"), arms.count(None)]
    assert scipy.stats.chisquare(observed, [2_000, 6_000, 12_000]).pvalue > 0.01


def test_arms_under_two_salts_are_independent() -> None:
    half = {"control": 0.5, "treatment": 0.5}
    table = [[0, 0], [0, 0]]
    for user in USERS:
        table[assign(user, "one", half) == "control"][assign(user, "two", half) == "control"] += 1
    assert scipy.stats.chi2_contingency(table).pvalue > 0.01


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.text(min_size=1, max_size=8))
def test_a_larger_share_never_moves_a_user_between_arms(a: float, b: float, c: float, d: float, salt: str) -> None:
    before = {"control": a / 2, "treatment": b / 2}
    after = {"control": max(a, c) / 2, "treatment": max(b, d) / 2}
    for user in USERS[:60]:
        first = assign(user, salt, before)
        assert first is None or assign(user, salt, after) == first


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_arms_never_overlap(weights: list[float]) -> None:
    shares = {f"arm-{i}": weight / len(weights) for i, weight in enumerate(weights)}
    intervals = sorted(territories(shares).values())
    assert all(end <= begin or math.isclose(end, begin) for (_, end), (begin, _) in itertools.pairwise(intervals))
    for arm, (begin, end) in territories(shares).items():
        assert end - begin == pytest.approx(shares[arm], abs=1e-12)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"control": 1.2}, "1.2, must be in"),
        ({"control": 0.6, "treatment": 0.6}, "sum to 1.2"),
        ({"a": -0.1}, "must be in"),
    ],
)
def test_impossible_shares_are_refused(shares: dict[str, float], message: str) -> None:
    with pytest.raises(FlywheelError, match=message):
        assign("user-1", "salt", shares)
