"""Ranking with a circumstance held fixed, its interval, and what circumstances alone can tell."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from characterflywheel.reward.metrics import area_under_curve, auc_by_group
from characterflywheel.reward.signals.biases import Circumstances, biases, habits, nuisance_ranks
from characterflywheel.reward.signals.concordance import auc, auc_gain, concordance

ROWS = st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.sampled_from("ab")), min_size=2, max_size=30)


@settings(max_examples=80, deadline=None)
@given(ROWS)
def test_concordance_counts_pairs_of_a_stratum(rows: list[tuple[bool, int, str]]):
    """Against the definition: all pairs, ties one half."""
    y, s, strata = (list(column) for column in zip(*rows, strict=True))
    pairs = [
        (s[i] > s[j]) + 0.5 * (s[i] == s[j])
        for i, j in product(range(len(rows)), repeat=2)
        if y[i] and not y[j] and strata[i] == strata[j]
    ]
    found = concordance(y, s, strata)
    if not pairs:
        assert found is None
        return
    assert found is not None
    assert found.value == pytest.approx(np.mean(pairs))
    assert found.influence.sum() == pytest.approx(0, abs=1e-9)
    everywhere = concordance(y, s)
    assert everywhere is not None
    assert everywhere.value == pytest.approx(area_under_curve(y, s))


def clustered(seed: int, users: int = 120) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    names = np.repeat(np.arange(users), 1 + rng.integers(1, 8, users))
    mood = rng.normal(size=users)[names]
    score = rng.normal(size=len(names)) + 0.5 * mood
    y = (rng.random(len(names)) < 1 / (1 + np.exp(-score - mood))).astype(float)
    return y, score, [f"u{n}" for n in names]


def test_interval_is_the_user_bootstraps():
    y, score, users = clustered(0)
    ours, theirs = auc(y, score, users), auc_by_group(y, score, users, seed=1, draws=4000)
    assert ours.value == pytest.approx(theirs.value)
    assert ours.low == pytest.approx(theirs.low, abs=0.006)
    assert ours.high == pytest.approx(theirs.high, abs=0.006)
    assert ours.n == len(y)


def test_gain_is_paired():
    """A rival that is the score with little noise: the difference is known far better than either."""
    y, score, users = clustered(2)
    rival = score + 0.2 * np.random.default_rng(0).normal(size=len(score))
    gain, one = auc_gain(y, score, rival, users), auc(y, score, users)
    assert gain.value == pytest.approx(one.value - auc(y, rival, users).value)
    assert gain.high - gain.low < 0.5 * (one.high - one.low)
    assert auc_gain(y, score, score, users).value == 0.0


def test_perfect_order_is_not_certainty():
    y, users = np.tile([0.0, 1.0], 10), [f"u{i // 2}" for i in range(20)]
    perfect = auc(y, y, users)
    assert perfect.value == 1.0
    assert 0.6 < perfect.low < 0.9
    assert perfect.high == 1.0


def test_unrankable_says_why():
    users = ["a", "b", "c"]
    assert auc([1, 1, 1], [1, 2, 3], users).reason == "one class only: nothing to rank"
    assert "alike" in auc([1, 0, 1], [1, 2, 3], users, ["x", "y", "z"]).reason
    assert auc([1, 0], [1, 2], ["a", "a"]).reason == "1 users: too few for an interval"


def test_a_clock_is_found_out():
    """The label falls with the position and nothing else; the model's score is the position and noise."""
    rng = np.random.default_rng(1)
    position = rng.integers(1, 12, 900)
    y = (rng.random(900) < 0.9 - 0.07 * position).astype(float)
    users = tuple(f"u{i % 90}" for i in range(900))
    found = Circumstances(tuple(map(int, position)), tuple(rng.integers(3, 30, 900).tolist()), ("mo",) * 900, users)
    alone = {name: ranks[:, 0] for name, ranks in nuisance_ranks(y[:, None], found, seed=0).items()}
    report = biases(y, -position + 0.5 * rng.normal(size=900), alone, found)
    assert report["position"].alone.low > 0.65
    assert report["position"].model_within.low < 0.5 < report["position"].model_within.high
    assert report["length"].alone.low < 0.5 < report["length"].alone.high
    assert report["length"].model_within.low > 0.6
    assert report["character"].alone.reason == "all replies have the same character"
    assert report["character"].model_within.low > 0.6


def test_habits_are_worth_nothing_where_users_do_not_differ():
    rng = np.random.default_rng(0)
    users = [f"u{i}" for i in np.repeat(np.arange(200), 4)]
    same = [area_under_curve(y, habits(y[:, None], users, s)[:, 0])
            for s in range(20) for y in [(rng.random(800) < 0.3).astype(float)]]  # fmt: skip
    assert np.mean(same) == pytest.approx(0.5, abs=0.01)
    own = np.repeat(rng.uniform(size=200), 4)
    differ = (rng.random(800) < own).astype(float)
    assert area_under_curve(differ, habits(differ[:, None], users, 0)[:, 0]) > 0.6


def test_a_row_does_not_foretell_itself():
    """Of four replies to one user, changing a label changes the habits of the other half's rows alone."""
    y = np.array([[1.0], [0.0], [1.0], [0.0]])
    before = habits(y, ["a"] * 4, seed=3)
    for row in range(4):
        changed = y.copy()
        changed[row] = np.nan
        rate = np.nanmean(changed)
        half = np.random.default_rng(3).integers(2, size=4)
        mine = half == half[row]
        others = changed[~mine, 0]
        assert habits(changed, ["a"] * 4, seed=3)[mine, 0] == pytest.approx((others.sum() + rate) / (len(others) + 1))
    assert before.shape == (4, 1)
