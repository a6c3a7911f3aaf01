"""The losses of SFT and DPO, as pure functions from token log-probabilities (PAPER section 4).

All take natural logarithms. `owner[j]` says which reply token j belongs to; replies are numbered from 0. Every loss is
a sum divided by totals of the whole step, so micro-batches and processes add up to the same gradient. TRL's trainers
are the oracle in `tests/training/test_losses_trl.py`; the losses of RL are in `policy_gradient`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..errors import FlywheelError


def per_reply(values: Tensor, owner: Tensor, replies: int) -> Tensor:
    """Sum of token values by reply: (S,), (S,) -> (replies,)."""
    return torch.zeros(replies, dtype=values.dtype, device=values.device).index_add(0, owner, values)


def sft(logprobs: Tensor, total: int | None = None) -> Tensor:
    """Mean negative log-likelihood of the reply tokens (S,); `total` is the step's number of tokens, default S."""
    return -logprobs.sum() / (len(logprobs) if total is None else total)


class Totals(NamedTuple):
    """What DPO's two sums are divided by: pairs and chosen tokens of the step, over micro-batches and processes."""

    pairs: int
    chosen_tokens: int


class DPO(NamedTuple):
    """The loss, and what to watch, each a mean over the pairs given.

    `chosen` and `rejected` are the implicit rewards, beta times the log ratio to the reference; `margin` is their
    difference and `accuracy` how often it is positive. Both rewards falling while the margin grows is likelihood
    displacement: the SFT term holds it up.
    """

    loss: Tensor
    margin: Tensor
    accuracy: Tensor
    chosen: Tensor
    rejected: Tensor


def dpo(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float, *,
    smoothing: float | Tensor = 0.0, lengths: Tensor | None = None, normalise: bool = False, sft_weight: float = 0.0,
    totals: Totals | None = None,
) -> DPO:  # fmt: skip
    """Sigmoid DPO (Rafailov et al. 2023) on summed reply log-probabilities, each of shape (pairs,).

    `smoothing`: the probability that a pair's label is wrong, one or one a pair, in [0, 0.5]: conservative DPO
    (Mitchell 2023), (1 - e) times the loss plus e times that of the pair turned round. See `label_noise` for pairs on
    which reviewers disagreed. `normalise` divides each reply's log ratio by its length (TRL's "sigmoid_norm", after
    Tulu 3, Lambert et al. 2024). `sft_weight` times the negative log-likelihood of a chosen token is added (TRL's
    "sft" beside "sigmoid"; RPO, Pang et al. 2024). Both need `lengths`, (pairs, 2): tokens of chosen and rejected.
    `totals`: of the whole step; by default the pairs given are all of it.

    By hand, one pair, beta 0.5: chosen -4 against a reference of -6, rejected -5 against -3, of 2 and 4 tokens. Log
    ratios 2 and -2, margin 0.5 x 4 = 2: loss log(1 + e^-2) = 0.126928; with e = 0.1 it is 0.126928 + 0.1 x 2
    = 0.326928; normalised the margin is 0.5 (1 + 0.5) = 0.75 and the loss 0.386871; `sft_weight` 0.2 adds
    0.2 x 4 / 2 = 0.4.

    Raises:
        FlywheelError: smoothing outside [0, 0.5], or `lengths` is missing.
    """
    if lengths is None and (normalise or sft_weight):
        raise FlywheelError("normalised DPO and its SFT term need `lengths`: give the tokens of both replies.")
    wrong = torch.as_tensor(smoothing, dtype=chosen.dtype, device=chosen.device)
    if not bool(((wrong >= 0) & (wrong <= 0.5)).all()):
        raise FlywheelError(f"smoothing is {smoothing}, must be in [0, 0.5]: above, a pair should be turned round.")
    ratios = torch.stack((chosen - reference_chosen, rejected - reference_rejected), 1)
    used = ratios / lengths if normalise and lengths is not None else ratios
    margin = beta * (used[:, 0] - used[:, 1])
    each = -(1 - wrong) * logsigmoid(margin) - wrong * logsigmoid(-margin)
    loss = each.sum() / (totals.pairs if totals else len(chosen))
    if sft_weight and lengths is not None:
        loss = loss - sft_weight * chosen.sum() / (totals.chosen_tokens if totals else lengths[:, 0].sum())
    rewards = beta * ratios.detach()
    ahead = rewards[:, 0] - rewards[:, 1]
    return DPO(loss, ahead.mean(), (ahead > 0).float().mean(), rewards[:, 0].mean(), rewards[:, 1].mean())


def label_noise(agreement: Tensor, base: float = 0.0) -> Tensor:
    """DPO's `smoothing` for soft labels: `agreement` (pairs,), in [0.5, 1], is the share of reviewers for the chosen.

    A reviewer picked at random would call the pair turned round with probability 1 - agreement; with `base`, the error
    that even unanimous labels keep, the two combine as a chain of two coins: n (1 - base) + (1 - n) base.

    By hand: agreement 2/3 and base 0.1: 1/3 x 0.9 + 2/3 x 0.1 = 0.3667.
    """
    noise = 1 - agreement
    return noise * (1 - base) + (1 - noise) * base
