"""Functions that run a module in our own way, yet count as its forward pass.

Our forward (`shared_prefix`) calls the parts of Hugging Face modules by hand, so that what wraps a module's `forward`
(gathering sharded weights, recomputing activations) would never run. A function marked `as_forward` asks its module
first: where the module has `run_as`, that runs the function.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

P = ParamSpec("P")
R = TypeVar("R")


def as_forward(function: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Let `function(module, ...)` run as `module.run_as(function, ...)` where the module says how."""

    @wraps(function)
    def run(module: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        run_as = getattr(module, "run_as", None)
        return function(module, *args, **kwargs) if run_as is None else run_as(function, *args, **kwargs)

    return run


def checkpoint_layers(model: Any) -> None:
    """Gradient checkpointing of a `LlamaForCausalLM`: keep each layer's input, compute the rest again in backward.

    Gradients are the same to the bit where products are; memory is one layer's activations instead of all layers'.
    """
    for layer in model.model.layers:
        layer.run_as = partial(_checkpointed, layer)


def _checkpointed(layer: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return function(layer, *args, **kwargs)
    # no dropout in the Llama family, so no random state to keep
    return checkpoint(function, layer, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
