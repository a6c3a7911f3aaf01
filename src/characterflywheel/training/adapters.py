"""Low-rank adapters (Hu 2021) on a model's linear layers, and the plain weights they stand for (PAPER section 4).

The adapted model is trained and run like any other. What is saved is a plain Hugging Face folder with the adapters
added to its weights, so that nothing downstream knows of them, and the adapters alone beside it.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER = "default"


def attach(model: Any, rank: int, *, layers: int | None = None, seed: int = 0) -> None:
    """Freeze `model` and give the linear layers of its last `layers` layers (all if None) trainable adapters.

    They begin as nothing (B = 0); A is drawn with `seed`. The scale is alpha / rank = 2. The head stays as it is.
    """
    from peft import LoraConfig, LoraModel  # noqa: PLC0415 - takes seconds, and most runs train all weights

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    count = len(model.model.layers)
    first = count - min(layers or count, count)
    targets = [
        f"model.layers.{i}.{name}"
        for i, layer in enumerate(model.model.layers)
        if i >= first
        for name, part in layer.named_modules()
        if isinstance(part, nn.Linear)
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LoraModel(
            model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM"), ADAPTER
        )


def adapted(model: Any) -> bool:
    """Whether the model carries adapters."""
    return hasattr(model, "peft_config")


def plain_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of the plain model, adapters added where there are any; one weight at a time is computed.

    Names and order are those of `named_parameters` without adapters: what a sampler is given, and what is saved.
    """
    names = {id(part.base_layer.weight): part for part in model.modules() if hasattr(part, "get_delta_weight")}
    for name, weight in model.named_parameters():
        if is_adapter(name):
            continue
        part = names.get(id(weight))
        value = weight.detach()
        yield (
            name.replace(".base_layer.", "."),
            value if part is None else value + part.get_delta_weight(ADAPTER).detach(),
        )


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return f".{ADAPTER}." in name


def save_adapter(model: Any, folder: Path, named: Iterable[tuple[str, Tensor]] | None = None) -> None:
    """Write the adapters as peft reads them (`PeftModel.from_pretrained(parent, folder)`); the same bytes each time.

    `named`: the adapters by name, if they are not the model's own parameters (but put together from shards).
    """
    from safetensors.torch import save_file  # noqa: PLC0415

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": weight.detach().contiguous().cpu()
        for name, weight in named or model.named_parameters()
        if is_adapter(name)
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config[ADAPTER].to_dict() | {"inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    plain["target_modules"] = sorted(plain["target_modules"])  # a set has another order in every process
    (folder / "adapter_config.json").write_text(
        json.dumps(plain, indent=1, sort_keys=True, default=str) + "\n", "utf-8"
    )
