"""The fit against scikit-learn; what missing labels, users and class weights must and must not change."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from characterflywheel.errors import FlywheelError
from characterflywheel.ids import derive_seed
from characterflywheel.reward.metrics import area_under_curve, calibration_error
from characterflywheel.reward.signals import (
    PENALTIES,
    choose_penalty,
    cross_fit,
    fit,
    folds,
    logistic,
    platt,
    temperature,
)
from characterflywheel.reward.signals.logistic import balance, frame
from characterflywheel.reward.signals.probabilities import cross_fitted, miscalibration


def example(rows: int = 200, seed: int = 0, offset: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 5)) * [1, 3, 1, 0.2, 1] + 2
    y = (rng.random(rows) < expit((x - 2) @ [1, -0.7, 0, 2.5, 0] + offset)).astype(float)
    return x, y


@pytest.mark.parametrize(("rows", "penalty"), [(200, 2.0), (200, 0.1), (4, 0.5)])
def test_fit_equals_scikit_learn(rows: int, penalty: float):
    """Balanced classes; our offset lacks what the weights added, log(negatives / positives)."""
    x, y = example(rows)
    z = (x - x.mean(0)) / x.std(0)
    theirs = LogisticRegression(C=1 / penalty, class_weight="balanced", tol=1e-10, max_iter=10_000).fit(z, y)
    shift = np.log((1 - y).sum() / y.sum())
    ours = fit(x, y[:, None], penalty)
    assert ours.logits(x)[:, 0] == pytest.approx(theirs.decision_function(z) - shift, abs=2e-3)
    assert ours.weight[0] == pytest.approx(theirs.coef_[0], abs=1e-3)


def test_spread_is_a_prior_deviation():
    """Halving a column's spread is the same as four times the penalty on its weight."""
    x, y = example()
    z = (x - x.mean(0)) / x.std(0)
    spread = np.array([1, 0.5, 1, 2, 0.1])
    theirs = LogisticRegression(C=0.5, class_weight="balanced", tol=1e-10, max_iter=10_000).fit(z * spread, y)
    ours = fit(x, y[:, None], 2.0, spread).logits(x)[:, 0]
    assert np.ptp(ours - theirs.decision_function(z * spread)) < 2e-3


def test_few_rows_and_many_columns_have_the_same_frame():
    """The axes of the smaller matrix: distances between rows are kept, and no column is lost."""
    x = np.random.default_rng(0).normal(size=(12, 40))
    place = frame(x)
    z, whole = place.coordinates(x), (x - x.mean(0)) / x.std(0)
    assert z.shape == (12, 11)
    assert z @ z.T == pytest.approx(whole @ whole.T, abs=1e-8)
    assert place.axes.T @ place.axes == pytest.approx(np.eye(11), abs=1e-8)


