import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from characterflywheel.reward.losses import bradley_terry, centring


def test_hard_labels_give_the_loss_of_trl():
    """TRL's RewardTrainer: -logsigmoid(chosen - rejected).mean()."""
    margins = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 5
    assert bradley_terry(margins, torch.ones(50)).item() == pytest.approx(-logsigmoid(margins).mean().item(), abs=1e-6)


def test_soft_label_by_hand():
    """d = ln 3: s(d) = 3/4. l = 2/3: -(2/3 ln 3/4 + 1/3 ln 1/4) = 0.65390."""
    expected = -(2 / 3 * math.log(3 / 4) + 1 / 3 * math.log(1 / 4))
    assert bradley_terry(torch.tensor([math.log(3)]), torch.tensor([2 / 3])).item() == pytest.approx(expected, abs=1e-6)


def test_soft_label_is_least_where_the_model_agrees():
    margin = torch.tensor([math.log(3)], requires_grad=True)
    bradley_terry(margin, torch.tensor([0.75])).backward()
    assert margin.grad is not None
    assert margin.grad.item() == pytest.approx(0.0, abs=1e-6)


def test_swapped_pair_with_swapped_label_costs_the_same():
    margins, labels = torch.tensor([0.3, -4.0]), torch.tensor([0.5, 1.0])
    assert bradley_terry(margins, labels).item() == pytest.approx(bradley_terry(-margins, 1 - labels).item())


def test_centring_is_the_mean_square():
    assert centring(torch.tensor([1.0, -3.0]), torch.tensor([1.0, 0.0])).item() == 6.5
