"""Policy gradients for rollouts from any sampler (PAPER section 4): advantages, GRPO and importance correction.

A reply is a run of tokens, flat over the batch: token values have shape (S,), `owner[j]` says which reply token j
belongs to, replies are numbered from 0. Logarithms are natural. Three policies meet here: `logprobs` are the learner's
now, with gradient; `before` the learner's at the start of the step; `sampler` the rollout engine's, which may run in
another precision or on weights some steps old. GRPO clips the ratio of the first two, the importance weights correct
for the third.

Every loss is a sum divided by a total of the whole step, so micro-batches and processes add up to the same gradient,
as long as a reply is not cut in two. TRL's `GRPOTrainer` is the oracle in `tests/training/test_policy_gradient_trl.py`.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import FlywheelError
from .losses import per_reply

Scale = Literal["group", "batch", "none"]
Aggregation = Literal["token", "sequence", "constant"]

LOG_RATIO_MAX = 10.0  # |log ratio| of a token beyond which two policies are not the same model any more: 22,026-fold


def advantages(rewards: Tensor, *, scale: Scale = "group") -> Tensor:
    """Group-relative advantages: (prompts, group) rewards, centred by their group's mean.

    `scale`: "group" divides by the group's deviation (GRPO, Shao et al. 2024), "batch" by that of all rewards given
    (Hu et al. 2025; give those of all processes), "none" by nothing (Dr. GRPO, Liu et al. 2025). Deviations have
    Bessel's correction, and 1e-4 is added to them. A group of equal rewards teaches nothing: its advantages are
    exactly 0.

    By hand: rewards 1, 2, 3 have mean 2 and deviation 1: "group" gives ±1 / 1.0001, "none" gives ±1 and 0.

    Raises:
        FlywheelError: a reward that is not finite.
    """
    _check_rewards(rewards)
    shifted = rewards - rewards[:, :1]  # so that equal rewards are exactly 0: an optimiser would scale rounding up
    centred = shifted - shifted.mean(1, keepdim=True)
    if scale == "none":
        return centred
    deviation = rewards.std() if scale == "batch" else shifted.std(1, keepdim=True)
    return centred / (deviation + 1e-4)


class Pair(NamedTuple):
    """Which replies of a group online DPO compares."""

    best: int
    worst: int


def best_against_worst(rewards: Tensor, min_gap: float = 0.0) -> list[Pair | None]:
    """Online DPO's pair of each group (prompts, group), None where best and worst tie or are less than `min_gap` apart.

    Of equal rewards the first is taken, as TRL's `OnlineDPOTrainer` does for its two. The loss is `losses.dpo` on
    the pair's summed log-probabilities (Guo et al. 2024, with best against worst of n).

    By hand: [[1, 3, 2], [5, 5, 5]] gives [Pair(best=1, worst=0), None]; with `min_gap` 2.5 both are None.

    Raises:
        FlywheelError: a reward that is not finite.
    """
    _check_rewards(rewards)
    gaps = (rewards.amax(1) - rewards.amin(1)).tolist()
    ends = zip(rewards.argmax(1).tolist(), rewards.argmin(1).tolist(), gaps, strict=True)
    return [Pair(best, worst) if gap > 0 and gap >= min_gap else None for best, worst, gap in ends]


def _check_rewards(rewards: Tensor) -> None:
    bad = int((~rewards.isfinite()).sum())
    if bad:
        raise FlywheelError(
            f"{bad} of {rewards.numel()} rewards are not finite: look at the reward model, or leave their groups out."
        )


class Health(NamedTuple):
    """Sums over tokens that say how far sampler and learner are apart; see `merge` for several micro-batches.

    `masked` counts tokens of weight 0, `exploded` those of them whose ratio was not finite or beyond `explode`.
    """

    tokens: int
    total: float
    squares: float
    maximum: float
    masked: int
    exploded: int

    @property
    def mean(self) -> float:
        """Mean weight; 1 in expectation if nothing is truncated or masked."""
        return self.total / self.tokens

    @property
    def effective_share(self) -> float:
        """Kish's effective sample size over the number of tokens, in [0, 1]; 0 if every token is masked."""
        return self.total**2 / (self.tokens * self.squares) if self.squares > 0 else 0.0

    @property
    def masked_share(self) -> float:
        return self.masked / self.tokens

    @property
    def exploded_share(self) -> float:
        return self.exploded / self.tokens


