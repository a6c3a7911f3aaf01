"""A network's weights laid out for scoring, and the forward pass over them (PAPER section 3; no gradients).

What makes it faster than `shared_prefix` and `prefix_encoder`, which it equals to float32's accuracy in float32 (in
bfloat16 states between layers are rounded too, so that it is a little further from float32 than autocast is):

- oneDNN's prepacked products (what `torch.compile` with freezing would call), with the activation, the residual and
  the gate's product done inside them; query, key and value are one product;
- attention by segment: siblings of one length look at their ancestors and themselves, and at nothing to be masked out;
- in the last layer only the rows that are read get attention, an output projection and a feed-forward.

Where oneDNN is missing, and on a GPU, the same pass runs on plain products. Token embeddings stay the model's; all
other weights are copied once, in `dtype`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import FlywheelError
from . import prefix_encoder
from .segment_attention import Group, attend, groups
from .shared_prefix import Forest

ROWS = 512  # the number of rows for which oneDNN chooses its layout; any other number runs too
SAMPLE = 64  # values of each parameter, spread over it, that are compared to tell that it has changed
ACTIVATIONS: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {  # oneDNN's name and algorithm, and PyTorch's
    "silu": ("swish", "", functional.silu),
    "gelu": ("gelu", "none", functional.gelu),
    "gelu_new": ("gelu", "tanh", lambda x: functional.gelu(x, approximate="tanh")),
    "relu": ("relu", "", functional.relu),
}


class Linear:
    """x W' + b with prepacked weights: W (outputs, inputs), b (outputs,) or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        weight = weight.to(dtype).contiguous()
        self.bias = None if bias is None else bias.to(dtype)
        self.nbytes = weight.nbytes + (0 if self.bias is None else self.bias.nbytes)
        self.prepacked = weight.device.type == "cpu" and _prepacks(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS) if self.prepacked else weight

    def __call__(self, x: Tensor, activation: str | None = None) -> Tensor:
        name, algorithm, function = ACTIVATIONS[activation] if activation else ("none", "", _same)
        if self.prepacked:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm)  # type: ignore[no-any-return]
        return function(functional.linear(x, self.weight, self.bias))

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """x W' + b + other."""
        if self.prepacked:
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")  # type: ignore[no-any-return]
        return functional.linear(x, self.weight, self.bias) + other

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """(x W' + b) * other."""
        if self.prepacked:
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "mul")  # type: ignore[no-any-return]
        return functional.linear(x, self.weight, self.bias) * other


def _prepacks(dtype: torch.dtype) -> bool:
    """Whether oneDNN is here and multiplies this type on this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class LlamaLayer:
    """Pre-normed; the two halves of what rotates in each head lie side by side, as complex numbers."""

    heads: int
    size: int
    eps: float
    activation: str
    before: Tensor
    qkv: Linear
    output: Linear
    between: Tensor
    gate: Linear
    up: Linear
    down: Linear

    def __call__(self, x: Tensor, now: "Pass") -> Tensor:
        q, k, v = self.project(x, now.turn)
        if now.keep is not None:
            now.keep.append((k, v))
        if now.rows is not None:
            q, x = q[now.rows], x[now.rows]
        return self.finish(x, attend(q, k, v, now.among))

    def project(self, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values: (rows, heads, size)."""
        qkv = self.qkv(functional.rms_norm(x, x.shape[-1:], self.before, self.eps))
        qkv = qkv.view(len(x), -1, self.size)
        kv = (qkv.shape[1] - self.heads) // 2
        pairs = torch.view_as_complex(qkv[:, :-kv].float().view(len(x), -1, self.size // 2, 2))
        turned = torch.view_as_real(pairs * turn).flatten(2).to(x.dtype)
        return turned[:, : self.heads], turned[:, self.heads :], qkv[:, -kv:]

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The next states, given these and attention's result (rows, heads * size)."""
        x = self.output.plus(mixed, x)
        h = functional.rms_norm(x, x.shape[-1:], self.between, self.eps)
        return self.down.plus(self.up.times(h, self.gate(h, self.activation)), x)


class Norm(NamedTuple):
    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True)
class BertLayer:
    """Post-normed."""

    heads: int
    activation: str
    qkv: Linear
    output: Linear
    between: Norm
    up: Linear
    down: Linear
    after: Norm

    def __call__(self, x: Tensor, now: "Pass") -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)
        if now.rows is not None:
            q, x = q[now.rows], x[now.rows]
        x = functional.layer_norm(self.output.plus(attend(q, k, v, now.among), x), x.shape[-1:], *self.between)
        return functional.layer_norm(self.down.plus(self.up(x, self.activation), x), x.shape[-1:], *self.after)


