"""Losses against TRL's trainers, against hand-worked examples, and against expectations known exactly."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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


# Group-relative advantages


def test_advantages_equal_trl_formula() -> None:
    """TRL: (reward - mean of group) / (std of group + 1e-4), std with Bessel's correction."""
    rewards = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    flat, groups = rewards.flatten(), rewards.view(-1, 4)
    mean, deviation = groups.mean(1).repeat_interleave(4), groups.std(1).repeat_interleave(4)
    expected = ((flat - mean) / (deviation + 1e-4)).view(5, 4)
    torch.testing.assert_close(losses.advantages(rewards), expected, atol=1e-6, rtol=0)


@given(st.floats(-1e3, 1e3, width=32), st.integers(2, 9))
def test_equal_rewards_have_exactly_no_advantage(reward: float, group: int) -> None:
    """Exactly: Adam would scale the least rounding error up to a full step."""
    advantages = losses.advantages(torch.full((2, group), reward))
    assert advantages.abs().max().item() == 0.0


@given(st.lists(st.integers(-100, 100), min_size=3, max_size=8, unique=True))
def test_advantages_keep_the_order_and_sum_to_nothing(rewards: list[int]) -> None:
    row = losses.advantages(torch.tensor([rewards], dtype=torch.float64))[0]
    assert abs(row.sum().item()) < 1e-6
    best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
    assert row.argmax() == best
    assert row.argmin() == worst


# GRPO


def test_grpo_by_hand() -> None:
    """Four tokens, clip to [0.8, 1.28], weights truncated at 2.

    token  ratio  advantage  weight            objective
      1    1.5       1       min(1, 2)   = 1   min(1.5, 1.28)   =  1.28 (clipped)
      2    0.5      -1       min(0.5, 2) = .5  min(-0.5, -0.8)  = -0.8  (clipped), times 0.5 = -0.4
      3    0.5       2       min(4, 2)   = 2   min(1.0, 1.6)    =  1.0,            times 2   =  2.0
      4    1.5      -1       min(1, 2)   = 1   min(-1.5, -1.28) = -1.5
    Loss: -(1.28 - 0.4 + 2 - 1.5) / 4 = -0.345. Weights: mean 4.5 / 4, effective 4.5² / (4 * 6.25) = 0.81.
    """
    ratio, weight = torch.tensor([1.5, 0.5, 0.5, 1.5]), torch.tensor([1.0, 0.5, 4.0, 1.0])
    before = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    out = losses.grpo(
        before + ratio.log(), before, before - weight.log(), torch.tensor([1.0, -1.0, 2.0, -1.0]),
        clip_low=0.2, clip_high=0.28, truncate=2.0,
    )  # fmt: skip
    assert out.loss.item() == pytest.approx(-0.345, abs=1e-6)
    assert out.clipped_share.item() == 0.5
    assert out.weight_mean.item() == pytest.approx(1.125)
    assert out.weight_max.item() == pytest.approx(2.0)
    assert out.effective_share.item() == pytest.approx(0.81)


@pytest.mark.parametrize("seed", [0, 1])
def test_grpo_equals_trl(trl: Any, seed: int) -> None:
    """`GRPOTrainer._compute_loss`, type "bnpo" (a mean over tokens), with token-truncated importance weights."""
    owner, mask = ragged(seed)
    before = -noise(len(owner), seed + 10).abs()
    logprobs = (before + noise(len(owner), seed + 20, 0.3)).requires_grad_()
    sampler = before + noise(len(owner), seed + 30, 0.6)
    advantage = noise(6, seed + 40)
    identity = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, reduce=lambda x, reduction: x)
    weights = torch.exp(padded(before - sampler, mask)).clamp(max=2.0)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (padded(logprobs, mask), torch.zeros(mask.shape), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=0.0, loss_type="bnpo", epsilon_low=0.2, epsilon_high=0.28,
        args=SimpleNamespace(delta=None), use_vllm=True, vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=False), current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        accelerator=identity, _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": torch.ones(6, 1, dtype=torch.long), "completion_ids": ids,
        "completion_mask": mask.long(), "advantages": advantage, "old_per_token_logps": padded(before, mask),
        "importance_sampling_ratio": weights,
    }  # fmt: skip
    expected = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    (wanted,) = torch.autograd.grad(expected, logprobs)
    out = losses.grpo(
        logprobs, before, sampler, advantage[owner], clip_low=0.2, clip_high=0.28, truncate=2.0
    )  # fmt: skip
    torch.testing.assert_close(out.loss, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(out.loss, logprobs)[0], wanted, atol=1e-6, rtol=0)
    clipped = trainer._metrics["eval"]["clip_ratio/region_mean"][0]
    assert out.clipped_share.item() == pytest.approx(clipped, abs=1e-6)
    assert clipped > 0
    assert out.weight_max.item() == 2.0, "some weights must be truncated for this to test truncation"


