"""Losses against TRL's trainers, against hand-worked examples, and against expectations known exactly."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from characterflywheel.training import losses


@pytest.fixture(scope="module")
def trl() -> Any:
    """TRL's trainer classes, whose loss methods are called on given log-probabilities."""
    return pytest.importorskip("trl", reason="TRL is the oracle")


def ragged(seed: int, replies: int = 6) -> tuple[Tensor, Tensor]:
    """Which reply each flat token belongs to, and the same as a padded mask (replies, longest)."""
    lengths = torch.randint(1, 9, (replies,), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    return torch.arange(replies).repeat_interleave(lengths), mask


def noise(size: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def padded(flat: Tensor, mask: Tensor) -> Tensor:
    out = torch.zeros(mask.shape)
    out[mask] = flat
    return out


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


def test_dpo_equals_trl(trl: Any) -> None:
    """`DPOTrainer._compute_loss` on a model that returns our token log-probabilities, three pairs of ragged replies."""
    owner, mask = ragged(1)
    policy = (-noise(len(owner), 2).abs()).requires_grad_()
    reference = policy.detach() + noise(len(owner), 3, 0.5)
    start = torch.zeros(6, 1, dtype=torch.long)  # TRL's masks cover the prompt too: one token here

    def answer(**_: object) -> SimpleNamespace:
        rest = torch.zeros(mask.shape)
        return SimpleNamespace(log_probs=padded(policy, mask), entropy=rest, mean_logits=rest, is_top1=rest.bool())

    identity = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x)
    summed = losses.per_reply(reference, owner, 6)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=identity, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0],
        beta=0.1, use_weighting=False, label_smoothing=0.0, _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(6, mask.shape[1] + 1, dtype=torch.long),
        "attention_mask": torch.cat((start + 1, mask.long()), 1), "completion_mask": torch.cat((start, mask.long()), 1),
        "ref_chosen_logps": summed[:3], "ref_rejected_logps": summed[3:],
    }  # fmt: skip
    expected = trl.DPOTrainer._compute_loss(trainer, answer, inputs, False)
    (wanted,) = torch.autograd.grad(expected, policy)
    now = losses.per_reply(policy, owner, 6)
    out = losses.dpo(now[:3], now[3:], summed[:3], summed[3:], 0.1)
    torch.testing.assert_close(out.loss, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(out.loss, policy)[0], wanted, atol=1e-6, rtol=0)
    watched = trainer._metrics["eval"]
    assert out.margin.item() == pytest.approx(watched["rewards/margins"][0], abs=1e-6)
    assert out.accuracy.item() == pytest.approx(watched["rewards/accuracies"][0])


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