class Pass(NamedTuple):
    """What a layer needs besides states: who attends to whom, the rows to go on with (None: all), the rotations.

    `keep` collects each Llama layer's rotated keys and its values, as `shared_prefix.hidden_states` does; the two
    halves of what rotates lie side by side in them.
    """

    among: Sequence[Group]
    rows: Tensor | None
    turn: Tensor
    keep: list[tuple[Tensor, Tensor]] | None = None


class Packed:
    """A model's weights at the moment of packing. `nbytes`: what they cost beside the model's own."""

    def __init__(self, model: Any, dtype: torch.dtype, *, release: bool = False) -> None:
        """`release`: let the weights of the model's linear layers go, so that it has no other use from then on."""
        if model.training:
            raise FlywheelError("a model in training mode cannot be packed: call its eval() first.")
        act = model.config.hidden_act
        if act not in ACTIVATIONS:
            raise FlywheelError(f"hidden_act = {act!r}, can be packed: {', '.join(ACTIVATIONS)}: score unpacked.")
        self.model, self.dtype = model, dtype
        self.both_ways = model.config.model_type in prefix_encoder.FAMILY
        self.layers: Sequence[LlamaLayer | BertLayer]
        self.layers = _bert(model, dtype) if self.both_ways else _llama(model, dtype)
        parts = [part for layer in self.layers for part in vars(layer).values() if isinstance(part, Linear)]
        self.nbytes = sum(part.nbytes for part in parts)
        self.released = release
        if release:
            for part in (part for layer in _layers(model) for part in layer.modules() if isinstance(part, nn.Linear)):
                part.weight.data = part.weight.data.new_empty(0)
        _keep_freed_memory()
        self._state = self._versions()
        self._samples = [p.detach().view(-1)[:: max(1, p.numel() // SAMPLE)] for p in model.parameters()]
        self._sampled = torch.cat(self._samples).clone()

    @torch.no_grad()
    def hidden_states(
        self, forest: Forest, read: Sequence[int], *, keep: list[tuple[Tensor, Tensor]] | None = None
    ) -> Tensor:
        """Final states of the ascending rows `read`: float32 (len(read), width). `keep`: see `Pass`."""
        self.check()
        rows = torch.tensor(read, device=forest.ids.device)
        with torch.autocast(forest.ids.device.type, enabled=False):
            x, turn = self._embed(forest)
            everyone = Pass(groups(forest, both_ways=self.both_ways), None, turn, keep)
            readers = Pass(groups(forest, both_ways=self.both_ways, read=read), rows, turn, keep)
            for layer in self.layers[:-1]:
                x = layer(x, everyone)
            x = self.layers[-1](x, readers).float()
            return x if self.both_ways else self.model.norm(x)

    def check(self) -> None:
        """Refuse to score with weights that are no longer the model's.

        Every parameter's address, version and values spread over it are compared: versions do not count what fused
        AdamW or a write through `.data` does. What is written through `.data` to other values alone is not noticed.
        """
        if self.changed:
            raise FlywheelError("the model's weights have changed since they were packed: pack it again.")

    @property
    def changed(self) -> bool:
        """Whether the model's weights are no longer those that were packed, as far as `check` can tell."""
        return self._versions() != self._state or not torch.equal(torch.cat(self._samples), self._sampled)

    def _versions(self) -> list[tuple[int, int]]:
        return [(p.data_ptr(), p._version) for p in self.model.parameters()]

    def _embed(self, forest: Forest) -> tuple[Tensor, Tensor]:
        if self.both_ways:
            return prefix_encoder.embed(self.model, forest).to(self.dtype), torch.empty(0)
        x = self.model.embed_tokens(forest.ids)
        return x.to(self.dtype), turn(self.model, forest.positions)


def turn(model: Any, positions: Tensor) -> Tensor:
    """The rotations at these positions as complex numbers: (positions, 1, head size / 2)."""
    like = next(model.parameters())[:1]
    cos, sin = model.rotary_emb(like, position_ids=positions.unsqueeze(0))
    half = cos.shape[-1] // 2
    return torch.complex(cos[0, :, :half].float(), sin[0, :, :half].float()).unsqueeze(1)


def _keep_freed_memory() -> None:
    """Let the C library reuse what a layer frees; by default it returns it and faults it in again, 5% of the time.

    Freeing one block just below its limit of 32 MiB raises the size from which it asks for new pages.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def affine(part: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear module; of a wrapped one (an adapter) those of the function it computes."""
    if type(part) is nn.Linear:
        return part.weight.detach(), None if part.bias is None else part.bias.detach()
    like = next(part.parameters())
    with torch.no_grad():
        bias = part(torch.zeros(1, part.in_features, device=like.device, dtype=like.dtype))
        weight = (part(torch.eye(part.in_features, device=like.device, dtype=like.dtype)) - bias).T
    return weight, bias[0]


def _stacked(parts: Sequence[tuple[Tensor, Tensor | None]], dtype: torch.dtype) -> Linear:
    """One product for several of the same inputs."""
    bias = None
    if any(b is not None for _, b in parts):
        bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in parts])
    return Linear(torch.cat([w for w, _ in parts]), bias, dtype)


def _layers(model: Any) -> Any:
    return model.encoder.layer if model.config.model_type in prefix_encoder.FAMILY else model.layers


def _llama(model: Any, dtype: torch.dtype) -> list[LlamaLayer]:
    def one(layer: Any) -> LlamaLayer:
        config, a, mlp = model.config, layer.self_attn, layer.mlp
        return LlamaLayer(
            heads=config.num_attention_heads, size=a.head_dim, eps=config.rms_norm_eps, activation=config.hidden_act,
            before=layer.input_layernorm.weight.detach().to(dtype),
            qkv=_stacked([_paired(a.q_proj, a.head_dim), _paired(a.k_proj, a.head_dim), affine(a.v_proj)], dtype),
            output=Linear(*affine(a.o_proj), dtype), between=layer.post_attention_layernorm.weight.detach().to(dtype),
            gate=Linear(*affine(mlp.gate_proj), dtype), up=Linear(*affine(mlp.up_proj), dtype),
            down=Linear(*affine(mlp.down_proj), dtype),
        )  # fmt: skip

    return [one(layer) for layer in _layers(model)]


def _paired(part: Any, size: int) -> tuple[Tensor, Tensor | None]:
    """A projection whose outputs i and i + size / 2 of each head, which rotate together, lie side by side."""
    weight, bias = affine(part)
    order = torch.arange(len(weight), device=weight.device).view(-1, 2, size // 2).transpose(1, 2).flatten()
    return weight[order], None if bias is None else bias[order]


def _bert(model: Any, dtype: torch.dtype) -> list[BertLayer]:
    def norm(part: nn.LayerNorm) -> Norm:
        return Norm(part.weight.detach().to(dtype), part.bias.detach().to(dtype), part.eps)

    def one(layer: Any) -> BertLayer:
        own, out = layer.attention.self, layer.attention.output
        return BertLayer(
            heads=own.num_attention_heads, activation=model.config.hidden_act,
            qkv=_stacked([affine(part) for part in (own.query, own.key, own.value)], dtype),
            output=Linear(*affine(out.dense), dtype), between=norm(out.LayerNorm),
            up=Linear(*affine(layer.intermediate.dense), dtype), down=Linear(*affine(layer.output.dense), dtype),
            after=norm(layer.output.LayerNorm),
        )  # fmt: skip

    return [one(layer) for layer in _layers(model)]
