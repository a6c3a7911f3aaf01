"""States of a network at chosen places of token paths, as fast as its architecture allows (PAPER section 3).

The Llama family and BERT run each shared prefix once (`shared_prefix`, `prefix_encoder`); whatever else `AutoModel`
opens runs in padded batches (`padded`).
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import FlywheelError
from . import padded, prefix_encoder, shared_prefix
from .packed import Packed
from .shared_prefix import Path

TOKENS_AT_ONCE = 4096


def states(model: Any, paths: Sequence[Path], read: Sequence[Sequence[int]], *, packed: Packed | None = None) -> Tensor:
    """Final states at the places `read[i]` of path i, counted from its root: float32 (paths, places, width).

    `model` is a Hugging Face backbone without a head. With gradients enabled, everything is one graph; otherwise paths
    run in batches of bounded size, those that share a prefix together. `packed`: what `pack` made of this model, for
    scoring without gradients; it must be packed again when weights have changed.

    Raises FlywheelError for a path that is empty or longer than the model's window, a place outside its path, packed
    weights under gradients, and packed weights that are not, or no longer, the model's.
    """
    _check(model, paths, read)
    shares = _shares_prefixes(model, max(map(_length, paths)))
    if packed is not None and torch.is_grad_enabled():
        raise FlywheelError("packed weights give no gradients: score under torch.no_grad() or leave `packed` out.")
    if packed is not None and packed.model is not model:
        raise FlywheelError("the packed weights are those of another model: pack this one.")
    if not shares:
        return padded.states(model, paths, read)
    if torch.is_grad_enabled():
        return _read(model, paths, read, packed)
    order: list[int] = []
    found: list[Tensor] = []
    for batch in in_batches(paths, TOKENS_AT_ONCE):
        found.append(_read(model, [paths[i] for i in batch], [read[i] for i in batch], packed))
        order += batch
    return torch.cat(found)[torch.tensor(order, device=found[0].device).argsort()]


def pack(model: Any, dtype: torch.dtype = torch.float32, *, release: bool = False) -> Packed | None:
    """The model's weights laid out for scoring, a copy in `dtype`; None for architectures that run in padded batches.

    It holds the weights of this moment: `states` refuses it once they have changed. `release`: it shall be the only
    copy, unless long paths need the model's own.
    """
    if not _shares_prefixes(model, 0):
        return None
    return Packed(model, dtype, release=release and _shares_prefixes(model, sys.maxsize))


def in_batches(paths: Sequence[Path], budget: int) -> Iterator[list[int]]:
    """Batches of indices, paths with a common prefix side by side; a batch lays out `budget` tokens at most, or one
    path's."""
    batch: list[int] = []
    total = 0
    for i in sorted(range(len(paths)), key=lambda i: paths[i]):
        same = 0
        if batch:
            before = paths[batch[-1]]
            while same < min(len(before), len(paths[i])) and before[same] == paths[i][same]:
                same += 1
        new = sum(map(len, paths[i][same:]))
        if batch and total + new > budget:
            yield batch
            batch, total, new = [], 0, _length(paths[i])
        batch.append(i)
        total += new
    if batch:
        yield batch


def window(config: Any) -> int | None:
    """The number of tokens that a model of this configuration has positions for; None where it has no such bound."""
    most: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is not None and config.model_type in prefix_encoder.FAMILY:
        most -= prefix_encoder.first_position(config)
    return most


def _read(model: Any, paths: Sequence[Path], read: Sequence[Sequence[int]], packed: Packed | None) -> Tensor:
    forest = shared_prefix.plant(paths, next(model.parameters()).device)
    places = torch.stack([rows[list(at)] for rows, at in zip(forest.rows, read, strict=True)])
    if packed is not None:
        rows, back = torch.unique(places, return_inverse=True)
        return packed.hidden_states(forest, rows.tolist())[back]
    run = prefix_encoder.hidden_states if _is_encoder(model) else shared_prefix.hidden_states
    return run(model, forest).float()[places]


def _is_encoder(model: Any) -> bool:
    return model.config.model_type in prefix_encoder.FAMILY


def _shares_prefixes(model: Any, longest: int) -> bool:
    """Whether the architecture is one whose layers run over shared prefixes, for paths up to this length."""
    config = model.config
    if _is_encoder(model):
        return not config.is_decoder
    slides = getattr(config, "sliding_window", None)
    return config.model_type in shared_prefix.FAMILY and (slides is None or longest <= slides)


def _check(model: Any, paths: Sequence[Path], read: Sequence[Sequence[int]]) -> None:
    if not paths:
        raise FlywheelError("there are no paths to read: give at least one.")
    if len({len(at) for at in read}) != 1:
        raise FlywheelError("different numbers of places are to be read: give as many places on each path.")
    most = window(model.config)
    for path, at in zip(paths, read, strict=True):
        length = _length(path)
        if not length:
            raise FlywheelError("an empty token sequence cannot be read: give each path at least one token.")
        if most is not None and length > most:
            raise FlywheelError(f"a path has {length} tokens, the model's window is {most}: shorten the history.")
        if not all(-length <= place < length for place in at):
            raise FlywheelError(f"places to read {list(at)}, the path has {length} tokens: read inside it.")


def _length(path: Path) -> int:
    return sum(map(len, path))
