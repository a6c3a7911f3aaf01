"""The transformers backend: `generate` on any device, for what the native sampler does not do (DESIGN section 6).

Prompts of similar length go together, padded on the left; each has its replies as rows of the batch. One stream of
random numbers, seeded by all of a batch's seeds, draws for all its rows: the same call gives the same replies.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ids import derive_seed
from .base import Sampling
from .chat_format import ChatFormat
from .native import end_tokens, load_model
from .shared_prefix import Segment
from .token_sampler import Drawn, TokenSampler, one_seed_each


class TransformersModel(TokenSampler):
    """A chat model on transformers' `generate` (`ChatModel` Protocol). Log-probabilities are computed in float32."""

    def __init__(
        self, model: Any, tokenizer: Any, name: str, *, max_prompt_tokens: int, threads: int, batch_replies: int = 64
    ) -> None:
        from transformers import GenerationConfig  # noqa: PLC0415

        self.model, self.name, self.threads, self.batch_replies = model, name, threads, batch_replies
        self.format = ChatFormat(tokenizer, max_prompt_tokens)
        self.ends = end_tokens(model) | {tokenizer.eos_token_id}
        # a folder's own settings (a penalty, a top-k) would draw from another distribution than the one asked for
        model.generation_config = GenerationConfig(
            eos_token_id=sorted(self.ends), pad_token_id=min(self.ends), bos_token_id=tokenizer.bos_token_id
        )

    @classmethod
    def load(cls, folder: Path, name: str, *, device: str = "cpu", **settings: int) -> "TransformersModel":
        """In float32 on a CPU, else in bfloat16."""
        model, tokenizer = load_model(folder, torch.float32 if device == "cpu" else torch.bfloat16, device)
        return cls(model, tokenizer, name, **settings)

    def sample(
        self,
        prompts: Sequence[tuple[Segment, Segment]],
        *,
        n: int,
        sampling: Sampling,
        seeds: Sequence[int],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Drawn]]:
        """Token ids and log-probabilities of `n` replies to each tokenised prompt."""
        one_seed_each(prompts, seeds)
        torch.set_num_threads(self.threads)
        results: list[list[Drawn]] = [[] for _ in prompts]
        size = max(1, self.batch_replies // n)
        order = sorted(range(len(prompts)), key=lambda i: (sum(map(len, prompts[i])), prompts[i], i))
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            drawn = self._generate(
                [(*prompts[i][0], *prompts[i][1]) for i in batch], n, sampling, [seeds[i] for i in batch]
            )
            for index, replies in zip(batch, drawn, strict=True):
                results[index] = replies
            if on_progress:
                on_progress(start + len(batch), len(prompts))
        return results

    def _generate(
        self, prompts: Sequence[Segment], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Drawn]]:
        from transformers import LogitsProcessorList  # noqa: PLC0415

        device, longest = self.model.device, max(map(len, prompts))
        padding = [longest - len(ids) for ids in prompts]
        pad = min(self.ends)
        ids = torch.tensor([[pad] * gap + list(p) for gap, p in zip(padding, prompts, strict=True)], device=device)
        seen = torch.tensor([[0] * gap + [1] * len(p) for gap, p in zip(padding, prompts, strict=True)], device=device)
        greedy, chosen = sampling.temperature == 0, _Chosen(sampling.temperature)
        how: dict[str, Any] = {"do_sample": False} if greedy else {
            "do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0,
        }  # fmt: skip
        devices = [device] if device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(derive_seed("transformers", *seeds))
            rows = self.model.generate(
                ids.repeat_interleave(n, 0), attention_mask=seen.repeat_interleave(n, 0),
                max_new_tokens=sampling.max_tokens, logits_processor=LogitsProcessorList([] if greedy else [chosen]),
                **how,
            )[:, longest:]  # fmt: skip
        logs = torch.zeros(rows.shape) if greedy else chosen.of(rows).cpu()
        drawn = [self._reply(*row) for row in zip(rows.tolist(), logs.tolist(), strict=True)]
        return [drawn[at : at + n] for at in range(0, len(drawn), n)]

    def _reply(self, ids: list[int], logs: list[float]) -> Drawn:
        """Up to the end token; what follows is padding."""
        size = next((i + 1 for i, token in enumerate(ids) if token in self.ends), len(ids))
        return ids[:size], logs[:size]


class _Chosen:
    """Log-probabilities of the tokens as they are chosen, at the sampling temperature, before any top-p truncation.

    A logits processor that changes nothing. It sees a step's logits before its token is drawn, and the token at the
    next step; so one step's logits are held, not those of all steps.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.last: Tensor | None = None
        self.logs: list[Tensor] = []

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        if self.last is not None:
            self.logs.append(self.last.gather(1, ids[:, -1:]))
        self.last = torch.log_softmax(logits.float() / self.temperature, dim=-1)
        return logits

    def of(self, rows: Tensor) -> Tensor:
        """Of the tokens (rows, steps) that were kept: `generate` may have made a step more than it keeps."""
        assert self.last is not None, "generate has run"
        if len(self.logs) < rows.shape[1]:
            self.logs.append(self.last.gather(1, rows[:, len(self.logs) :]))
        return torch.cat(self.logs[: rows.shape[1]], dim=1)
