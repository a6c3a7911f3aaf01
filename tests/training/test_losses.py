"""Losses of SFT and DPO against hand-worked examples, and their parts against the whole; TRL in `test_losses_trl`."""

import math
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from characterflywheel.errors import FlywheelError
from characterflywheel.training import losses

# Supervised fine-tuning


def test_sft_is_cross_entropy_over_reply_tokens() -> None:
    logits, targets = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)), torch.arange(7)
    logs = torch.log_softmax(logits, -1).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(losses.sft(logs), torch.nn.functional.cross_entropy(logits, targets), atol=1e-6, rtol=0)


def test_per_reply_adds_tokens_up() -> None:
    """Replies of 2, 0 and 3 tokens: [1, 2], [], [3, 4, 5]."""
    sums = losses.per_reply(torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([0, 0, 2, 2, 2]), 3)
    assert sums.tolist() == [3.0, 0.0, 12.0]


# Direct preference optimisation


def test_dpo_by_hand() -> None:
    """beta 0.5. Pair 1: ((-2) - (-4)) - ((-5) - (-3)) = 4, margin 2. Pair 2: (-1) - 1 = -2, margin -1.

    Loss: (log(1 + e^-2) + log(1 + e^1)) / 2 = (0.126928 + 1.313262) / 2; the first pair is ranked right.
    """
    out = losses.dpo(torch.tensor([-2.0, -4]), torch.tensor([-5.0, -2]), torch.tensor([-4.0, -3]),
                     torch.tensor([-3.0, -3]), 0.5)  # fmt: skip
    assert out.loss.item() == pytest.approx((0.126928 + 1.313262) / 2, abs=1e-6)
    assert out.margin.item() == pytest.approx(0.5)
    assert out.accuracy.item() == 0.5


def test_dpo_at_the_reference_is_log_two() -> None:
    same = torch.tensor([-3.0, -4.0])
    assert losses.dpo(same, same - 1, same, same - 1, 0.3).loss.item() == pytest.approx(math.log(2))


def test_dpo_variants_by_hand() -> None:
    """The docstring's pair: log ratios 2 and -2 of 2 and 4 tokens, beta 0.5, so a margin of 2."""
    pair = [torch.tensor([value]) for value in (-4.0, -5.0, -6.0, -3.0)]
    lengths = torch.tensor([[2, 4]])
    assert losses.dpo(*pair, 0.5).loss.item() == pytest.approx(0.126928, abs=1e-6)
    assert losses.dpo(*pair, 0.5, smoothing=0.1).loss.item() == pytest.approx(0.326928, abs=1e-6)
    normalised = losses.dpo(*pair, 0.5, lengths=lengths, normalise=True)
    assert normalised.loss.item() == pytest.approx(0.386871, abs=1e-6)
    with_sft = losses.dpo(*pair, 0.5, lengths=lengths, sft_weight=0.2)
    assert with_sft.loss.item() == pytest.approx(0.526928, abs=1e-6)
    for out in (normalised, with_sft):
        assert [value.item() for value in out[1:]] == [2.0, 1.0, 1.0, -1.0]


def test_a_label_that_reviewers_split_on_wants_their_odds() -> None:
    """With agreement p the loss is least where the margin is log(p / (1 - p)): for 3 of 4, log 3 = 1.0986."""
    smoothing = losses.label_noise(torch.tensor([0.75]))
    margin = torch.tensor([math.log(3)], requires_grad=True)
    zero = torch.zeros(1)
    losses.dpo(margin, zero, zero, zero, 1.0, smoothing=smoothing).loss.backward()
    assert margin.grad is not None
    assert abs(margin.grad.item()) < 1e-6


def test_label_noise_by_hand() -> None:
    """Agreement 2/3: 1/3, and 1/3 x 0.9 + 2/3 x 0.1 = 0.3667 with a base of 0.1; unanimous is the base, a tie 0.5."""
    shares = torch.tensor([2 / 3, 1.0, 0.5])
    torch.testing.assert_close(losses.label_noise(shares), torch.tensor([1 / 3, 0.0, 0.5]))
    torch.testing.assert_close(losses.label_noise(shares, 0.1), torch.tensor([0.366667, 0.1, 0.5]))


@pytest.mark.parametrize("smoothing", [-0.1, 0.6, float("nan")])
def test_impossible_smoothing_is_refused(smoothing: float) -> None:
    one = torch.zeros(2)
    with pytest.raises(FlywheelError, match=r"must be in \[0, 0.5\]"):
        losses.dpo(one, one, one, one, 0.1, smoothing=torch.tensor([0.1, smoothing]))


@pytest.mark.parametrize("keywords", [{"normalise": True}, {"sft_weight": 0.1}])
def test_what_needs_lengths_says_so(keywords: dict[str, Any]) -> None:
    one = torch.zeros(2)
    with pytest.raises(FlywheelError, match="need `lengths`"):
        losses.dpo(one, one, one, one, 0.1, **keywords)


# Micro-batches and processes


@given(st.integers(0, 10_000), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_parts_add_up_exactly(seed: int, parts: list[int]) -> None:
    """Any split of a step's pairs, divided by the step's totals, gives the whole's loss and gradients."""
    pairs, draw = sum(parts), torch.Generator().manual_seed(seed)
    values = torch.randn(4, pairs, generator=draw, dtype=torch.float64).requires_grad_()
    lengths = torch.randint(1, 30, (pairs, 2), generator=draw)
    noise = torch.rand(pairs, generator=draw, dtype=torch.float64) / 2
    totals = losses.Totals(pairs, int(lengths[:, 0].sum()))

    def loss(start: int, stop: int, totals: losses.Totals | None) -> Tensor:
        four = values[:, start:stop]
        dpo = losses.dpo(
            *four.unbind(0), 0.3, smoothing=noise[start:stop], lengths=lengths[start:stop], normalise=seed % 2 == 0,
            sft_weight=0.7, totals=totals,
        )  # fmt: skip
        return dpo.loss + losses.sft(four.flatten(), None if totals is None else 4 * pairs)

    whole = loss(0, pairs, None)
    ends = list(accumulate(parts, initial=0))
    split = torch.stack([loss(a, b, totals) for a, b in pairwise(ends)]).sum()
    torch.testing.assert_close(split, whole, atol=1e-12, rtol=1e-12)
    (wanted,), (got,) = torch.autograd.grad(whole, values), torch.autograd.grad(split, values)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)