def merge(parts: Sequence[Health]) -> Health:
    """The health of several micro-batches or processes, as if they had been one. Give at least one."""
    tokens, total, squares, maximum, masked, exploded = zip(*parts, strict=True)
    return Health(sum(tokens), math.fsum(total), math.fsum(squares), max(maximum), sum(masked), sum(exploded))


class Importance(NamedTuple):
    """Weights of shape (S,), constants for the gradient, and their health."""

    weights: Tensor
    health: Health


def importance(
    before: Tensor, sampler: Tensor, owner: Tensor, replies: int, *, level: Literal["token", "sequence"] = "token",
    truncate: float | None = 2.0, token_low: float | None = None, token_high: float | None = None,
    sequence_low: float | None = None, sequence_high: float | None = None, explode: float = LOG_RATIO_MAX,
) -> Importance:  # fmt: skip
    """Weights that turn the sampler's expectations into the learner's: exp(before - sampler), bounded as asked.

    At level "token" a token's weight is its own ratio; at level "sequence" it is the product over its reply. The
    weight is at most `truncate` (Yao et al. 2025). A token is masked (weight 0) if its own ratio lies outside
    [token_low, token_high], or its reply's product outside [sequence_low, sequence_high]; None is no bound. So TRL's
    `vllm_importance_sampling_mode` are here: token_truncate and sequence_truncate by level, token_mask and
    sequence_mask with `truncate=None` and bounds at that level; truncated tokens with masked replies go together too.

    What it does to the bias: at level "sequence" without bounds an expectation over replies is exact. Truncation at C
    moves it by at most max|f| E_sampler[(w - C)+], a mask by max|f| times the learner's probability of what is masked.
    At level "token" that holds for each token given those before it, drawn from the sampler.

    A ratio that is not finite (engines report NaN for a token now and then), or whose logarithm is beyond `explode`
    either way, is no ratio between two copies of a model: the token is masked and counted as exploded, and with it the
    whole reply where the product of the reply is asked for.

    By hand, two replies of two tokens, before - sampler = log of 0.5, 4 and 3, 1: "token" with truncate 2 gives
    0.5, 2, 2, 1: total 5.5, squares 9.25, effective share 5.5² / (4 x 9.25) = 0.818. "sequence" gives 2, 2, 2, 2
    (products 2 and 3). With sequence_high 2.5 the second reply is masked: 0.5, 2, 0, 0.

    Raises:
        FlywheelError: a log-probability of the learner's is not finite: it diverged.
    """
    if not bool(before.isfinite().all()):
        raise FlywheelError(
            f"{int((~before.isfinite()).sum())} of {before.numel()} log-probabilities of the learner are not finite: "
            "it diverged; lower the learning rate."
        )
    with torch.no_grad():
        log_ratio = before - sampler.to(before.device)
        sane = log_ratio.abs() <= explode  # False for NaN
        keep = sane
        if level == "sequence" or sequence_low is not None or sequence_high is not None:
            product = per_reply(log_ratio, owner, replies).exp()[owner]
            sane = sane & (per_reply((~sane).float(), owner, replies)[owner] == 0) & product.isfinite()
            keep = sane & _within(product, sequence_low, sequence_high)
        ratio = log_ratio.exp()
        keep = keep & _within(ratio, token_low, token_high)
        weights = product if level == "sequence" else ratio
        weights = weights.clamp(max=truncate) if truncate is not None else weights
        weights = torch.where(keep, weights, 0.0)
        sums = [weights.sum(), (weights**2).sum(), weights.max(), (~keep).sum(), (~sane).sum()]
        total, squares, maximum, masked, exploded = torch.stack([s.double() for s in sums]).tolist()
    return Importance(weights, Health(weights.numel(), total, squares, maximum, int(masked), int(exploded)))


