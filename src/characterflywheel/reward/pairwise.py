"""The pairwise preference model: both replies read together, says which is better (PAPER section 3).

One sequence holds the context, the first reply and the second; the head reads the end of both. Each pair is learnt in
both orders, and answered in both: (p(A, B) + 1 - p(B, A)) / 2, so that swapping the replies swaps the answer.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..llm.chat_format import ChatFormat
from ..llm.shared_prefix import Path as TokenPath
from ..records import ChatMessage, Preference
from . import backbone
from .losses import bradley_terry


class Pairwise:
    """Compares two replies to one prompt."""

    def __init__(self, net: backbone.Backbone, form: ChatFormat, max_reply_tokens: int, threads: int = 2) -> None:
        self.net, self.form, self.max_reply_tokens, self.threads = net, form, max_reply_tokens, threads
        self.opening = backbone.reply_opening(form)

    def prefers(
        self, prompts: Sequence[Sequence[ChatMessage]], firsts: Sequence[str], seconds: Sequence[str]
    ) -> list[float]:
        """P(first is better than second) for each prompt; swapped replies give exactly one minus that."""
        one, two = self.both_orders(prompts, firsts, seconds)
        return [(p + (1.0 - q)) / 2 for p, q in zip(one, two, strict=True)]

    def both_orders(
        self, prompts: Sequence[Sequence[ChatMessage]], firsts: Sequence[str], seconds: Sequence[str]
    ) -> tuple[list[float], list[float]]:
        """P(the reply read first is better): with `firsts` read first, and with `seconds` read first."""
        torch.set_num_threads(self.threads)
        # equal whichever reply the caller names first, to the last bit: the smaller text is always laid out first
        turned = [a > b for a, b in zip(firsts, seconds, strict=True)]
        triples = [(p, b, a) if t else (p, a, b) for p, a, b, t in zip(prompts, firsts, seconds, turned, strict=True)]
        paths = [path for p, a, b in triples for path in (self.path(p, a, b), self.path(p, b, a))]
        sizes = [
            sum(map(len, path)) + sum(map(len, other[-2:])) for path, other in zip(paths[::2], paths[1::2], strict=True)
        ]
        forward: list[float] = []
        backward: list[float] = []
        for batch in backbone.in_batches(sizes):
            mine = paths[2 * batch.start : 2 * batch.stop]
            with torch.inference_mode():
                p = torch.sigmoid(self.raw(mine).double()).view(-1, 2).tolist()
            for i, (straight, swapped) in zip(batch, p, strict=True):
                forward.append(swapped if turned[i] else straight)
                backward.append(straight if turned[i] else swapped)
        return forward, backward

    def path(self, prompt: Sequence[ChatMessage], first: str, second: str) -> TokenPath:
        """Token segments: system prompt, history, first reply, second reply with what opens a reply before it."""
        head = backbone.prompt_path(self.form, prompt)
        one, two = (backbone.reply_segment(self.form, text, self.max_reply_tokens) for text in (first, second))
        return (*head, one, (*self.opening, *two))

    def raw(self, paths: Sequence[TokenPath]) -> Tensor:
        """Log-odds that the first reply of each path is better, with gradients."""
        ends = [(sum(map(len, path[:-1])) - 1, sum(map(len, path)) - 1) for path in paths]
        logits: Tensor = self.net(paths, ends)
        return logits

    def fit(
        self,
        steps: Sequence[Sequence[Preference]],
        learning_rate: float,
        on_step: Callable[[float], None] = lambda _: None,
    ) -> None:
        """Train on batches of pairs, each in both orders."""

        def loss_of(pairs: Sequence[Preference]) -> Tensor:
            sides = [(p.prompt, p.chosen[-1].content, p.rejected[-1].content) for p in pairs]
            paths = [path for p, a, b in sides for path in (self.path(p, a, b), self.path(p, b, a))]
            labels = torch.tensor([label for p in pairs for label in (p.label, 1 - p.label)])
            logits = self.raw(paths)
            return bradley_terry(logits, labels.to(logits.device))

        torch.set_num_threads(self.threads)
        backbone.train(self.net, steps, loss_of, learning_rate=learning_rate, on_step=on_step)
