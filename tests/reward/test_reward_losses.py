"""Losses by hand, against independent references, and for any scores: swapping, monotony, what smoothing does."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import logsigmoid

from characterflywheel.reward.losses import bradley_terry, centring, rao_kupper

MARGINS = st.floats(-20, 20)
LABELS = st.floats(0, 1)
TARGETS = st.floats(-5, 5)
SMOOTHING = st.floats(0, 0.49)
THRESHOLDS = st.floats(0.01, 4)


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def test_hard_labels_give_the_logistic_loss():
    margins = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 5
    assert bradley_terry(margins, torch.ones(50)).item() == pytest.approx(-logsigmoid(margins).mean().item(), abs=1e-6)


def test_soft_label_by_hand():
    """d = ln 3: s(d) = 3/4. l = 2/3: -(2/3 ln 3/4 + 1/3 ln 1/4) = 0.65390."""
    expected = -(2 / 3 * math.log(3 / 4) + 1 / 3 * math.log(1 / 4))
    assert bradley_terry(one(math.log(3)), one(2 / 3)).item() == pytest.approx(expected, abs=1e-6)


def test_target_by_hand():
    """d = ln 12, t = ln 4: d - t = ln 3, so -ln 3/4 = 0.28768 for a hard label, as in Llama 2 and TRL."""
    assert bradley_terry(one(math.log(12)), one(1.0), target=math.log(4)).item() == pytest.approx(0.28768, abs=1e-5)


def test_smoothing_by_hand():
    """l = 1, s = 0.1 at d = ln 3: -(0.9 ln 3/4 + 0.1 ln 1/4) = 0.39754, conservative DPO's."""
    assert bradley_terry(one(math.log(3)), one(1.0), smoothing=0.1).item() == pytest.approx(0.39754, abs=1e-5)


def test_ties_by_hand():
    """d = 0, h = ln 2: P(first) = P(second) = 1/3, so P(tie) = (4 - 1) / 9 = 1/3 and every outcome costs ln 3."""
    for label in (0.0, 0.5, 1.0):
        loss = rao_kupper(one(0.0), one(label), threshold=math.log(2))
        assert loss.item() == pytest.approx(math.log(3), abs=1e-9)


def test_centring_is_trls():
    assert centring(torch.tensor([1.0, -3.0]), torch.tensor([1.0, 0.0])).item() == 6.5


@given(MARGINS, LABELS, TARGETS, SMOOTHING)
def test_swapping_the_replies_changes_nothing(d: float, label: float, t: float, s: float):
    straight = bradley_terry(one(d), one(label), target=t, smoothing=s)
    swapped = bradley_terry(one(-d), one(1 - label), target=-t, smoothing=s)
    assert straight.item() == pytest.approx(swapped.item(), rel=1e-9, abs=1e-9)


@given(MARGINS, st.sampled_from([0.0, 1 / 3, 0.5, 2 / 3, 1.0]), TARGETS, SMOOTHING, THRESHOLDS)
def test_swapping_changes_nothing_with_ties_either(d: float, label: float, t: float, s: float, h: float):
    straight = rao_kupper(one(d), one(label), threshold=h, target=t, smoothing=s)
    swapped = rao_kupper(one(-d), one(1 - label), threshold=h, target=-t, smoothing=s)
    assert straight.item() == pytest.approx(swapped.item(), rel=1e-9, abs=1e-9)


@given(MARGINS, LABELS, TARGETS, SMOOTHING)
def test_without_a_threshold_it_is_bradley_terry(d: float, label: float, t: float, s: float):
    both = [
        rao_kupper(one(d), one(label), threshold=0.0, target=t, smoothing=s),
        bradley_terry(one(d), one(label), target=t, smoothing=s),
    ]
    assert both[0].item() == both[1].item()


@given(MARGINS, st.floats(0, 1).filter(lambda label: abs(label - 0.5) > 1e-6), TARGETS, SMOOTHING)
def test_a_vanishing_threshold_is_bradley_terry_for_decided_pairs(d: float, label: float, t: float, s: float):
    nearly = rao_kupper(one(d), one(label), threshold=1e-9, target=t, smoothing=s)
    assert nearly.item() == pytest.approx(bradley_terry(one(d), one(label), target=t, smoothing=s).item(), abs=1e-7)


@given(MARGINS, THRESHOLDS)
def test_the_three_outcomes_are_all_there_is(d: float, h: float):
    total = sum(math.exp(-rao_kupper(one(d), one(label), threshold=h).item()) for label in (0.0, 0.5, 1.0))
    assert total == pytest.approx(1.0, abs=1e-9)


@given(st.floats(-10, 9), st.floats(0.01, 5), st.floats(0, 3))
def test_a_larger_margin_costs_a_decided_pair_less_and_a_larger_target_more(d: float, step: float, t: float):
    def cost(margin: float, target: float) -> float:
        return bradley_terry(one(margin), one(1.0), target=target).item()

    assert cost(d + step, t) < cost(d, t) < cost(d, t + step)


@given(st.floats(0.05, 0.95), TARGETS, SMOOTHING)
def test_the_best_margin_is_the_labels_log_odds_and_the_target(label: float, t: float, s: float):
    smooth = label * (1 - s) + (1 - label) * s
    found = minimize_scalar(
        lambda d: bradley_terry(one(d), one(label), target=t, smoothing=s).item(), bounds=(-15, 15), method="bounded",
        options={"xatol": 1e-8},
    )  # fmt: skip
    assert found.x == pytest.approx(math.log(smooth / (1 - smooth)) + t, abs=1e-3)


@given(MARGINS, LABELS, st.floats(0, 2), SMOOTHING)
def test_smoothing_is_a_mixture_of_the_label_and_its_opposite(d: float, label: float, t: float, s: float):
    expected = (1 - s) * bradley_terry(one(d), one(label), target=t) + s * bradley_terry(
        one(d), one(1 - label), target=t
    )
    assert bradley_terry(one(d), one(label), target=t, smoothing=s).item() == pytest.approx(expected.item(), abs=1e-9)


@given(THRESHOLDS)
def test_a_tie_is_likeliest_between_equals(h: float):
    margin = torch.tensor([0.0], requires_grad=True)
    rao_kupper(margin, torch.tensor([0.5]), threshold=h).backward()
    assert margin.grad is not None
    assert margin.grad.item() == pytest.approx(0.0, abs=1e-6)
    apart = [rao_kupper(one(d), one(0.5), threshold=h).item() for d in (0.0, 1.0, 3.0)]
    assert apart == sorted(apart)
