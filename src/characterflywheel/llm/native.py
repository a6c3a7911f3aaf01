"""A sampler in plain torch that branches all replies of a prompt from one key-value cache.

It runs the very weights that are being trained, so nothing has to be converted between a training step and the
next rollout. Prompts that share a system prompt are prefilled as a tree. Attention of the replies to their prompt is
one matrix product a prompt and key-value head; a finished prompt's slot is given to the next one (continuous
batching). On processors with bfloat16 instructions it decodes in bfloat16.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import Sampling
from .chat_format import ChatFormat
from .decoder_weights import Weights, weights
from .forest import Segment, plant
from .shared_prefix import check_family
from .token_sampler import Drawn, TokenSampler, one_seed_each

BLOCK = 128
NUCLEUS = 256  # a top-p nucleus is looked for among this many most likely tokens


def fast_dtype(device: str = "cpu") -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32."""
    if device != "cpu":
        return torch.bfloat16
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def load_model(folder: Path, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, Any]:
    """A `LlamaForCausalLM`-like model in evaluation mode, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    check_family(model.config)
    return model, AutoTokenizer.from_pretrained(folder)


def end_tokens(model: Any) -> frozenset[int]:
    """Every token that ends a reply; some models, such as Llama 3, have several."""
    named = [config.eos_token_id for config in (model.config, model.generation_config) if config]
    return frozenset(i for ids in named if ids is not None for i in (ids if isinstance(ids, list) else [ids]))


class NativeModel(TokenSampler):
    """A chat model on torch, CPU or GPU (`ChatModel` Protocol).

    `keeps_copy`: hold on to the copy of the weights that decoding makes (see `decoder_weights`) from one call of
    `sample` to the next; not worth its memory where weights change in between.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, *, max_prompt_tokens: int, threads: int, batch_replies: int = 64,
        keeps_copy: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.name, self.threads, self.batch_replies = model, name, threads, batch_replies
        self.format = ChatFormat(tokenizer, max_prompt_tokens)
        self.ends = end_tokens(model) | {tokenizer.eos_token_id}
        self.keeps_copy = keeps_copy
        self._weights: Weights | None = None

    @classmethod
    def load(cls, folder: Path, name: str, *, device: str = "cpu", **settings: Any) -> "NativeModel":
        model, tokenizer = load_model(folder, fast_dtype(device), device)
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
        slots = max(1, self.batch_replies // n)
        order = sorted(range(len(prompts)), key=lambda i: (prompts[i], i))  # equal system prompts side by side
        waiting, finished = order[::-1], 0
        with torch.inference_mode():
            longest = max((sum(map(len, p)) for p in prompts), default=1)
            decoder = self.decoder(slots, n, sampling, longest)
            while waiting or decoder.running:
                if waiting and (decoder.free >= max(1, slots // 4) or not decoder.running):
                    batch = [waiting.pop() for _ in range(min(decoder.free, len(waiting)))]
                    decoder.admit(batch, [prompts[i] for i in batch], [seeds[i] for i in batch])
                for index, replies in decoder.step():
                    results[index] = replies
                    finished += 1
                    if on_progress:
                        on_progress(finished, len(prompts))
        if not self.keeps_copy:
            self._weights = None
        return results

    def decoder(self, slots: int, n: int, sampling: Sampling, longest: int) -> "Decoder":
        """An empty decoder for prompts of at most `longest` tokens; for the thread that will use it."""
        torch.set_num_threads(self.threads)
        with torch.inference_mode():
            self._weights = weights(self.model, self._weights)
        return Decoder(self.model, self._weights, slots, n, sampling, longest, self.ends)

    def cache_bytes(self, tokens: int) -> int:
        """The keys and values of so many tokens."""
        config, attention = self.model.config, self.model.model.layers[0].self_attn
        numbers = 2 * tokens * config.num_hidden_layers * config.num_key_value_heads * attention.head_dim
        return int(numbers * self.model.lm_head.weight.element_size())


@dataclasses.dataclass
class Slot:
    """A prompt that is being answered: its number, and each reply's tokens so far."""

    index: int
    limit: int
    uniforms: Tensor
    ids: list[list[int]]
    logs: list[list[float]]
    done: list[bool]


class Decoder:
    """`slots` prompts decoded in step, `n` replies each, with preallocated key-value caches.

    Prompt cache: (layers, slots, kv heads, longest prompt, head size); reply cache: (layers, slots, n, kv heads,
    max tokens, head size). The running prompts are always the first slots, so the caches are used as views; P * n
    rows go through the linear layers at every step.
    """

    def __init__(
        self, model: Any, weights: Weights, slots: int, n: int, sampling: Sampling, longest: int, ends: frozenset[int]
    ) -> None:
        config, self.model, self.n, self.sampling, self.ends = model.config, model, n, sampling, ends
        self.weights = weights
        self.size, self.running = slots, list[Slot]()
        self.device, self.dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        kv, size = config.num_key_value_heads, model.model.layers[0].self_attn.head_dim
        new = {"device": self.device, "dtype": self.dtype}
        layers = config.num_hidden_layers
        prompts, replies = (layers, slots, kv, longest, size), (layers, slots, n, kv, sampling.max_tokens, size)
        self.prompt_k, self.prompt_v = _zeros(prompts, **new), _zeros(prompts, **new)
        self.reply_k, self.reply_v = _zeros(replies, **new), _zeros(replies, **new)
        self.prompt_length = torch.zeros(slots, dtype=torch.long, device=self.device)
        self.step_of = torch.zeros(slots, dtype=torch.long, device=self.device)
        self.logits = torch.zeros(slots, n, config.vocab_size, device=self.device)

    @property
    def free(self) -> int:
        return self.size - len(self.running)

    def admit(
        self, indices: Sequence[int], prompts: Sequence[tuple[Segment, Segment]], seeds: Sequence[int],
        limits: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """Prefill prompts, as a tree over shared system prompts, into free slots.

        `limits`: most tokens of each prompt's replies, at most `sampling.max_tokens`, which it is if absent.
        """
        limits = limits or [self.sampling.max_tokens] * len(indices)
        forest = plant(prompts, self.device)
        first, keep = self.weights.prefill(forest, torch.stack([rows[-1] for rows in forest.rows]))
        for number, (index, rows, seed, most) in enumerate(zip(indices, forest.rows, seeds, limits, strict=True)):
            place = len(self.running)
            for layer, (k, v) in enumerate(keep):
                self.prompt_k[layer, place, :, : len(rows)] = k[rows].transpose(0, 1)
                self.prompt_v[layer, place, :, : len(rows)] = v[rows].transpose(0, 1)
            self.prompt_length[place], self.step_of[place] = len(rows), 0
            self.logits[place] = first[number]
            chance = torch.rand(most, self.n, generator=torch.Generator().manual_seed(seed))
            n = self.n
            self.running.append(Slot(index, most, chance, [[] for _ in range(n)], [[] for _ in range(n)], [False] * n))

    def step(self) -> list[tuple[int, list[Drawn]]]:
        """Draw one token for every running reply; returns the prompts whose replies are all finished."""
        p = len(self.running)
        steps = self.step_of[:p].tolist()
        chances = torch.stack([s.uniforms[t] for s, t in zip(self.running, steps, strict=True)])
        tokens, logs = draw(self.logits[:p].flatten(0, 1), chances.flatten().to(self.device), self.sampling)
        tokens = tokens.view(p, self.n)
        drawn = zip(self.running, steps, tokens.tolist(), logs.view(p, self.n).tolist(), strict=True)
        for slot, step, ids, logprobs in drawn:
            for reply in range(self.n):
                if not slot.done[reply]:
                    slot.ids[reply].append(ids[reply])
                    slot.logs[reply].append(logprobs[reply])
                    slot.done[reply] = ids[reply] in self.ends or step + 1 == slot.limit
        finished = [place for place, slot in enumerate(self.running) if all(slot.done)]
        results = [(s.index, list(zip(s.ids, s.logs, strict=True))) for s in (self.running[i] for i in finished)]
        for place in reversed(finished):
            self._vacate(place, tokens)
        if self.running:
            self._forward(tokens[: len(self.running)])
        return results

    def drop(self, index: int) -> None:
        """Stop answering a prompt, between steps."""
        self._vacate(next(place for place, slot in enumerate(self.running) if slot.index == index), self.logits)

    def _vacate(self, place: int, upcoming: Tensor) -> None:
        """Give a slot up: the last running prompt moves there, with its row of what is needed next."""
        last = len(self.running) - 1
        if place != last:
            for cache in (self.prompt_k, self.prompt_v, self.reply_k, self.reply_v):
                cache[:, place] = cache[:, last]
            for row in (self.prompt_length, self.step_of, upcoming):
                row[place] = row[last].clone()
            self.running[place] = self.running[last]
        self.running.pop()

    def _forward(self, tokens: Tensor) -> None:
        """Feed the drawn tokens (P, n) of the running prompts and keep the next logits."""
        p, n = tokens.shape
        length, step = self.prompt_length[:p], self.step_of[:p]
        longest, written = int(length.max()), int(step.max()) + 1
        x = self.model.model.embed_tokens(tokens.flatten())
        turn = self.weights.turn((length + step).repeat_interleave(n))
        past_bias = _bias(torch.arange(longest, device=self.device) >= length.unsqueeze(1))[:, None, None]
        own_bias = _bias(torch.arange(written, device=self.device) > step.unsqueeze(1))[:, None, None, None]
        place = torch.arange(p, device=self.device)
        for number, layer in enumerate(self.weights.layers):
            q, k, v = layer.project(x, turn)
            kv, size = k.shape[1], k.shape[2]
            self.reply_k[number, place, :, :, step] = k.reshape(p, n, kv, size)
            self.reply_v[number, place, :, :, step] = v.reshape(p, n, kv, size)
            pk, pv = self.prompt_k[number, :p, :, :longest], self.prompt_v[number, :p, :, :longest]
            rk, rv = self.reply_k[number, :p, :, :, :written], self.reply_v[number, :p, :, :, :written]
            q = q.reshape(p, n, kv, -1, size) * size**-0.5
            group = q.shape[3]
            # queries that share a key-value head go together: for the prompt, those of all n replies
            to_prompt = q.permute(0, 2, 1, 3, 4).reshape(p, kv, n * group, size)
            prompt_scores = (to_prompt @ pk.transpose(-1, -2)).float() + past_bias
            reply_scores = (q @ rk.transpose(-1, -2)).float() + own_bias
            prompt_scores = prompt_scores.view(p, kv, n, group, longest).transpose(1, 2)
            weights = torch.softmax(torch.cat((prompt_scores, reply_scores), dim=-1), dim=-1).to(self.dtype)
            from_prompt = weights[..., :longest].transpose(1, 2).reshape(p, kv, n * group, longest) @ pv
            mixed = weights[..., longest:] @ rv + from_prompt.view(p, kv, n, group, size).transpose(1, 2)
            x = layer.finish(x, mixed.reshape(p * n, -1))
        self.logits[:p] = self.weights.logits(x).view(p, n, -1)
        self.step_of[:p] += 1


def _zeros(shape: tuple[int, ...], *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros which, on a CPU, take memory only where they are written to: most slots are never full."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _bias(blocked: Tensor) -> Tensor:
    """0 where a query may look, minus infinity where `blocked`."""
    return torch.zeros(blocked.shape, device=blocked.device).masked_fill(blocked, float("-inf"))


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token for each row of `logits` (B, vocabulary) by inverse transform of `uniforms` (B,).

    Returns tokens and their log-probabilities at the sampling temperature, before top-p truncation.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, torch.zeros_like(uniforms)
    scaled = logits / sampling.temperature
    weights = torch.softmax(scaled, dim=-1)
    if sampling.top_p < 1:
        top, where = weights.topk(min(NUCLEUS, weights.shape[-1]), dim=-1)
        cumulative = top.cumsum(-1)
        kept = top * (cumulative - top < sampling.top_p)
        choice = _inverse(kept, uniforms)
        tokens = where.gather(1, choice.unsqueeze(1)).squeeze(1)
    else:
        tokens = _inverse(weights, uniforms)
    return tokens, weights.gather(1, tokens.unsqueeze(1)).squeeze(1).log()


def _inverse(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Index i with probability weights[i] / sum, never one of weight zero.

    Looks for the block first and then inside it, as a running sum over a whole vocabulary is slow.
    """
    rows, size = weights.shape
    blocks = torch.nn.functional.pad(weights, (0, -size % BLOCK)).view(rows, -1, BLOCK)
    sums = blocks.sum(-1).cumsum(-1)
    target = (uniforms * sums[:, -1]).unsqueeze(1)
    block = torch.searchsorted(sums, target, right=True).clamp(max=sums.shape[1] - 1)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks[torch.arange(rows, device=weights.device), block.squeeze(1)].cumsum(-1)
    offset = torch.searchsorted(inside, target - before, right=True).clamp(max=BLOCK - 1)
    index = (block * BLOCK + offset).clamp(max=size - 1).squeeze(1)
    missed = weights.gather(1, index.unsqueeze(1)).squeeze(1) == 0  # by the last bit of a sum
    return torch.where(missed, weights.argmax(-1), index) if bool(missed.any()) else index
