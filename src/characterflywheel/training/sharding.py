"""Weights split over processes (FSDP2): loading, gathering and saving what no single process holds (DESIGN section 9).

Each layer is a unit: its weights are gathered for its forward and backward pass and let go after, its gradient is
summed and split. Master weights, gradients and the optimiser are float32 shards; what is gathered is bfloat16 where
the processor multiplies it. A process reads only its own rows of the weight files, so that a model which fits no
machine can be loaded, and files are written one at a time from gathered weights.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._pytree import tree_map_only

from ..errors import FlywheelError
from ..llm.native import fast_dtype
from ..llm.shared_prefix import check_family
from .adapters import plain_weights
from .parallel import Parallel, local

FILE_BYTES = 5 * 2**30


def load_sharded(
    folder: Path, parallel: Parallel, device: str, prepare: Callable[[Any], None] = lambda model: None
) -> Any:
    """A `LlamaForCausalLM`-like model with float32 weights split as `parallel.sharding` says, in evaluation mode.

    `prepare` changes the model (freezes weights, puts in adapters) while it is without weights; what the folder's
    files do not hold keeps the module's own initial value.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    config = AutoConfig.from_pretrained(folder)
    check_family(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    initial = _prepare(model, prepare)
    shard(model, mesh_of(parallel, device), fast_dtype(device))
    model.to_empty(device=device)
    rotary = model.model.rotary_emb  # computed, not stored in files
    model.model.rotary_emb = type(rotary)(config).to(device)
    _fill(model, folder, initial)
    return model


def _prepare(model: Any, prepare: Callable[[Any], None]) -> dict[str, Tensor]:
    """Prepare a model on the meta device; returns the values of what was added (adapters), which goes there too.

    Adapters are drawn on the device of the weights they stand beside, so these pretend to be on the CPU meanwhile.
    """
    weights = {id(p): p for p in model.parameters()}
    pretence = {i: torch.nn.Parameter(torch.zeros(()).expand(p.shape)) for i, p in weights.items()}
    _replace(model, pretence)
    prepare(model)
    stood = {id(p): weights[i].requires_grad_(p.requires_grad) for i, p in pretence.items()}
    initial = {name: p.detach() for name, p in model.named_parameters() if id(p) not in stood}
    added = {id(p): p for p in model.parameters() if id(p) not in stood}
    _replace(model, stood | {i: torch.nn.Parameter(p.detach().to("meta"), p.requires_grad) for i, p in added.items()})
    return initial


def _replace(model: Any, new: dict[int, torch.nn.Parameter]) -> None:
    """Put `new[id(p)]` in the place of every parameter p."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, new[id(parameter)])


def mesh_of(parallel: Parallel, device: str) -> DeviceMesh:
    """All processes in one row, or machines x processes where each machine has a whole copy."""
    kind = device.split(":", maxsplit=1)[0]
    if parallel.sharding == "node":
        shape = (parallel.world // parallel.local, parallel.local)
        return init_device_mesh(kind, shape, mesh_dim_names=("copies", "shards"))
    return init_device_mesh(kind, (parallel.world,))


def shard(model: Any, mesh: DeviceMesh, gathered: torch.dtype) -> None:
    """Split a model's weights over `mesh`, layer by layer; weights are gathered in the type `gathered`.

    Gradients are summed in float32, not averaged, as losses are divided by totals over all processes. The stream
    between layers stays float32, as under autocast.
    """
    kind = gathered if gathered != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32, cast_forward_inputs=False)
    backbone = model.model
    units = list(backbone.layers)
    if model.lm_head.weight is not backbone.embed_tokens.weight:  # tied ones are the root's, together
        units += [backbone.embed_tokens, model.lm_head]
    for unit in (*units, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    backbone.embed_tokens.register_forward_hook(lambda module, args, out: out.float())
    for layer in backbone.layers:
        inside = getattr(layer, "run_as", None) or partial(_run, layer)
        _count_as_forward(layer, inside)
    if model.lm_head in units:
        _count_as_forward(model.lm_head, partial(_run_whole, model.lm_head))
    _count_as_forward(model, partial(_run_whole, model))


def _run(module: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(module, *args, **kwargs)


def _run_whole(module: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """FSDP hangs its backward pass on what a model returns, and a view of something would lose it."""
    return tree_map_only(Tensor, torch.clone, function(module, *args, **kwargs))


def _count_as_forward(module: Any, run_as: Callable[..., Any]) -> None:
    module.run_as = run_as
    register_fsdp_forward_method(module, "run_as")


def _fill(model: Any, folder: Path, initial: dict[str, Tensor]) -> None:
    """Read this process's rows of every weight, from the files or from `initial`."""
    files = _files(folder)
    for name, parameter in model.named_parameters():
        if name in initial:
            _copy_rows(parameter, initial[name])
            continue
        stored = name.replace(".base_layer.", ".")
        if stored not in files:
            raise FlywheelError(f"{folder} holds no weight {stored!r}: is it the folder of this architecture?")
        with safe_open(files[stored], framework="pt") as file:
            _copy_rows(parameter, file.get_slice(stored))


@torch.no_grad()
def _copy_rows(parameter: Tensor, rows: Any) -> None:
    """Copy what this process holds of a weight; `rows[a:b]` reads rows of the whole."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(rows[:])
        return
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    parameter.to_local().copy_(rows[offset[0] : offset[0] + shape[0]])


def _files(folder: Path) -> dict[str, Path]:
    """Which file of a model folder holds each weight."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    single = folder / "model.safetensors"
    if not single.exists():
        raise FlywheelError(f"{folder} has no model.safetensors: give a Hugging Face folder of safetensors files.")
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its shards; all processes have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The plain model's weights put together, adapters added, one at a time; all processes have to go to the end."""
    for name, weight in plain_weights(model):
        yield name, whole(weight)


def whole_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every weight as it is trained, put together, one at a time; all processes have to go to the end."""
    for name, parameter in model.named_parameters():
        yield name, whole(parameter.detach())


def clip_gradients(parameters: Iterable[torch.nn.Parameter], bound: float) -> float:
    """Scale the gradients so that their norm over all shards is at most `bound`; returns the norm before."""
    return float(whole(torch.nn.utils.clip_grad_norm_(parameters, bound)))


def save_whole(
    named: Iterable[tuple[str, Tensor]], model: Any, folder: Path, main: bool, file_bytes: int = FILE_BYTES
) -> None:
    """Write weights as the files of a Hugging Face folder, in float32; only one file's worth is held at a time.

    `named` is gone through by all processes; the main one writes.
    """
    placed, size = dict[str, int](), 0
    pending, count = dict[str, Tensor](), 0

    def write() -> None:
        nonlocal pending, count
        save_file(pending, folder / f"part-{count}.safetensors", metadata={"format": "pt"})
        pending, count = {}, count + 1

    for name, tensor in named:
        if not main:
            continue
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > file_bytes:
            write()
        pending[name] = tensor.cpu().contiguous()
        placed[name], size = count, size + tensor.nbytes
    if not main:
        return
    write()
    names = [
        "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
    ]
    for i, name in enumerate(names):
        (folder / f"part-{i}.safetensors").replace(folder / name)
    if count > 1:
        index = {"metadata": {"total_size": size}, "weight_map": {name: names[i] for name, i in placed.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def save_shards(
    model: Any, optimiser: torch.optim.Optimizer, folder: Path, best: Sequence[Tensor] | None = None
) -> None:
    """Write model, optimiser and the best weights so far, each process its shards; `.metadata` comes last.

    `best`: this process's part of every trained weight, in the optimiser's order.
    """
    save(_state(model, optimiser, best), checkpoint_id=folder)


def load_shards(
    model: Any, optimiser: torch.optim.Optimizer, folder: Path, *, with_best: bool = False
) -> list[Tensor] | None:
    """Read what `save_shards` wrote, for any number of processes; returns this process's part of the best weights."""
    trained = optimiser.param_groups[0]["params"]
    state = _state(model, optimiser, [local(p).clone() for p in trained] if with_best else None)
    load(state, checkpoint_id=folder)
    set_state_dict(model, optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"])
    return [local(state["best"][str(i)]).cpu() for i in range(len(trained))] if with_best else None


def _state(model: Any, optimiser: torch.optim.Optimizer, best: Sequence[Tensor] | None) -> dict[str, Any]:
    _begin(optimiser)
    weights, moments = get_state_dict(model, optimiser)
    trained = optimiser.param_groups[0]["params"]
    kept = {
        str(i): DTensor.from_local(part.to(p.device), p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
        for i, (p, part) in enumerate(zip(trained, best or (), strict=best is not None))
    }
    return {"model": weights, "optimiser": moments, "best": kept}


def _begin(optimiser: torch.optim.Optimizer) -> None:
    """AdamW's moments where it has taken no step yet. `get_state_dict` would take one of zero gradients to have them,
    and count it: what a checkpoint is asked of must not change what is learnt."""
    for parameter in optimiser.param_groups[0]["params"]:
        if parameter not in optimiser.state:
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimiser.state[parameter] = {"step": step, **moments}
