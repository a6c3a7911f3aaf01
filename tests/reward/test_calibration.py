import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from characterflywheel.errors import FlywheelError
from characterflywheel.reward.calibration import (
    HOTTEST,
    calibrate,
    cross_fitted,
    evened,
    fit_temperature,
    log_loss,
    log_odds,
    pair_calibration,
    reliability,
)
from characterflywheel.reward.metrics import calibration_error


def world(prompts: int, seed: int, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Margins, labels and prompts of all six pairs of four replies that two reviewers ranked (Plackett-Luce).

    The true log-odds are the differences in utility; the model's are `sharpness` times as large.
    """
    rng = np.random.default_rng(seed)
    utility = rng.normal(size=(prompts, 4))
    ranked = utility[:, None, :] + rng.gumbel(size=(prompts, 2, 4))
    first, second = np.triu_indices(4, 1)
    labels = (ranked[:, :, first] > ranked[:, :, second]).mean(1).ravel()
    margins = (utility[:, first] - utility[:, second]).ravel()
    return sharpness * margins, labels, [f"p{i:04}" for i in np.repeat(range(prompts), 6)]


def test_temperature_is_the_minimum_of_the_log_loss():
    margins, labels, _ = world(60, 1, sharpness=2.5)
    found = fit_temperature(margins, labels)
    drawn = (labels * 360 + 1) / 362
    grid = minimize_scalar(lambda t: log_loss(expit(margins / t), drawn), bounds=(0.1, 20), method="bounded")
    assert found == pytest.approx(grid.x, rel=1e-4)
    # a logistic regression without an offset or a penalty, each pair there with both outcomes, by their weights
    model = LogisticRegression(C=np.inf, fit_intercept=False)
    model.fit(np.r_[margins, margins][:, None], np.r_[np.ones(360), np.zeros(360)], np.r_[drawn, 1 - drawn])
    assert found == pytest.approx(1 / model.coef_[0, 0], rel=1e-3)


def test_temperature_finds_how_much_too_sure_a_model_is():
    margins, labels, _ = world(4000, 2, sharpness=3.0)
    assert fit_temperature(margins, labels) == pytest.approx(3.0, rel=0.05)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_naming_replies_the_other_way_round_changes_nothing(seed: int):
    margins, labels, prompts = world(12, seed)
    turn = np.random.default_rng(seed).choice([-1.0, 1.0], len(margins))
    turned = np.where(turn > 0, labels, 1 - labels)
    assert fit_temperature(margins * turn, turned) == pytest.approx(fit_temperature(margins, labels))
    one = pair_calibration(expit(margins), labels, prompts, seed=1)
    two = pair_calibration(expit(margins * turn), turned, prompts, seed=1)
    assert two.error.value == pytest.approx(one.error.value)
    assert two.by_chance == pytest.approx(one.by_chance)


def test_a_few_pairs_in_order_do_not_make_a_model_certain():
    """Six pairs with log-odds 1, all right: labels are drawn in to 7/8, whose log-odds are log 7."""
    assert fit_temperature([1.0] * 6, [1.0] * 6) == pytest.approx(1 / np.log(7))


def test_margins_that_know_nothing_get_the_highest_temperature():
    assert fit_temperature([1.0, -1.0], [0.0, 1.0]) == HOTTEST
    assert fit_temperature([0.0, 0.0], [1.0, 0.5]) == 1.0
    assert fit_temperature([], []) == 1.0


def test_bad_margins_are_refused_with_their_number():
    with pytest.raises(FlywheelError, match="1 of 2 margins are not finite"):
        fit_temperature([float("nan"), 1.0], [1.0, 1.0])
    with pytest.raises(FlywheelError, match=r"labels reach from 0.5 to 2, must lie in \[0, 1\]"):
        fit_temperature([0.0, 1.0], [0.5, 2.0])


def test_a_pair_is_calibrated_by_other_groups_only():
    margins, labels, prompts = world(30, 3, sharpness=2.0)
    before = cross_fitted(margins, labels, prompts, seed=1)
    mine = np.array(prompts) == "p0004"
    turned = np.where(mine, 1 - labels, labels)
    assert cross_fitted(margins, turned, prompts, seed=1)[mine] == pytest.approx(before[mine])
    assert (np.sign(before - 0.5) == np.sign(margins)).all()
    with pytest.raises(FlywheelError, match="1 users, at least 2"):
        cross_fitted([1.0], [1.0], ["p"], seed=1)


def test_pair_error_by_hand_and_as_ten_bins_of_both_orders():
    """Confidence 0.92 and 0.96, one agrees: gap 0.94 - 0.5 = 0.44, weight 2/3. Confidence 0.55 (for the second
    reply), label 0.25 for the first, so 0.75 agree: gap 0.20, weight 1/3. Sum 0.36."""
    p, labels = np.array([0.92, 0.04, 0.45]), np.array([1.0, 1.0, 0.25])
    found = pair_calibration(p, labels, ["a", "b", "c"], seed=1)
    assert found.error.value == pytest.approx(0.44 * 2 / 3 + 0.20 / 3)
    assert found.error.n == 3
    both = calibration_error(np.r_[p, 1 - p], np.r_[labels, 1 - labels])
    assert both.value == pytest.approx(found.error.value)


@pytest.mark.parametrize("prompts", [12, 60])
def test_by_chance_is_what_a_calibrated_model_shows(prompts: int):
    """Over 120 worlds of a calibrated model, the mean error is the mean of `by_chance`, and few intervals miss 0."""
    found = []
    for seed in range(120):
        margins, labels, groups = world(prompts, seed)
        found.append(pair_calibration(expit(margins), labels, groups, seed=seed, draws=200))
    errors, chance = [one.error.value for one in found], [one.by_chance for one in found]
    assert np.mean(errors) == pytest.approx(np.mean(chance), rel=0.12)
    assert np.mean([one.error.low == 0 for one in found]) > 0.9


def test_intervals_hold_the_error_of_a_model_that_is_too_sure():
    """Sharpness 2 has an error of 0.102 (200,000 prompts); of 100 intervals from 40 prompts nearly all hold it."""
    held = 0
    for seed in range(100):
        margins, labels, groups = world(40, seed, sharpness=2.0)
        error = pair_calibration(expit(margins), labels, groups, seed=seed, draws=200).error
        held += error.low <= 0.102 <= error.high
    assert held >= 85


def test_calibrate_tells_before_from_after():
    margins, labels, prompts = world(150, 4, sharpness=3.0)
    found = calibrate(margins, labels, prompts, seed=1)
    assert found is not None
    assert found.temperature == pytest.approx(3.0, rel=0.35)
    assert found.after.error.value < 0.05 < found.before.error.low
    assert found.log_loss_after < found.log_loss_before
    for side in (found.reliability_before, found.reliability_after):
        assert sum(one.agree.n for one in side) == len(margins)
        assert all(0.5 <= one.confidence <= 1 for one in side)
    assert found == calibrate(margins, labels, prompts, seed=1)
    assert calibrate([1.0], [1.0], ["p"], seed=1) is None


def test_a_temperature_that_does_not_help_others_is_not_in_use():
    margins, labels, prompts = world(150, 4, sharpness=3.0)
    found = calibrate(margins, labels, prompts, seed=1)
    assert (found.applied, found.in_use) == (found.temperature, found.after)
    worse = found.model_copy(update={"log_loss_after": found.log_loss_before + 0.01})
    assert (worse.applied, worse.in_use) == (1.0, found.before)


def test_reliability_points_are_means_of_their_bins():
    first, second = reliability(np.array([0.95, 0.91, 0.3]), np.array([1.0, 0.0, 0.5]), ["a", "b", "c"])
    assert (first.confidence, first.agree.value, first.agree.n) == (pytest.approx(0.7), 0.5, 1)
    assert (second.confidence, second.agree.value, second.agree.n) == (pytest.approx(0.93), 0.5, 2)


@given(st.floats(0.001, 0.999), st.floats(0.001, 0.999), st.floats(0.5, 5))
def test_both_orders_are_evened_so_that_swapping_swaps_and_temperature_divides(p: float, q: float, temperature: float):
    assert evened(p, q) == 1 - evened(q, p) or evened(q, p) == 1 - evened(p, q)
    assert evened(p, p) == evened(1.0, 1.0) == 0.5
    cooled = evened(expit(log_odds(p) / temperature), expit(log_odds(q) / temperature))
    assert log_odds(cooled) == pytest.approx(log_odds(evened(p, q)) / temperature, abs=1e-3)