def test_many_rows_are_standardised_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """In parts everything is as it was, and takes a part's memory and not the features' once more."""
    x, y = np.random.default_rng(0).normal(size=(9000, 300)), (np.arange(9000) % 3 > 0).astype(float)[:, None]
    tracemalloc.start()
    place = frame(x, axes=20)
    assert place.coordinates(x).shape == (9000, 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.6 * x.nbytes
    few = x[:700, :40]
    whole = fit(few, y[:700], 2.0)
    monkeypatch.setattr(logistic, "ROWS_AT_ONCE", 64)
    parts = fit(few, y[:700], 2.0)
    assert parts.logits(few) == pytest.approx(whole.logits(few), abs=1e-3)
    assert (parts.mean, parts.scale) == (pytest.approx(whole.mean), pytest.approx(whole.scale))
    assert parts.logits(few[:0]).shape == (0, 1)


MASKS = st.lists(st.booleans(), min_size=80, max_size=80)


@settings(max_examples=15, deadline=None)
@given(MASKS, st.integers(0, 99))
def test_masked_labels_never_matter(mask: list[bool], seed: int):
    """Each label alone, on the rows where it is known, is what all of them give together."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(80, 4))
    y = (rng.random((80, 2)) < 0.5).astype(float)
    y[np.array(mask), 1] = np.nan
    both = fit(x, y, np.array([3.0, 5.0]))
    first = fit(x, y[:, :1], 3.0)
    assert both.logits(x)[:, 0] == pytest.approx(first.logits(x)[:, 0], abs=2e-3)
    known = ~np.isnan(y[:, 1])
    weights, shift = balance(y)
    alone, its_shift = balance(y[known, 1:])
    assert not weights[~known, 1].any()
    assert np.array_equal(weights[known, 1:], alone)
    assert shift[1] == its_shift[0]


def test_a_label_of_one_class_gets_its_share_only():
    x, y = example()
    found = fit(x, np.c_[y, np.ones(len(y)), np.full(len(y), np.nan)], 1.0)
    assert not found.weight[1:].any()
    assert expit(found.offset[1:]) == pytest.approx([(200.5 / 201), 0.5])
    assert found.weight[0] == pytest.approx(fit(x, y[:, None], 1.0).weight[0], abs=1e-3)


def test_labels_that_are_no_labels():
    x, y = example()
    with pytest.raises(FlywheelError, match="1 labels are neither 0 nor 1"):
        fit(x, np.where(np.arange(200) == 3, 0.5, y)[:, None], 1.0)
    with pytest.raises(FlywheelError, match="1 users: at least 2"):
        cross_fit(x, y[:, None], ["u"] * 200, seed=0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=5, max_size=60), st.integers(0, 5))
def test_no_group_is_in_two_folds(members: list[int], seed: int):
    groups = [str(m) for m in members]
    fold = folds(groups, 3, seed)
    assert all(len({int(f) for f, g in zip(fold, groups, strict=True) if g == name}) == 1 for name in set(groups))
    assert np.array_equal(fold, folds(groups, 3, seed))


def test_cross_fit_cannot_know_what_only_identifies_a_user():
    """One feature a user, labels by user at random: knowing a user is worth everything within, nothing across."""
    rng = np.random.default_rng(3)
    users = np.repeat(np.arange(40), 5)
    y = np.repeat((rng.random(40) < 0.5).astype(float), 5)
    ranks = cross_fit(np.eye(40)[users], y[:, None], [str(u) for u in users], seed=1).ranks[:, 0]
    assert np.ptp(ranks) < 1.5
    seen = fit(np.eye(40)[users], y[:, None], 1.0).logits(np.eye(40)[users])[:, 0]
    assert area_under_curve(y, seen) == 1.0


def test_a_folds_own_labels_do_not_change_its_predictions_at_one_penalty(monkeypatch: pytest.MonkeyPatch):
    """Flip every label of one fold: what is said of its rows stays, what is said of the others changes."""
    x, y = example(400, seed=5)
    users = [f"u{i % 50}" for i in range(400)]
    assert choose_penalty(x, y[:, None], users, seed=2)[0] in PENALTIES
    monkeypatch.setattr(logistic, "PENALTIES", (2.0,))
    before = cross_fit(x, y[:, None], users, seed=2)
    assert area_under_curve(y, before.ranks[:, 0]) > 0.7
    mine = folds(users, 5, derive_seed(2, "outer")) == 0
    after = cross_fit(x, np.where(mine, 1 - y, y)[:, None], users, seed=2)
    assert np.array_equal(before.logits[mine], after.logits[mine])
    assert not np.allclose(before.logits[~mine], after.logits[~mine])


def test_ranks_of_pure_noise_are_not_worse_than_chance():
    """With few negatives, the folds' offsets alone would rank unseen users the wrong way round (an AUC near 0.2)."""
    areas = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        users = [str(u) for u in np.repeat(np.arange(40), 3)]
        y = (rng.random(120) < 0.88).astype(float)
        held_out = cross_fit(rng.normal(size=(120, 20)), y[:, None], users, seed=seed)
        areas.append(area_under_curve(y, held_out.ranks[:, 0]))
    assert 0.42 < np.mean(areas) < 0.58


def test_platt_undoes_what_was_done_to_log_odds():
    rng = np.random.default_rng(4)
    logits = rng.normal(size=6000)
    labels = (rng.random(6000) < expit(logits)).astype(float)
    found = platt(3 * (logits - 1), labels)
    assert found.temperature == pytest.approx(3.0, rel=0.1)
    assert found.offset == pytest.approx(1.0, abs=0.1)
    assert temperature(3 * logits, labels) == pytest.approx(3.0, rel=0.1)
    theirs = LogisticRegression(C=1e6, tol=1e-10).fit(logits[:, None], labels)
    ours = platt(logits, labels)
    assert 1 / ours.temperature == pytest.approx(theirs.coef_[0, 0], rel=1e-2)
    assert ours.offset == pytest.approx(theirs.intercept_[0], abs=1e-2)


def test_class_weights_leave_probabilities_calibrated():
    """One label in twenty-five is positive; the classes weigh the same in training, yet 4% means 4%."""
    x, y = example(6000, seed=7, offset=-4.0)
    users = [f"u{i % 300}" for i in range(6000)]
    held_out = cross_fit(x, y[:, None], users, seed=0)
    p = cross_fitted(held_out.logits[:, 0], y, users, seed=0)
    assert y.mean() < 0.15
    assert p.mean() == pytest.approx(y.mean(), abs=0.005)
    assert calibration_error(p, y).value < 0.02
    assert miscalibration(p, y) < 0.02
    weighted = expit(held_out.logits[:, 0] + balance(y[:, None]).shift)  # what the fit itself believes
    assert calibration_error(weighted, y).value > 0.1


def test_miscalibration_takes_chance_off():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.2, 0.8, 400)
    fair = [miscalibration(p, (rng.random(400) < p).astype(float)) for _ in range(40)]
    off = [miscalibration(p, (rng.random(400) < np.clip(p + 0.15, 0, 1)).astype(float)) for _ in range(40)]
    plain = [calibration_error(p, (rng.random(400) < p).astype(float)).value for _ in range(40)]
    assert np.mean(fair) < 0.03 < np.mean(plain)
    assert np.mean(off) == pytest.approx(0.15, abs=0.02)
