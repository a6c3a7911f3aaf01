"""Bradley-Terry losses as pure functions of scores (PAPER section 3)."""

import torch
from torch import Tensor
from torch.nn import functional


def bradley_terry(margins: Tensor, labels: Tensor) -> Tensor:
    """Mean of -[l log s(d) + (1 - l) log s(-d)] (Bradley and Terry 1952, soft labels).

    `margins`: score of the first reply minus that of the second, any shape; `labels`: share of reviewers who
    preferred the first, same shape. With labels of 1 this is the loss of TRL's `RewardTrainer`.
    """
    return functional.binary_cross_entropy_with_logits(margins, labels)


def centring(scores: Tensor) -> Tensor:
    """Mean square of the scores: keeps them near zero, where preferences leave their level free (Eisenstein 2023)."""
    return torch.mean(scores**2)