def test_micro_batches_add_up() -> None:
    values = [noise(12, seed) for seed in range(4)]
    keywords = {"clip_low": 0.2, "clip_high": 0.28, "truncate": 2.0}
    whole = losses.grpo(*values, **keywords).loss
    parts = [losses.grpo(*(v[a:b] for v in values), **keywords, tokens=12).loss for a, b in ((0, 5), (5, 12))]
    torch.testing.assert_close(sum(parts), whole, atol=1e-6, rtol=0)


def policies() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a policy over seven actions, the sampler's log-probabilities, near by, and the actions' advantages."""
    logits = noise(7, 0).double().requires_grad_()
    sampler = torch.log_softmax(logits.detach() + noise(7, 1, 0.5).double(), -1)
    return logits, sampler, noise(7, 2).double()


def expected_gradient(truncate: float) -> tuple[Tensor, Tensor]:
    """The loss's gradient in expectation over the sampler, by summing over all actions; and the true one."""
    logits, sampler, advantage = policies()
    total = torch.zeros(7, dtype=torch.float64)
    for action in range(7):
        now = torch.log_softmax(logits, -1)[action : action + 1]
        out = losses.grpo(
            now, now.detach(), sampler[action : action + 1], advantage[action : action + 1], clip_low=0.2,
            clip_high=0.28, truncate=truncate,
        )  # fmt: skip
        total += sampler[action].exp() * torch.autograd.grad(out.loss, logits)[0]
    (true,) = torch.autograd.grad(-(torch.softmax(logits, -1) * advantage).sum(), logits)
    return total, true


def test_the_importance_correction_is_unbiased() -> None:
    """Actions drawn from another policy, yet the gradient of the trained policy's expected reward."""
    corrected, true = expected_gradient(truncate=1e9)
    torch.testing.assert_close(corrected, true, atol=1e-12, rtol=0)


def test_truncation_bounds_the_weights_at_the_price_of_bias() -> None:
    truncated, true = expected_gradient(truncate=1.0)
    assert (truncated - true).abs().max() > 1e-3
    assert torch.nn.functional.cosine_similarity(truncated, true, dim=0) > 0.9


def test_the_weights_are_constants_and_equal_samplers_need_none() -> None:
    before = noise(9, 0).requires_grad_()
    out = losses.grpo(noise(9, 1), before, before.detach(), noise(9, 2), clip_low=0.2, clip_high=0.28, truncate=2.0)
    assert out.weight_mean.item() == out.weight_max.item() == out.effective_share.item() == 1.0
    sampler = noise(9, 3).requires_grad_()
    losses.grpo(
        before, before.detach(), sampler, noise(9, 2), clip_low=0.2, clip_high=0.28, truncate=2.0
    ).loss.backward()
    assert sampler.grad is None


# Divergence from the reference


def test_the_kl_estimate_is_unbiased_and_never_negative() -> None:
    logits, reference, _ = policies()
    policy = torch.log_softmax(logits, -1)
    estimate = losses.kl_to_reference(policy, reference)
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * estimate).sum(), exact, atol=1e-12, rtol=0)
    assert estimate.min() >= 0
    assert losses.kl_to_reference(reference, reference).abs().max() == 0
