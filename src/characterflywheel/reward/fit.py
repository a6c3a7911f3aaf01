"""How preference models are trained: the objective, the order of the pairs, one loop (PAPER section 3)."""

from collections.abc import Callable, Sequence
from itertools import islice
from math import cos, isfinite, pi
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..config import RewardConfig
from ..errors import FlywheelError
from ..records import Preference
from .losses import rao_kupper
from .network import RewardNetwork

T = TypeVar("T")
HEAD_RATE = 20.0  # the head starts from nothing and may move faster than the layers
OnStep = Callable[[float], None]


class Objective(NamedTuple):
    """What a preference model is told besides who won. Fields as in `RewardConfig`."""

    margin: float = 0.0
    smoothing: float = 0.0
    tie_threshold: float = 0.0
    centring: float = 0.01

    @classmethod
    def of(cls, config: RewardConfig) -> "Objective":
        return cls(config.margin, config.label_smoothing, config.tie_threshold, config.centring)

    def loss(self, margins: Tensor, labels: Sequence[float], strengths: Sequence[float]) -> Tensor:
        """Mean loss of pairs by their score margins; a strength below zero is the second reply's."""
        label, strength = (torch.tensor(v, device=margins.device, dtype=margins.dtype) for v in (labels, strengths))
        target = self.margin * strength * (label != 0.5)
        return rao_kupper(margins, label, threshold=self.tie_threshold, target=target, smoothing=self.smoothing)


def train(
    net: RewardNetwork,
    steps: Sequence[Sequence[T]],
    loss_of: Callable[[Sequence[T]], Tensor],
    *,
    learning_rate: float,
    on_step: OnStep = lambda loss: None,
) -> None:
    """AdamW with a tenth of warm-up, then a cosine to zero; gradients clipped to norm 1; see `RewardNetwork.finish`.

    `loss_of` is called once a step, `on_step` with its value. Raises FlywheelError at a loss or gradient that is not
    finite, before the step changes a weight.
    """
    layers = [p for p in net.model.parameters() if p.requires_grad]
    head = list(net.head.parameters())
    groups = [
        {"params": layers, "lr": learning_rate, "share": 1.0},
        {"params": head, "lr": learning_rate * HEAD_RATE, "share": HEAD_RATE},
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    warm = max(1, len(steps) // 10)
    net.train()
    for number, items in enumerate(steps):
        rate = (number + 1) / warm if number < warm else (1 + cos(pi * (number - warm) / max(1, len(steps) - warm))) / 2
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * group["share"] * rate
        loss = loss_of(items)
        loss.backward()  # type: ignore[no-untyped-call]
        norm, value = float(nn.utils.clip_grad_norm_([*layers, *head], 1.0)), float(loss.detach())
        if not (isfinite(value) and isfinite(norm)):
            raise FlywheelError(
                f"reward model, step {number + 1} of {len(steps)}: loss {value}, gradient norm {norm}, both must be "
                f"finite; lower reward.learning_rate ({learning_rate:g}) or check the backbone's weights."
            )
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        on_step(value)
    net.eval()
    net.finish()


def schedule(pairs: Sequence[Preference], per_step: int, epochs: int, seed: int) -> list[list[Preference]]:
    """Batches of pairs: prompts in a new seeded order each epoch, the pairs of a prompt side by side.

    Pairs of one prompt share its tokens, and often replies, when they are in one step; that makes steps cheap.
    """
    by_prompt: dict[str, list[Preference]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt_id, []).append(pair)
    prompts, steps = sorted(by_prompt), []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(prompts))
        line = (pair for i in order for pair in by_prompt[prompts[i]])
        while batch := list(islice(line, per_step)):
            steps.append(batch)
    return steps
