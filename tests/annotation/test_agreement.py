"""Krippendorff's alpha against worked examples, statsmodels and its own definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from characterflywheel.annotation.agreement import alpha_estimate, krippendorff_alpha


def test_two_observers_binary() -> None:
    """Krippendorff, *Computing Krippendorff's Alpha-Reliability* (2011), section A.

    Ten articles, two coders: 0100000010 and 1110010000. Coincidences: 10 pairs 0-0, 4 + 4 pairs 0-1, 2 pairs 1-1, so
    n0 = 14, n1 = 6, n = 20. Alpha = 1 - (n - 1) o01 / (n0 n1) = 1 - 19 * 4 / (14 * 6) = 0.095.
    """
    first, second = "0100000010", "1110010000"
    counts = [[(a + b).count("0"), (a + b).count("1")] for a, b in zip(first, second, strict=True)]
    assert krippendorff_alpha(counts) == pytest.approx(1 - 19 * 4 / (14 * 6))


def test_missing_reviews_and_many_observers() -> None:
    """The same paper's section C: four observers, twelve units, five categories, reviews missing: 0.743."""
    reviews = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
        [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
    ]
    counts = [[column.count(c) for c in range(1, 6)] for column in (list(c) for c in zip(*reviews, strict=True))]
    assert krippendorff_alpha(counts) == pytest.approx(0.743, abs=5e-4)


def test_close_to_fleiss_kappa_on_many_units() -> None:
    """With the same number of reviews a unit, alpha and Fleiss' kappa differ by (1 - kappa) / reviews only."""
    inter_rater = pytest.importorskip("statsmodels.stats.inter_rater")
    rng = np.random.default_rng(3)
    truth = rng.random(200) < 0.5
    votes = np.where(rng.random((200, 3)) < 0.8, truth[:, None], ~truth[:, None]).sum(axis=1)
    counts = np.stack([3 - votes, votes], axis=1)
    kappa = inter_rater.fleiss_kappa(counts)
    assert krippendorff_alpha(counts) == pytest.approx(kappa + (1 - kappa) / counts.sum())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_at_most_one_and_blind_to_names(units: list[tuple[int, int]]) -> None:
    alpha = krippendorff_alpha(units)
    assert alpha is None or alpha <= 1
    assert alpha == (None if alpha is None else pytest.approx(krippendorff_alpha([(b, a) for a, b in units])))


def test_interval_holds_the_value_and_narrows_with_prompts() -> None:
    rng = np.random.default_rng(0)
    agree = rng.random(400) < 0.8
    side = rng.random(400) < 0.5
    counts = np.where(agree[:, None], np.where(side[:, None], [2, 0], [0, 2]), [1, 1])
    groups = [f"p{i // 4}" for i in range(400)]
    wide, narrow = alpha_estimate(counts[:80], groups[:80], 1), alpha_estimate(counts, groups, 1)
    for estimate in (wide, narrow):
        assert estimate.value is not None
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low <= estimate.value <= estimate.high
    assert narrow.n == 400
    assert narrow.high - narrow.low < wide.high - wide.low


def test_says_why_there_is_no_alpha() -> None:
    assert alpha_estimate([], [], 1).reason == "nothing was reviewed"
    assert alpha_estimate([[1, 0], [0, 1]], ["a", "b"], 1).reason == "nothing was reviewed twice"
    assert alpha_estimate([[2, 0], [2, 0]], ["a", "b"], 1).reason == "every review says the same"
    assert alpha_estimate([[2, 0], [1, 1]], ["a", "a"], 1).reason == "too few prompts for an interval"
