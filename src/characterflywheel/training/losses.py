"""The losses of herding, as pure functions from token log-probabilities (PAPER section 4).

All take natural logarithms. `owner[j]` says which reply token j belongs to; replies are numbered from 0. TRL's
trainers are the oracle in `tests/training/test_losses.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def per_reply(values: Tensor, owner: Tensor, replies: int) -> Tensor:
    """Sum of token values by reply: (S,), (S,) -> (replies,)."""
    return torch.zeros(replies, dtype=values.dtype, device=values.device).index_add(0, owner, values)


def sft(logprobs: Tensor) -> Tensor:
    """Mean negative log-likelihood of the reply tokens (S,)."""
    return -logprobs.mean()


class DPO(NamedTuple):
    """Loss and what to watch: implicit rewards' margin (mean) and how often the chosen reply is ahead."""

    loss: Tensor
    margin: Tensor
    accuracy: Tensor


def dpo(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float) -> DPO:
    """Sigmoid DPO (Rafailov et al. 2023) on summed reply log-probabilities, each of shape (pairs,)."""
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return DPO(-logsigmoid(margin).mean(), margin.detach().mean(), (margin > 0).float().mean())


def advantages(rewards: Tensor) -> Tensor:
    """Group-relative advantages (GRPO): (prompts, group) rewards, centred and scaled by their group's deviation.

    A group of equal rewards teaches nothing: its advantages are 0.
    """
    rewards = rewards - rewards[:, :1]  # so that equal rewards are exactly 0: an optimiser would scale rounding up
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4)


class GRPO(NamedTuple):
    """Loss and the health of the importance correction; all scalars."""

    loss: Tensor
    clipped_share: Tensor
    weight_mean: Tensor
    weight_max: Tensor
    effective_share: Tensor


def grpo(
    logprobs: Tensor,
    before: Tensor,
    sampler: Tensor,
    advantage: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    truncate: float,
    tokens: int | None = None,
) -> GRPO:
    """Token-level GRPO with clip-higher and truncated importance-sampling correction; inputs of shape (S,).

    `logprobs` are the policy's now, `before` the trainer's at the start of the step (the clipped ratio is between
    the two), `sampler` the rollout engine's: its difference from the trainer is corrected by the weight
    min(exp(before - sampler), truncate), a constant (Yao et al. 2025). Divided by `tokens` (default S), the token
    count of the whole step, so that micro-batches add up. `effective_share` is the effective sample size over S.
    """
    weight = torch.exp(before - sampler).clamp(max=truncate).detach()
    ratio = torch.exp(logprobs - before)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    beyond = ((ratio < 1 - clip_low) & (advantage < 0)) | ((ratio > 1 + clip_high) & (advantage > 0))
    return GRPO(
        -(weight * objective).sum() / (tokens or len(logprobs)),
        beyond.float().mean(),
        weight.mean(),
        weight.max(),
        weight.sum() ** 2 / (len(weight) * (weight**2).sum()),
    )


def kl_to_reference(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Token-wise estimate of KL(policy || reference), never negative, unbiased (Schulman's k3); shape (S,)."""
    difference = reference - logprobs
    return difference.exp() - difference - 1
