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