def _within(ratio: Tensor, low: float | None, high: float | None) -> Tensor:
    return (ratio >= (low or 0.0)) & (ratio <= (math.inf if high is None else high))


def kl_to_reference(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Token-wise estimate of KL(policy || reference), never negative, unbiased (Schulman's k3); shape (S,)."""
    difference = reference - logprobs
    return difference.exp() - difference - 1


def denominator(lengths: Sequence[int], aggregation: Aggregation, longest: int) -> int:
    """What `grpo`'s sum is divided by, for replies of these lengths; add up over processes for the step's `total`.

    "token": their tokens; "sequence": their number; "constant": their number times `longest`, the most tokens a reply
    may have.
    """
    return {"token": sum(lengths), "sequence": len(lengths), "constant": len(lengths) * longest}[aggregation]


class GRPO(NamedTuple):
    """The loss; the share of this batch's tokens that are clipped; the KL term, as the loss sums it, before weighting.

    `kl` is None without a reference.
    """

    loss: Tensor
    clipped_share: Tensor
    kl: Tensor | None


def grpo(
    logprobs: Tensor, before: Tensor, weights: Tensor, advantage: Tensor, owner: Tensor, *, clip_low: float,
    clip_high: float, total: float, aggregation: Aggregation = "token", ratio_max: float | None = None,
    reference: Tensor | None = None, kl_weight: float = 0.0, kl_unbiased: bool = True,
    explode: float = LOG_RATIO_MAX,
) -> GRPO:  # fmt: skip
    """Clipped policy gradient with clip-higher (DAPO, Yu et al. 2025) and importance weights.

    Token inputs have shape (S,), `advantage` (replies,). `total` is `denominator` over the whole step. A token counts
    1 / total under "token" (a mean over tokens: DAPO; TRL's "dapo", and "bnpo" in one batch) and "constant" (a sum
    over a constant: Dr. GRPO; "dr_grpo"), and 1 / (its reply's tokens x total) under "sequence" (a mean over replies
    of means over tokens: the first GRPO; "grpo").

    `ratio_max` bounds the ratio of tokens with negative advantage, which the clip leaves free (TRL's `delta`,
    INTELLECT-2). `kl_weight` times the k3 estimate against `reference` is added, and the importance weights do not
    touch it (as TRL). With `kl_unbiased` it is multiplied by the ratio, so that its gradient too is that of the KL
    (DeepSeek-V3.2; TRL's `use_bias_correction_kl`); without, only its value is.

    Raises:
        FlywheelError: the learner's log-probabilities are not finite, or moved by more than `explode` within the step.
    """
    log_ratio = logprobs - before
    moved = float(log_ratio.detach().abs().max())
    if not moved <= explode:
        raise FlywheelError(
            f"a token's log-probability moved by {moved:.3g} within one step, more than {explode:g}: the learner "
            "diverged; lower the learning rate or make fewer updates of a step's rollouts."
        )
    ratio = log_ratio.exp()
    each = advantage.to(ratio.device)[owner]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    free = ratio.clamp(max=ratio_max) if ratio_max is not None else ratio
    objective = weights * torch.minimum(free * each, clipped * each)
    beyond = ((ratio < 1 - clip_low) & (each < 0)) | ((ratio > 1 + clip_high) & (each > 0))
    count = torch.full_like(ratio, 1 / total)
    if aggregation == "sequence":
        count = count / torch.bincount(owner, minlength=len(advantage))[owner]
    loss, kl = -(count * objective).sum(), None
    if reference is not None:
        estimate = kl_to_reference(logprobs, reference)
        kl = (count * (estimate * ratio if kl_unbiased else estimate)).sum()
        loss = loss + kl_weight * kl
    return GRPO(loss, beyond.float().mean(), None if kl is None else kl.detach())
