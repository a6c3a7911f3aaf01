"""The weights a decoder runs on: the model's own modules, or a copy of them laid out for a processor.

Both give a layer's two halves, before attention and after it, so that a decoder brings its own attention. The copy's
products are oneDNN's prepacked ones with fewer passes over memory between them (see `packed`): a third faster at the
few rows of a decoding step.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .forest import Forest
from .packed import ACTIVATIONS, Linear, Packed, turn
from .shared_prefix import finish_layer, hidden_states, project

COPY_BYTES = 2**30  # models of at most this size are copied: the smaller, the more of a step is not arithmetic

Keys = list[tuple[Tensor, Tensor]]


class Layer(Protocol):
    """`project`: rotated queries and keys, and values, (rows, heads, size), of states (rows, width). `finish`: the
    next states, given these and attention's result."""

    def project(self, x: Tensor, turn: Any) -> tuple[Tensor, Tensor, Tensor]: ...

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor: ...


class Weights(Protocol):
    """`turn(positions)`: what layers rotate by. `prefill`: the logits after `rows`, and every row's keys and values, a
    pair a layer. `logits`: of final states (rows, width), before their norm."""

    layers: Sequence[Layer]

    def turn(self, positions: Tensor) -> Any: ...

    def prefill(self, forest: Forest, rows: Tensor) -> tuple[Tensor, Keys]: ...

    def logits(self, x: Tensor) -> Tensor: ...


class OwnLayer:
    """A Hugging Face layer."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def project(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return project(self.layer.self_attn, self.layer.input_layernorm(x), *turn)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        return finish_layer(self.layer, x, mixed)


class OwnWeights:
    """The modules of a `LlamaForCausalLM`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers: Sequence[Layer] = [OwnLayer(layer) for layer in model.model.layers]

    def turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        like = self.model.lm_head.weight[:1]
        cos, sin = self.model.model.rotary_emb(like, position_ids=positions.unsqueeze(0))
        return cos[0].unsqueeze(1), sin[0].unsqueeze(1)

    def prefill(self, forest: Forest, rows: Tensor) -> tuple[Tensor, Keys]:
        keep: Keys = []
        states = hidden_states(self.model.model, forest, keep=keep)
        return self.model.lm_head(states[rows]).float(), keep

    def logits(self, x: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(x)).float()  # type: ignore[no-any-return]


class PackedWeights:
    """A copy of a `LlamaForCausalLM`'s weights as they are now."""

    def __init__(self, model: Any) -> None:
        self.model = model
        weight = model.lm_head.weight.detach()
        self.packed = Packed(model.model, weight.dtype)
        self.head = Linear(weight, None, weight.dtype)
        self.layers: Sequence[Any] = self.packed.layers

    def turn(self, positions: Tensor) -> Tensor:
        return turn(self.model.model, positions)

    def prefill(self, forest: Forest, rows: Tensor) -> tuple[Tensor, Keys]:
        keep: Keys = []
        read, back = torch.unique(rows, return_inverse=True)
        states = self.packed.hidden_states(forest, read.tolist(), keep=keep)
        return self.head(states.to(self.packed.dtype)).float()[back], keep

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.model.model.norm(x)).float()


def weights(model: Any, before: Weights | None = None) -> Weights:
    """What to decode with; `before`, what this returned last, where it still holds the model's weights."""
    head = model.lm_head
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    packs = (
        head.weight.device.type == "cpu" and size <= COPY_BYTES and model.config.hidden_act in ACTIVATIONS
        and type(head) is torch.nn.Linear and head.bias is None and not model.training
    )  # fmt: skip
    if not packs:
        return OwnWeights(model)
    if isinstance(before, PackedWeights) and not before.packed.changed:
        return before
    return PackedWeights(model)
