"""States of token paths from any Hugging Face transformer, by padded batches (PAPER section 3).

For architectures whose layers this package does not know. Paths of similar length share a batch, padded on the right;
padding is masked, so that the tokenizer needs no pad token.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .shared_prefix import Path

TOKENS_AT_ONCE = 4096


def states(model: Any, paths: Sequence[Path], read: Sequence[Sequence[int]], budget: int = TOKENS_AT_ONCE) -> Tensor:
    """Final states at the places `read[i]` of path i: float32 (paths, places, width), with gradients.

    `model` is called with `input_ids` and `attention_mask` and gives a `last_hidden_state`, as every `AutoModel` of
    text does. A batch holds at most `budget` tokens with its padding, or one path.
    """
    device = next(model.parameters()).device
    flat = [[token for segment in path for token in segment] for path in paths]
    found: list[Tensor] = []
    order: list[int] = []
    for batch in by_length([len(ids) for ids in flat], budget):
        sizes = torch.tensor([len(flat[i]) for i in batch])
        width = int(sizes.max())
        ids = torch.tensor([flat[i] + [0] * (width - len(flat[i])) for i in batch], device=device)
        mask = (torch.arange(width) < sizes.unsqueeze(1)).long().to(device)
        out = model(input_ids=ids, attention_mask=mask, **_no_cache(model)).last_hidden_state
        places = torch.tensor([[place % len(flat[i]) for place in read[i]] for i in batch], device=device)
        found.append(out[torch.arange(len(batch), device=device).unsqueeze(1), places].float())
        order += batch
    return torch.cat(found)[torch.tensor(order, device=device).argsort()]


def by_length(sizes: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Batches of indices, shortest first, whose count times their longest is at most `budget` (one at the least)."""
    batch: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        if batch and (len(batch) + 1) * sizes[i] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _no_cache(model: Any) -> dict[str, bool]:
    """No cache of keys and values, where the architecture would keep one."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
