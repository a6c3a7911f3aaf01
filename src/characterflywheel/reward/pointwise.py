"""The pointwise preference model: one scalar a reply, Bradley-Terry on differences (PAPER section 3).

Its score drives reinforcement learning and selection.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import FlywheelError
from ..llm.shared_prefix import Path as TokenPath
from ..records import ChatMessage, Preference
from . import fit, format, network
from .losses import centring
from .preference_model import PreferenceModel


class Scorer(Protocol):
    """Whatever scores replies: one list of scores for each prompt, higher is better."""

    def score(
        self, prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]]
    ) -> list[list[float]]: ...


class Scale(NamedTuple):
    """Mean and standard deviation of raw scores on the training replies."""

    mean: float
    deviation: float


class Pointwise(PreferenceModel):
    """Scores replies, standardised by `scale`.

    A difference times `scale.deviation` is the log-odds of preference, before they are divided by `temperature`.
    """

    ends = 1

    def __init__(
        self, net: network.RewardNetwork, form: format.Form, *, scale: Scale = Scale(0.0, 1.0),
        temperature: float = 1.0, threads: int = 2,
    ) -> None:  # fmt: skip
        super().__init__(net, form, temperature=temperature, threads=threads)
        self.scale = scale

    def score(self, prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]]) -> list[list[float]]:
        """Standardised scores of the replies of each prompt; each prompt is run once for all of its replies.

        Raises FlywheelError for a score that is not finite, and for a prompt that cannot fit.
        """
        torch.set_num_threads(self.threads)
        paths = [self.paths(prompt, texts) for prompt, texts in zip(prompts, replies, strict=True)]
        sizes = [sum(map(len, mine[0])) + sum(len(path[-1]) for path in mine[1:]) if mine else 0 for mine in paths]
        out: list[list[float]] = []
        for batch in network.in_batches(sizes):
            mine = [path for i in batch for path in paths[i]]
            if mine:
                with torch.inference_mode():
                    raw = self.raw(mine)
                if not bool(torch.isfinite(raw).all()):
                    raise FlywheelError(
                        f"the pointwise reward model gave {int((~torch.isfinite(raw)).sum())} scores of {len(mine)} "
                        "that are not finite: its weights are damaged; train the reward stage again."
                    )
            flat = iter(raw.tolist() if mine else [])
            out += [[(next(flat) - self.scale.mean) / self.scale.deviation for _ in paths[i]] for i in batch]
        return out

    def prefers(
        self, prompts: Sequence[Sequence[ChatMessage]], firsts: Sequence[str], seconds: Sequence[str]
    ) -> list[float]:
        """P(first is better than second) for each prompt."""
        scores = self.score(prompts, list(zip(firsts, seconds, strict=True)))
        margins = torch.tensor([a - b for a, b in scores], dtype=torch.float64) * self.scale.deviation
        return [float(p) for p in torch.sigmoid(margins / self.temperature)]

    def paths(self, prompt: Sequence[ChatMessage], texts: Sequence[str]) -> list[TokenPath]:
        """For each reply, token segments from the system prompt to the reply's end."""
        if not texts:
            return []
        head = self.form.prompt(tuple(prompt))
        return [(*head, self.form.reply(text)) for text in texts]

    def raw(self, paths: Sequence[TokenPath]) -> Tensor:
        """Scores before standardisation, with gradients where enabled; the head reads the last token."""
        return self.net(paths, [(sum(map(len, path)) - 1,) for path in paths]).squeeze(1)  # type: ignore[no-any-return]

    def fit(
        self,
        steps: Sequence[Sequence[Preference]],
        learning_rate: float,
        on_step: fit.OnStep = lambda _: None,
        objective: fit.Objective = fit.Objective(),
    ) -> None:
        """Train on batches of pairs, then set `scale` on their replies."""
        pairs = {pair.id: pair for step in steps for pair in step}
        sides = {p.id: self.paths(p.prompt, (p.chosen[-1].content, p.rejected[-1].content)) for p in pairs.values()}

        def loss_of(batch: Sequence[Preference]) -> Tensor:
            chosen, rejected = self.raw([path for p in batch for path in sides[p.id]]).view(-1, 2).unbind(1)
            loss = objective.loss(chosen - rejected, [p.label for p in batch], [p.strength for p in batch])
            return loss + objective.centring * centring(chosen, rejected)

        torch.set_num_threads(self.threads)
        fit.train(self.net, steps, loss_of, learning_rate=learning_rate, on_step=on_step)
        replies: dict[tuple[ChatMessage, ...], set[str]] = {}
        for pair in pairs.values():
            replies.setdefault(pair.prompt, set()).update((pair.chosen[-1].content, pair.rejected[-1].content))
        prompts = sorted(replies, key=lambda prompt: [(m.role, m.content) for m in prompt])
        self.scale = Scale(0.0, 1.0)
        scored = self.score(prompts, [sorted(replies[prompt]) for prompt in prompts])
        flat = torch.tensor([s for mine in scored for s in mine], dtype=torch.float64)
        self.scale = Scale(float(flat.mean()), max(float(flat.std(correction=0)), 1e-6))
