"""The pairwise preference model: both replies read together, says which is better (PAPER section 3).

One sequence holds the context, the first reply and the second; the head reads the end of both. Each pair is learnt in
both orders, and answered in both: half the log-odds of (A, B) less those of (B, A), so that swapping the replies swaps
the answer, and a temperature divides it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import FlywheelError
from ..llm.shared_prefix import Path as TokenPath
from ..records import ChatMessage, Preference
from . import fit, network
from .calibration import preferred
from .preference_model import PreferenceModel


class Orders(NamedTuple):
    """P(the reply read first is better), with the caller's first reply read first, and with its second."""

    straight: list[float]
    swapped: list[float]


class Pairwise(PreferenceModel):
    """Compares two replies to one prompt. Its log-odds are divided by `temperature`."""

    ends = 2

    def prefers(
        self, prompts: Sequence[Sequence[ChatMessage]], firsts: Sequence[str], seconds: Sequence[str]
    ) -> list[float]:
        """P(first is better than second) per prompt; swapped replies give exactly one minus that, equal ones 0.5."""
        return preferred(self.both_orders(prompts, firsts, seconds), firsts, seconds)

    def both_orders(
        self, prompts: Sequence[Sequence[ChatMessage]], firsts: Sequence[str], seconds: Sequence[str]
    ) -> Orders:
        """P(the reply read first is better) in both orders of reading.

        Raises FlywheelError for an answer that is not finite, and for a prompt that cannot fit.
        """
        torch.set_num_threads(self.threads)
        # equal whichever reply the caller names first, to the last bit: the smaller text is always laid out first
        turned = [a > b for a, b in zip(firsts, seconds, strict=True)]
        pairs = [
            self.paths(p, b, a) if t else self.paths(p, a, b)
            for p, a, b, t in zip(prompts, firsts, seconds, turned, strict=True)
        ]
        sizes = [sum(map(len, one)) + sum(map(len, two[-2:])) for one, two in pairs]
        orders = Orders([], [])
        for batch in network.in_batches(sizes):
            with torch.inference_mode():
                logits = self.raw([path for i in batch for path in pairs[i]]).double() / self.temperature
            if not bool(torch.isfinite(logits).all()):
                raise FlywheelError(
                    f"the pairwise reward model gave {int((~torch.isfinite(logits)).sum())} answers of {len(logits)} "
                    "that are not finite: its weights are damaged; train the reward stage again."
                )
            for i, (p, q) in zip(batch, torch.sigmoid(logits).view(-1, 2).tolist(), strict=True):
                orders.straight.append(q if turned[i] else p)
                orders.swapped.append(p if turned[i] else q)
        return orders

    def paths(self, prompt: Sequence[ChatMessage], first: str, second: str) -> tuple[TokenPath, TokenPath]:
        """Both orders as token segments: the prompt's, one reply, the other with what opens a reply before it."""
        head = self.form.prompt(tuple(prompt))
        one, two = self.form.reply(first), self.form.reply(second)
        return (*head, one, (*self.form.opening, *two)), (*head, two, (*self.form.opening, *one))

    def raw(self, paths: Sequence[TokenPath]) -> Tensor:
        """Log-odds that the first reply of each path is better, with gradients where enabled."""
        ends = [(sum(map(len, path[:-1])) - 1, sum(map(len, path)) - 1) for path in paths]
        return self.net(paths, ends).squeeze(1)  # type: ignore[no-any-return]

    def fit(
        self,
        steps: Sequence[Sequence[Preference]],
        learning_rate: float,
        on_step: fit.OnStep = lambda _: None,
        objective: fit.Objective = fit.Objective(),
    ) -> None:
        """Train on batches of pairs, each in both orders. Scores of pairs need no centring: swapping does it."""
        pairs = {pair.id: pair for step in steps for pair in step}
        orders = {p.id: self.paths(p.prompt, p.chosen[-1].content, p.rejected[-1].content) for p in pairs.values()}

        def loss_of(batch: Sequence[Preference]) -> Tensor:
            labels = [label for p in batch for label in (p.label, 1 - p.label)]
            strengths = [strength for p in batch for strength in (p.strength, -p.strength)]
            return objective.loss(self.raw([path for p in batch for path in orders[p.id]]), labels, strengths)

        torch.set_num_threads(self.threads)
        fit.train(self.net, steps, loss_of, learning_rate=learning_rate, on_step=on_step)
