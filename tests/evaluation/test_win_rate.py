"""Win rates with ties, and the length-controlled rate against statsmodels and planted truths."""

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from characterflywheel.evaluation.win_rate import length_controlled, win_rate, wins


def test_ties_count_half() -> None:
    won = wins([2.0, -1.0, 0.0, 0.5])
    assert won.tolist() == [1, 0, 0.5, 1]
    estimate = win_rate(won, list("abcd"))
    assert (estimate.value, estimate.n) == (0.625, 4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=2, max_size=30))
def test_changing_sides_turns_the_rate_round(margins: list[float]) -> None:
    users = [str(i) for i in range(len(margins))]
    one = win_rate(wins(margins), users)
    other = win_rate(wins([-m for m in margins]), users)
    assert one.value == pytest.approx(1 - other.value)
    assert one.low == pytest.approx(1 - other.high)


def _world(seed: int, advantage: float, by_length: float, n: int = 600) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    longer = rng.normal(10, 10, n)  # the new model is longer by 10 tokens
    p = expit(advantage + by_length * np.tanh(longer / longer.std()))
    return (rng.random(n) < p).astype(float), longer, [str(i) for i in range(n)]


def test_a_win_by_length_alone_is_none_at_equal_length() -> None:
    won, longer, users = _world(0, advantage=0.0, by_length=2.0)
    plain, controlled = win_rate(won, users), length_controlled(won, longer, users)
    assert plain.low > 0.6
    assert controlled.low < 0.5 < controlled.high


def test_a_win_beside_length_remains() -> None:
    won, longer, users = _world(1, advantage=0.8, by_length=0.0)
    controlled = length_controlled(won, longer, users)
    assert controlled.low < expit(0.8) < controlled.high
    assert controlled.low > 0.5


def test_it_is_statsmodels_logistic_regression_up_to_the_weak_prior() -> None:
    won, longer, users = _world(2, advantage=0.3, by_length=0.7, n=3000)
    design = sm.add_constant(np.tanh(longer / longer.std()))
    fit = sm.GLM(won, design, family=sm.families.Binomial()).fit(cov_type="HC1")
    controlled = length_controlled(won, longer, users)
    assert controlled.value == pytest.approx(expit(fit.params[0]), abs=1e-3)
    assert controlled.low == pytest.approx(expit(fit.conf_int()[0][0]), abs=5e-3)


def test_winning_everywhere_stays_finite_and_few_prompts_are_not_measured() -> None:
    users = [str(i) for i in range(20)]
    sure = length_controlled(np.ones(20), np.arange(20.0), users)
    assert 0.8 < sure.value < 1
    assert length_controlled(np.ones(20), np.zeros(20), users).value > 0.9
    few = length_controlled(np.ones(3), np.ones(3), users[:3])
    assert (few.value, few.reason) == (None, "3 prompts, needs at least 8")
