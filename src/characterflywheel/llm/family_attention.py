"""Causal attention in a forest by families of siblings, with gradients: replies to one prompt look at it together.

A family's queries meet their ancestors' keys in one product without a mask, and their own span's in one batch of small
causal products; so hardly anything is computed that a mask would throw away.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .forest import PLAIN_PAIRS, Family


def attend(q: Tensor, k: Tensor, v: Tensor, among: Sequence[Family]) -> Tensor:
    """(N, heads, size) queries, (N, kv heads, size) keys and values of all rows -> (N, heads * size)."""
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
    q = (q * size**-0.5).reshape(members, length, kv, -1, size).permute(2, 0, 3, 1, 4).reshape(kv, -1, size)
    k, v = (t.reshape(members, length, kv, size).permute(2, 0, 1, 3).reshape(-1, length, size) for t in (k, v))
    later = torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    batch = kv * members
    scores = (q.reshape(batch, -1, size) @ k.transpose(1, 2)).view(batch, -1, length, length).add_(later)
    if k_above is None or v_above is None:
        mixed = torch.softmax(scores, dim=-1).to(v.dtype).view(batch, -1, length) @ v
    else:
        over = len(k_above)
        scores_above = (q @ k_above.permute(1, 2, 0)).view(batch, -1, length, over)
        weights = torch.softmax(torch.cat((scores_above, scores), dim=-1), dim=-1).to(v.dtype)
        mixed = (weights[..., over:].reshape(batch, -1, length) @ v).view(kv, -1, size)
        mixed = mixed + weights[..., :over].reshape(kv, -1, over) @ v_above.transpose(0, 1)
    mixed = mixed.view(kv, members, -1, length, size).permute(1, 3, 0, 2, 4).reshape(members * length, -1)
    return mixed if family.back is None else mixed.index_select(0, family.back)


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
