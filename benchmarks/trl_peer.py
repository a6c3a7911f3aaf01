"""TRL's trainers as peers: their settings, made to stop at every step and to say where the time went.

TRL 1.16 trains under bfloat16 autocast over float32 weights and checkpoints activations unless told otherwise. What is
faster depends on the machine, so the benchmarks try several settings and hold us against the fastest.
"""

import tempfile
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

import sides


class Setting(NamedTuple):
    """How a TRL trainer runs: autocast to bfloat16 or not, weights' type, sequences a micro-batch, checkpointing."""

    autocast: bool
    weights: str
    micro: int
    checkpointing: bool


class StepByStep(TrainerCallback):  # type: ignore[misc]
    """Ends the turn when a step is logged, or with `epochs` when an epoch is over, whose mean loss it tells."""

    def __init__(self, turn: sides.Turn, figures: Callable[[], dict[str, float]], epochs: bool) -> None:
        self.turn, self.figures, self.epochs = turn, figures, epochs
        self.losses: list[float] = []

    def on_log(self, *_: Any, logs: Mapping[str, float], **__: Any) -> None:
        if "grad_norm" in logs:
            self.losses.append(float(logs["loss"]))
            if not self.epochs:
                self._over()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        if self.epochs:
            self._over()

    def _over(self) -> None:
        loss = sum(self.losses) / len(self.losses)
        self.losses.clear()
        self.turn.over(loss=loss, **self.figures())


def parse(text: str) -> Setting:
    """`autocast|float32|bfloat16,MICRO,checkpointing|plain`: the first word is the precision.

    `autocast`: bfloat16 products over float32 weights (TRL's default); `bfloat16`: weights, gradients and AdamW's
    moments are bfloat16 too, whose small steps are lost in rounding.
    """
    precision, micro, memory = text.split(",")
    weights = "bfloat16" if precision == "bfloat16" else "float32"
    return Setting(precision != "float32", weights, int(micro), memory == "checkpointing")


def arguments(setting: Setting, per_step: int, steps: int, learning_rate: float, device: str) -> dict[str, Any]:
    """What every TRL configuration is given; `per_step` sequences make an optimiser step."""
    warnings.filterwarnings("ignore")  # of settings that have no effect on a CPU
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    micro = min(setting.micro, per_step)
    return {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": per_step // micro, "max_steps": steps, "learning_rate": learning_rate,
        "bf16": setting.autocast, "gradient_checkpointing": setting.checkpointing, "use_cpu": device == "cpu",
        "model_init_kwargs": {"dtype": getattr(torch, setting.weights)}, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "logging_steps": 1, "dataloader_pin_memory": device != "cpu", "seed": 0,
        "weight_decay": 0.0, "lr_scheduler_type": "constant",
    }  # fmt: skip


def watch(
    turn: sides.Turn, trainer: Any, loss: str, figures: Callable[[], dict[str, float]], *, epochs: bool = False
) -> None:
    """Stop after each step; clocks for what all trainers have in common. `loss`: the method that runs the model."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StepByStep(turn, figures, epochs))
    turn.clock(type(trainer), loss, "forward")
    turn.clock(torch.Tensor, "backward", "backward")
    turn.clock(torch.optim.AdamW, "step", "optimiser")
