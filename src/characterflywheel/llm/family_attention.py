"""Causal attention in a forest by families of siblings, with gradients: replies to one prompt look at it together.

A family's queries meet their ancestors' keys in one product without a mask, and their own span's in one batch of small
causal products; so hardly anything is computed that a mask would throw away.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .forest import PLAIN_PAIRS, Family


def attend(q: Tensor, k: Tensor, v: Tensor, among: Sequence[Family]) -> Tensor:
    """(N, heads, size) queries, (N, kv heads, size) keys and values of all rows -> (N, heads * size)."""
    kind = q.device.type
    if torch.is_autocast_enabled(kind):
        q, k, v = (t.to(torch.get_autocast_dtype(kind)) for t in (q, k, v))
    sizes = [family.stop - family.start for family in among]
    parts = list(zip(*(torch.split(t, sizes) for t in (q, k, v)), strict=True))
    out = []
    for family, (queries, keys, values) in zip(among, parts, strict=True):
        above = [[parts[i][kind][a:b] for i, a, b in family.above] for kind in (1, 2)]
        k_above, v_above = (torch.cat(rows) if len(rows) > 1 else rows[0] if rows else None for rows in above)
        run = _plain if family.size > 1 or _pairs(family, k_above) <= PLAIN_PAIRS else _flash
        out.append(run(family, queries, keys, values, k_above, v_above))
    return torch.cat(out)


def _pairs(family: Family, above: Tensor | None) -> int:
    return family.longest * (family.longest + (0 if above is None else len(above)))


def _plain(family: Family, q: Tensor, k: Tensor, v: Tensor, k_above: Tensor | None, v_above: Tensor | None) -> Tensor:
    """By products: queries that share a key-value head go together, those of all siblings too for their ancestors."""
    members, length, kv, size = family.size, family.longest, k.shape[1], k.shape[2]
    if family.rows is not None:
        q, k, v = (t.index_select(0, family.rows) for t in (q, k, v))
    q = (q * size**-0.5).reshape(members, length, kv, -1, size).permute(2, 0, 3, 1, 4)
    q = q.reshape(kv, -1, size).contiguous()
    k, v = (t.reshape(members, length, kv, size).permute(2, 0, 1, 3).reshape(-1, length, size) for t in (k, v))
    above = [k.new_zeros(kv, 0, size) if t is None else t.transpose(0, 1) for t in (k_above, v_above)]
    mixed: Tensor = _Products.apply(q, k, v, *above)  # type: ignore[no-untyped-call]
    mixed = mixed.view(kv, members, -1, length, size).permute(1, 3, 0, 2, 4).reshape(members * length, -1)
    return mixed if family.back is None else mixed.index_select(0, family.back)


class _Products(torch.autograd.Function):
    """Attention of scaled queries (kv, members x group x length, size) to keys and values of their own span, causally,
    (kv x members, length, size), and of their ancestors (kv, above, size). The weights are kept once."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, k_above: Tensor, v_above: Tensor) -> Tensor:
        heads, above, (batch, length, size) = len(q), k_above.shape[1], k.shape
        later = torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
        scores = (q.view(batch, -1, size) @ k.transpose(1, 2)).view(batch, -1, length, length).add_(later)
        if above:
            scores = torch.cat(((q @ k_above.transpose(1, 2)).view(batch, -1, length, above), scores), dim=-1)
        weights = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(q, k, v, k_above, v_above, weights)
        mixed = (weights[..., above:].reshape(batch, -1, length) @ v).view(heads, -1, size)
        return mixed.add_(weights[..., :above].reshape(heads, -1, above) @ v_above) if above else mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, k_above, v_above, weights = ctx.saved_tensors
        heads, above, (batch, length, size) = len(q), k_above.shape[1], k.shape
        gradient = gradients[0].contiguous()
        apart = gradient.view(batch, -1, size)
        to_weights = (apart @ v.transpose(1, 2)).view(batch, -1, length, length)
        if above:
            higher = (gradient @ v_above.transpose(1, 2)).view(batch, -1, length, above)
            to_weights = torch.cat((higher, to_weights), dim=-1)
        to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
        own, own_scores = (t[..., above:].reshape(batch, -1, length).transpose(1, 2) for t in (weights, to_scores))
        to_q = (own_scores.transpose(1, 2) @ k).view(heads, -1, size)
        to_k, to_v = own_scores @ q.view(batch, -1, size), own @ apart
        if not above:
            return to_q, to_k, to_v, None, None
        over, over_scores = (t[..., :above].reshape(heads, -1, above) for t in (weights, to_scores))
        to_q = to_q.add_(over_scores @ k_above)
        return to_q, to_k, to_v, over_scores.transpose(1, 2) @ q, over.transpose(1, 2) @ gradient


def _flash(family: Family, q: Tensor, k: Tensor, v: Tensor, k_above: Tensor | None, v_above: Tensor | None) -> Tensor:
    """A single long span, whose weights would be too large to keep."""
    mask = None
    if k_above is not None and v_above is not None:
        mask = torch.ones(len(q), len(k_above) + len(k), dtype=torch.bool, device=q.device).tril(len(k_above))
        k, v = torch.cat((k_above, k)), torch.cat((v_above, v))
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    mixed = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return mixed[0].transpose(0, 1).flatten(1)
