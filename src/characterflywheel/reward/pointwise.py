"""The pointwise preference model: one scalar a reply, Bradley-Terry on differences (PAPER section 3).

Its score drives reinforcement learning and selection.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..llm.chat_format import ChatFormat
from ..llm.shared_prefix import Path as TokenPath
from ..records import ChatMessage, Preference
from . import backbone
from .losses import bradley_terry, centring

CENTRING = 0.01


class Scorer(Protocol):
    """Whatever scores replies: one list of scores for each prompt, higher is better."""

    def score(
        self, prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]]
    ) -> list[list[float]]: ...


class Scale(NamedTuple):
    """Mean and standard deviation of raw scores on the training replies."""

    mean: float
    deviation: float


class Pointwise:
    """Scores replies, standardised by `scale`. A difference times `scale.deviation` is the log-odds of preference."""

    def __init__(
        self,
        net: backbone.Backbone,
        form: ChatFormat,
        max_reply_tokens: int,
        scale: Scale = Scale(0.0, 1.0),
        threads: int = 2,
    ) -> None:
        self.net, self.form, self.max_reply_tokens, self.scale, self.threads = (
            net,
            form,
            max_reply_tokens,
            scale,
            threads,
        )

    def score(self, prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]]) -> list[list[float]]:
        """Standardised scores of the replies of each prompt; each prompt is run once for all of its replies."""
        torch.set_num_threads(self.threads)
        paths = [[self.path(p, text) for text in texts] for p, texts in zip(prompts, replies, strict=True)]
        sizes = [sum(len(s) for s in mine[0]) + sum(len(p[-1]) for p in mine[1:]) if mine else 0 for mine in paths]
        out: list[list[float]] = []
        for batch in backbone.in_batches(sizes):
            mine = [path for i in batch for path in paths[i]]
            with torch.inference_mode():
                flat = iter(self.raw(mine).tolist() if mine else [])
            out += [[(next(flat) - self.scale.mean) / self.scale.deviation for _ in paths[i]] for i in batch]
        return out

    def prefers(
        self, prompts: Sequence[Sequence[ChatMessage]], firsts: Sequence[str], seconds: Sequence[str]
    ) -> list[float]:
        """P(first is better than second) for each prompt."""
        scores = self.score(prompts, list(zip(firsts, seconds, strict=True)))
        margins = torch.tensor([a - b for a, b in scores], dtype=torch.float64) * self.scale.deviation
        return [float(p) for p in torch.sigmoid(margins)]

    def path(self, prompt: Sequence[ChatMessage], text: str) -> TokenPath:
        """Token segments from the system prompt to the end of the reply."""
        return (
            *backbone.prompt_path(self.form, prompt), backbone.reply_segment(self.form, text, self.max_reply_tokens)
        )  # fmt: skip

    def raw(self, paths: Sequence[TokenPath]) -> Tensor:
        """Scores before standardisation, with gradients; the head reads the last token."""
        scores: Tensor = self.net(paths, [(sum(map(len, path)) - 1,) for path in paths])
        return scores

    def fit(
        self,
        steps: Sequence[Sequence[Preference]],
        learning_rate: float,
        on_step: Callable[[float], None] = lambda _: None,
    ) -> None:
        """Train on batches of pairs, then set `scale` on their replies."""

        def loss_of(pairs: Sequence[Preference]) -> Tensor:
            paths = [self.path(p.prompt, side[-1].content) for p in pairs for side in (p.chosen, p.rejected)]
            chosen, rejected = self.raw(paths).view(-1, 2).unbind(1)
            labels = torch.tensor([p.label for p in pairs], device=chosen.device)
            return bradley_terry(chosen - rejected, labels) + CENTRING * centring((chosen + rejected) / 2)

        torch.set_num_threads(self.threads)
        backbone.train(self.net, steps, loss_of, learning_rate=learning_rate, on_step=on_step)
        replies: dict[tuple[ChatMessage, ...], set[str]] = {}
        for pair in (pair for step in steps for pair in step):
            replies.setdefault(pair.prompt, set()).update((pair.chosen[-1].content, pair.rejected[-1].content))
        prompts = sorted(replies, key=lambda prompt: [(m.role, m.content) for m in prompt])
        self.scale = Scale(0.0, 1.0)
        scored = self.score(prompts, [sorted(replies[prompt]) for prompt in prompts])
        flat = torch.tensor([s for mine in scored for s in mine], dtype=torch.float64)
        self.scale = Scale(float(flat.mean()), max(float(flat.std(correction=0)), 1e-6))
