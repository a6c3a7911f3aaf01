"""What `flywheel memory` does: whether each training stage fits, from shapes and settings alone."""

import os
from collections.abc import Sequence
from pathlib import Path

import typer

from .errors import FlywheelError
from .progress import announce
from .training.plan import GIB, PEAKS, USE, Machine, StagePlan, plan_stages
from .training.shape import Shape, known, read_shape
from .workspace import Workspace


def memory(
    workspace: Workspace, gpus: int | None, gpu_memory: float | None, gpu: str, local: int, as_json: bool
) -> None:
    """Print memory, batches and time of every training stage; nothing is loaded.

    Raises:
        FlywheelError: a stage does not fit; what was printed says what would.
    """
    config = workspace.config()
    if gpus is not None:
        config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"processes": gpus})})
    on_gpu = config.models.device != "cpu" or gpu_memory is not None
    machine = _gpu(gpu, gpu_memory, local) if on_gpu else _processor(config.parallel.processes)
    shape = _shape(config.models.base)
    plans = plan_stages(config, shape, machine)
    if as_json:
        typer.echo("[" + ",\n".join(plan.model_dump_json() for plan in plans) + "]")
    else:
        typer.echo("\n".join(_lines(plans, shape, machine, config.parallel.processes)))
    short = [plan for plan in plans if not plan.fits]
    if short:
        raise FlywheelError("; ".join(f"{plan.stage} does not fit: set {plan.remedy}" for plan in short) + ".")


def _shape(base: str) -> Shape:
    from .llm.models import base_model_folder  # noqa: PLC0415

    if base.startswith("package:"):
        return read_shape(base_model_folder(base))
    folder = Path(base).expanduser()
    if not (folder / "config.json").exists():
        shape = read_shape(folder)
        announce("memory", f"{base} is not on this machine; planned with the shape of {known(folder.name)}")
        return shape
    return read_shape(folder)


def _gpu(name: str, gibibytes: float | None, local: int) -> Machine:
    if name not in PEAKS:
        raise FlywheelError(f"GPU {name!r} is not known; there are {', '.join(PEAKS)}.")
    if gibibytes is None:
        import torch  # noqa: PLC0415

        here = torch.cuda.is_available()
        gibibytes = torch.cuda.get_device_properties(0).total_memory / GIB if here else 80e9 / GIB
    return Machine(gibibytes * GIB, PEAKS[name], True, local)


def _processor(processes: int) -> Machine:
    """This machine's memory shared out among processes, and the rate of products that one core reaches now."""
    import time  # noqa: PLC0415

    import torch  # noqa: PLC0415

    from .llm.native import fast_dtype  # noqa: PLC0415

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    a = torch.randn(1024, 1024, dtype=fast_dtype())
    (a @ a).sum()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return Machine(total / processes, 2 * 1024**3 / best, False, processes)


def _lines(plans: Sequence[StagePlan], shape: Shape, machine: Machine, processes: int) -> list[str]:
    of = "GPU" if machine.gpu else "process"
    lines = [
        f"{shape.parameters:,} parameters; {processes} x {of}, {machine.memory / GIB:.1f} GiB each, "
        f"of which {machine.spare:.0%} are left for gaps",
        "",
        f"{'GiB of one ' + of:<24}" + "".join(f"{plan.stage:>10}" for plan in plans),
    ]
    for name in (
        "weights", "optimiser", "gathered", "gradients", "activations", "copies", "judges", "decoding", "total",
    ):  # fmt: skip
        label = {"gathered": "weights in use", "copies": "sampler, reference", "judges": "reward models"}.get(
            name, name
        )
        lines.append(f"{label:<24}" + "".join(f"{getattr(plan.memory, name) / GIB:>10.2f}" for plan in plans))
    lines.append(f"{'fits':<24}" + "".join(f"{'yes' if plan.fits else 'NO':>10}" for plan in plans))
    rows = {
        "trained parameters": [f"{plan.trained_parameters / 1e6:,.1f}M" for plan in plans],
        "longest example": [f"{plan.longest_example:,}" for plan in plans],
        "examples a micro-batch": [str(plan.micro_batch_examples) for plan in plans],
        "micro-batches a step": [str(plan.micro_batches) for plan in plans],
        "examples a step": [str(plan.examples_per_step) for plan in plans],
        "tokens a step, at most": [f"{plan.tokens_per_step:,}" for plan in plans],
        "steps": [f"{plan.steps:,}" for plan in plans],
        "operations a step": [f"{plan.operations_per_step:.2g}" for plan in plans],
        f"GiB sent a step and {of}": [f"{plan.sent_per_step / GIB:.1f}" for plan in plans],
        "hours, at best": [f"{plan.seconds[0] / 3600:.2g}" for plan in plans],
        "hours, at worst": [f"{plan.seconds[1] / 3600:.2g}" for plan in plans],
    }
    lines += ["", *(f"{name:<24}" + "".join(f"{value:>10}" for value in values) for name, values in rows.items())]
    peak = f"{machine.peak / 1e12:.3g}e12 operations a second"
    lines += [
        "",
        f"Hours: learning only, at {USE[1]:.0%} and {USE[0]:.0%} of {peak}, all examples of the longest kind.",
    ]
    return lines
