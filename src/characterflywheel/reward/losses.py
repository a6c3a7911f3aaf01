"""Preference losses as pure functions of scores (PAPER section 3).

A pair is given by its margin d, the first reply's score less the second's, and its label l, the share of reviewers
who preferred the first. Every loss is a mean over pairs and stays the same when the replies swap places, that is for
(-d, 1 - l, -target).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional


def bradley_terry(margins: Tensor, labels: Tensor, *, target: Tensor | float = 0.0, smoothing: float = 0.0) -> Tensor:
    """Mean of -[l log s(d - t) + (1 - l) log s(t - d)] (Bradley and Terry 1952, with soft labels).

    `margins`, `labels`: any one shape. `target` t: log-odds that the first reply has to win by (below zero: the second
    has to), of that shape or one number, as in Llama 2 (Touvron et al. 2023): with labels of 1 this is the loss of
    TRL's `RewardTrainer` with a margin, -log s(d - t). With any label it is least at d = logit(l) + t: the label says
    how sure people are, the target by how much more the scores have to differ. `smoothing` s is the chance that a
    label is the wrong way round: l becomes l (1 - s) + (1 - l) s (conservative DPO, Mitchell 2023).
    """
    return functional.binary_cross_entropy_with_logits(margins - target, _smoothed(labels, smoothing))


def rao_kupper(
    margins: Tensor, labels: Tensor, *, threshold: float, target: Tensor | float = 0.0, smoothing: float = 0.0
) -> Tensor:
    """Mean negative log-likelihood where ties are an outcome of their own (Rao and Kupper 1967).

    With z = d - t and a threshold h >= 0 (log-odds within which replies count as equal): P(first) = s(z - h),
    P(second) = s(-z - h), P(tie) = (exp(2h) - 1) P(first) P(second). Labels of exactly 1/2 are ties; other labels are
    shares of decided reviews. At threshold 0 this is `bradley_terry`: nothing can tie, so a tie is half a win for each.
    """
    if threshold == 0:
        return bradley_terry(margins, labels, target=target, smoothing=smoothing)
    ties = labels == 0.5
    labels = _smoothed(labels, smoothing)
    first = functional.softplus(threshold - (margins - target))  # -log P(first)
    second = functional.softplus(threshold + (margins - target))
    # a tie is as likely as both winning, times a constant: the constant keeps the likelihood whole
    tied = first + second - math.log(math.expm1(2 * threshold))
    return torch.where(ties, tied, labels * first + (1 - labels) * second).mean()


def centring(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean of (chosen + rejected)²: holds scores near zero, since preferences leave their level free (Eisenstein 2023).

    The term that TRL's `center_rewards_coefficient` weighs.
    """
    return torch.mean((chosen + rejected) ** 2)


def _smoothed(labels: Tensor, smoothing: float) -> Tensor:
    return labels * (1 - smoothing) + (1 - labels) * smoothing
