"""What a forward and backward pass holds in memory, measured on narrow models of the same proportions.

Nothing is assumed of our code: the pass of training is run, for real, on models with one layer whose every width is a
fraction of the model's (heads keep their number), and live tensors are counted. What a token holds is a + b x width, so
two widths give a and b, and with them the bytes at full width; two numbers of examples take away what does not grow
with tokens. The head is run with its whole vocabulary, on a model without layers.
"""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..llm import family_attention, forest
from ..llm.native import fast_dtype
from ..llm.shared_prefix import Path, reply_logprobs
from . import adapters
from .shape import Shape

HEADS = (4, 8)  # sizes of one attention head in the narrow models
FEW_WORDS = 64
MEASURED_ROWS = 512
MEASURED_LOGITS = 2**24  # numbers


class Example(NamedTuple):
    """What runs together: `replies` of `reply` tokens to one prompt of `prompt` tokens."""

    prompt: int
    reply: int
    replies: int

    @property
    def rows(self) -> int:
        return self.prompt + self.reply * self.replies

    def paths(self, number: int) -> list[Path]:
        """Token paths that share nothing with those of another number."""
        first = 3 + number
        prompt = (first,) * self.prompt
        return [(prompt, (3 + (number + i) % 400, *(7,) * (self.reply - 1))) for i in range(self.replies)]


class Footprint(NamedTuple):
    """Bytes that one example holds. Weights, their copies and their gradients are no part of it.

    `kept`: in one layer, from its forward to its backward pass. `passing`: what one layer's passes hold beyond that
    while they run. `head`: in the head and the loss.
    """

    kept: float
    passing: float
    head: float


class _Held(NamedTuple):
    """Bytes saved for the backward pass, and alive at most."""

    saved: float
    peak: float


@cache
def measure(shape: Shape, example: Example, *, lora_rank: int | None = None, gpu: bool = False) -> Footprint:
    """The footprint of training this shape on such examples, with this processor's precision (bfloat16 on a GPU).

    `gpu`: attention as it runs on a GPU, where scores are not kept.
    """
    dtype = torch.bfloat16 if gpu else fast_dtype()
    whole = example
    if gpu and example.rows > MEASURED_ROWS:  # all that is held grows with rows: a shorter example shows it
        share = MEASURED_ROWS / example.rows
        prompt, reply = (max(2, round(n * share)) for n in example[:2])
        example = Example(prompt, reply, example.replies)

    def run(examples: int, **narrow: Any) -> _Held:
        """At the full width, from two smaller ones."""
        small, large = (
            _run(_narrow(shape, head, **narrow), [example] * examples, lora_rank, dtype, gpu) for head in HEADS
        )
        far = (shape.head - HEADS[0]) / (HEADS[1] - HEADS[0])
        return _Held(*(a + (b - a) * far for a, b in zip(small, large, strict=True)))

    count = max(1, MEASURED_ROWS // example.rows)
    held = {}
    for layers in (0, 1):
        few, many = (run(n, layers=layers, vocabulary=FEW_WORDS) for n in (count, 2 * count))
        held[layers] = _Held(*((b - a) / count for a, b in zip(few, many, strict=True)))
    kept = held[1].saved - held[0].saved
    # logits do not depend on the width: the narrowest model has them all
    most = min(count, max(1, MEASURED_LOGITS // (example.reply * example.replies * shape.vocabulary)))
    model = _narrow(shape, HEADS[0], layers=0, vocabulary=shape.vocabulary)
    few, many = (_run(model, [example] * n, lora_rank, dtype, gpu) for n in (most, 2 * most))
    found = (kept, max(0.0, held[1].peak - kept), (many.peak - few.peak) / most + held[0].peak)
    return Footprint(*(value * whole.rows / example.rows for value in found))


def _narrow(shape: Shape, head: int, *, vocabulary: int, layers: int) -> Any:
    """A model of the same proportions with heads of this size."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    share = head / shape.head
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=round(shape.width * share), num_hidden_layers=layers, head_dim=head,
        intermediate_size=round(shape.feed_forward * share), num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, tie_word_embeddings=shape.tied, max_position_embeddings=2**20,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _run(model: Any, examples: Sequence[Example], lora_rank: int | None, dtype: torch.dtype, gpu: bool) -> _Held:
    """One pass over a micro-batch, gradients being there from one before."""
    paths = [path for number, example in enumerate(examples) for path in example.paths(number)]
    if lora_rank is not None:
        if len(model.model.layers):
            adapters.attach(model, lora_rank)
        else:
            model.requires_grad_(False)
        model.model.embed_tokens.weight.requires_grad_(True)  # so that the first layer keeps what every other one does
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    vocabulary = model.config.vocab_size
    paths = [tuple(tuple(t % vocabulary for t in segment) for segment in path) for path in paths]
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with (
        _attention_as_on_a_gpu() if gpu else contextlib.nullcontext(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        _Live() as live,
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = -reply_logprobs(model, paths).logprobs.sum()
        loss.backward()  # type: ignore[no-untyped-call]
    return _Held(sum(saved.values()), live.peak)


@contextlib.contextmanager
def _attention_as_on_a_gpu() -> Iterator[None]:
    """No families with kept scores: every span by scaled-dot-product attention."""
    with mock.patch.object(forest, "PLAIN_PAIRS", 0), mock.patch.object(family_attention, "PLAIN_PAIRS", 0):
        yield


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors made inside, and the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known or not storage.nbytes():
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
