"""Root-mean-square normalisation (Zhang and Sennrich 2019) with half the passes over memory, forward and backward.

Under autocast the result is in the type of the products that follow, so that it is cast once and not by each of them.
"""

from typing import Any

import torch
from torch import Tensor


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    """`norm(x)` of a Hugging Face `LlamaRMSNorm` or one like it, states (rows, width) in float32."""
    if x.dtype != torch.float32:
        return norm(x)  # type: ignore[no-any-return]
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return _Norm.apply(x, norm.weight, norm.variance_epsilon, dtype)  # type: ignore[no-any-return, no-untyped-call]


class _Norm(torch.autograd.Function):
    """y = w x / r with r = sqrt(mean(x²) + eps); dx = (w g - x mean(w g x) / r²) / r, dw = sum of g x / r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        inverse = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, inverse)
        out: Tensor = (x * inverse).mul_(weight)
        return out.to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        gradient = gradients[0].float()
        straight = x * inverse
        to_weight = torch.linalg.vecdot(gradient, straight, dim=0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, to_weight, None, None
        scaled = gradient * weight
        along = torch.linalg.vecdot(scaled, straight).div_(x.shape[-1]).unsqueeze(-1)
        return scaled.sub_(straight.mul_(along)).mul_(inverse), to_weight, None, None
