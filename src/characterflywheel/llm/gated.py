"""The gate of a Llama feed-forward, silu(gate) * up, keeping its two inputs alone for the backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def feed_forward(mlp: Any, x: Tensor) -> Tensor:
    """`mlp(x)` of a Hugging Face `LlamaMLP` or one like it; one with another activation is called."""
    if not torch.is_grad_enabled() or not _is_silu(mlp):
        return mlp(x)  # type: ignore[no-any-return]
    hidden = _Gated.apply(mlp.gate_proj(x), mlp.up_proj(x))  # type: ignore[no-untyped-call]
    return mlp.down_proj(hidden)  # type: ignore[no-any-return]


def _is_silu(mlp: Any) -> bool:
    named = all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj"))
    return named and type(getattr(mlp, "act_fn", None)).__name__ in {"SiLU", "SiLUActivation"}


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        to_up = functional.silu(gate).mul_(gradients[0])
        return torch.ops.aten.silu_backward(gradients[0] * up, gate), to_up
