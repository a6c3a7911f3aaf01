"""One forward pass over token sequences that share prefixes, with gradients (DESIGN section 6).

Our workload is long histories with several short replies. Sequences are given as paths of segments (system prompt,
history, reply); equal segments under the same parent are computed once. All tokens lie in one flat batch, so the
linear layers see no padding; in attention a token sees its own segment up to itself and everything on its path from
the root (on a processor by families of siblings, on a GPU once a tree under a mask). The result equals separate padded
sequences to float accuracy.

Works on the modules of Hugging Face Llama-family models, whose weights stay where they are (LoRA, autocast and
optimisers see nothing unusual).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import FlywheelError
from . import family_attention
from .as_forward import as_forward
from .forest import Forest, Path, Segment, plant
from .gated import feed_forward
from .rms_norm import rms_norm
from .token_logprobs import token_logprobs

__all__ = ["Forest", "Path", "Segment", "check_family", "hidden_states", "plant", "reply_logprobs"]

PLAIN_ROWS = 512  # on a CPU, trees up to here attend by plain products: backward is a quarter faster than flash
FAMILY = ("llama", "mistral", "qwen2")


def check_family(config: Any) -> None:
    """Refuse architectures whose layers this forward does not know."""
    if config.model_type not in FAMILY:
        raise FlywheelError(f"model type {config.model_type!r} is not of the Llama family ({', '.join(FAMILY)}).")


def hidden_states(
    backbone: Any, forest: Forest, *, layers: int | None = None, keep: list[tuple[Tensor, Tensor]] | None = None
) -> Tensor:
    """Final normalised states of every row, shape (N, width).

    `backbone` is the `model` of a `LlamaForCausalLM`. `layers` stops after so many layers. `keep` collects each
    layer's rotated keys and its values, shape (N, key-value heads, head size), for a sampler to go on from.
    """
    x = backbone.embed_tokens(forest.ids)
    cos, sin = backbone.rotary_emb(x.unsqueeze(0), position_ids=forest.positions.unsqueeze(0))
    cos, sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1)
    for layer in backbone.layers[:layers]:
        x = run_layer(layer, x, cos, sin, forest, keep)
    return backbone.norm(x)  # type: ignore[no-any-return]


@as_forward
def run_layer(
    layer: Any, x: Tensor, cos: Tensor, sin: Tensor, forest: Forest, keep: list[tuple[Tensor, Tensor]] | None = None
) -> Tensor:
    """One layer over the rows of a forest: (N, width) -> (N, width). What checkpoints or shards layers wraps this."""
    q, k, v = project(layer.self_attn, rms_norm(layer.input_layernorm, x), cos, sin)
    if keep is not None:
        keep.append((k, v))
    if x.is_cpu:
        mixed = family_attention.attend(q, k, v, forest.families)
    else:
        mixed = torch.cat(
            [attend(q[t.start : t.stop], k[t.start : t.stop], v[t.start : t.stop], t.mask) for t in forest.trees]
        )
    return finish_layer(layer, x, mixed)


def project(attention: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values: (rows, heads, head size). `cos`, `sin`: (rows, 1, head size)."""
    size = attention.head_dim
    q = attention.q_proj(x).unflatten(-1, (-1, size))
    k = attention.k_proj(x).unflatten(-1, (-1, size))
    v = attention.v_proj(x).unflatten(-1, (-1, size))
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def finish_layer(layer: Any, x: Tensor, mixed: Tensor) -> Tensor:
    """Output projection, residuals and feed-forward of a layer; `mixed` is attention's result (rows, width)."""
    x = x + layer.self_attn.o_proj(mixed)
    return x + feed_forward(layer.mlp, rms_norm(layer.post_attention_layernorm, x))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float = 0.0) -> Tensor:
    """Attention within a tree: (n, heads, size) queries, (n, kv heads, size) keys and values -> (n, heads * size)."""
    n, heads, size = q.shape
    if q.is_cpu and n <= PLAIN_ROWS:
        kv = k.shape[1]
        grouped = (q * size**-0.5).view(n, kv, -1, size).permute(1, 2, 0, 3).reshape(kv, -1, size)
        scores = (grouped @ k.permute(1, 2, 0)).float().view(kv, -1, n, n).masked_fill(~mask, float("-inf"))
        weights = functional.dropout(torch.softmax(scores, dim=-1), dropout, dropout > 0).to(v.dtype).view(kv, -1, n)
        return (weights @ v.transpose(0, 1)).view(heads, n, size).transpose(0, 1).flatten(1)
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1).flatten(1)


class ReplyTokens(NamedTuple):
    """Log-probabilities of reply tokens, flat over paths: `path[j]` says whose token j is. Shapes (S,)."""

    logprobs: Tensor
    entropy: Tensor
    path: Tensor


@as_forward
def reply_logprobs(model: Any, paths: Sequence[Path], *, temperature: float = 1.0, device: str = "cpu") -> ReplyTokens:
    """Log-probabilities of the last segment of every path, given what comes before it on the path.

    `model` is a `LlamaForCausalLM`; only the rows that predict a reply token go through its head. `entropy` is
    that of the next-token distribution, detached.
    """
    if any(len(path) < 2 or not path[-1] or not any(path[:-1]) for path in paths):
        raise FlywheelError("a reply's probability needs at least one token of prompt and one of reply.")
    forest = plant(paths, device)
    states = hidden_states(model.model, forest)
    before = torch.cat([rows[-len(p[-1]) - 1 : -1] for rows, p in zip(forest.rows, paths, strict=True)])
    targets = torch.cat([forest.ids[rows[-len(p[-1]) :]] for rows, p in zip(forest.rows, paths, strict=True)])
    owner = torch.cat([torch.full((len(p[-1]),), i, device=device) for i, p in enumerate(paths)])
    return ReplyTokens(*token_logprobs(model.lm_head, states[before], targets, temperature), owner)
