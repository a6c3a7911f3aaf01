"""Log-probabilities of tokens from final states, exact, with one copy of the logits instead of five.

A vocabulary of 49,152 makes logits the largest tensor of a training step. Here they are kept once, in the type of the
products; what softmax needs in float32 is made a few rows at a time, and the backward pass writes the logits' gradient
over them.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .as_forward import as_forward

ROWS = {"cpu": 8, "cuda": 1024}  # whose float32 logits are made at once: on a processor they stay in its cache
UNKEPT = 512  # whose logits are made at once where there is no backward pass


class Scored(NamedTuple):
    """Of each token its log-probability, and the entropy of the distribution it was drawn from, detached: (S,)."""

    logprobs: Tensor
    entropy: Tensor


@as_forward
def token_logprobs(head: Any, states: Tensor, targets: Tensor, temperature: float = 1.0) -> Scored:
    """Log-probabilities of `targets` (S,) under softmax(head(states) / temperature), states (S, width).

    A head that is not a linear layer without bias (an adapted one) is called.
    """
    if not isinstance(head, nn.Linear) or head.bias is not None:
        logs = torch.log_softmax(head(states).float() / temperature, dim=-1)
        with torch.no_grad():
            entropy = -(logs.exp() * logs).sum(-1)
        return Scored(logs.gather(1, targets.unsqueeze(1)).squeeze(1), entropy)
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
    if torch.is_grad_enabled() and (states.requires_grad or head.weight.requires_grad):
        return Scored(*_Kept.apply(states, head.weight, targets, temperature, dtype))
    weight = head.weight.to(dtype)
    found = [
        _scores(functional.linear(rows.to(dtype), weight), ids, temperature)
        for rows, ids in zip(torch.split(states, UNKEPT), torch.split(targets, UNKEPT), strict=True)
    ]
    return Scored(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _scores(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets and entropies, in float32."""
    logs, entropy = (torch.empty(len(logits), device=logits.device) for _ in range(2))
    for at in _chunks(logits):
        scaled = logits[at].float() / temperature
        weights = torch.softmax(scaled, dim=-1)
        total = scaled.amax(-1) - weights.amax(-1).log()  # the logarithm of the denominator: the largest never is 0
        logs[at] = scaled.gather(1, targets[at].unsqueeze(1)).squeeze(1) - total
        entropy[at] = total - torch.linalg.vecdot(weights, scaled)
    return logs, entropy


def _chunks(logits: Tensor) -> Iterator[slice]:
    rows = ROWS.get(logits.device.type, max(ROWS.values()))
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


class _Kept(torch.autograd.Function):
    """The same with a backward pass: d log p(target) / d logits = (1[target] - p) / temperature."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, temperature: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        low, heavy = states.to(dtype), weight.to(dtype)
        logits = functional.linear(low, heavy)
        logs, entropy = _scores(logits, targets, temperature)
        ctx.save_for_backward(low, heavy, logits, targets)
        ctx.temperature, ctx.types = temperature, (states.dtype, weight.dtype)
        ctx.mark_non_differentiable(entropy)
        return logs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        low, heavy, logits, targets = ctx.saved_tensors
        scale = gradients[0] / ctx.temperature
        for at in _chunks(logits):
            change = torch.softmax(logits[at].float() / ctx.temperature, dim=-1).mul_(-scale[at].unsqueeze(1))
            change.scatter_add_(1, targets[at].unsqueeze(1), scale[at].unsqueeze(1))
            logits[at] = change  # a second backward pass through it is refused by autograd, which counts writes
        to_states = (logits @ heavy).to(ctx.types[0]) if ctx.needs_input_grad[0] else None
        to_weight = (logits.t() @ low).to(ctx.types[1]) if ctx.needs_input_grad[1] else None
        return to_states, to_weight, None, None, None
