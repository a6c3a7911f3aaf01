"""A model being trained: master weights in float32, products in bfloat16 where the processor has them, AdamW.

One class for SFT, DPO and RL, since it is the state that a killed stage resumes from: weights or adapters, optimiser,
schedule, random states, log and best weights so far. The loops are in the stages (PAPER section 4).
"""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FlywheelError
from ..llm.as_forward import checkpoint_layers
from ..llm.chat_format import ChatFormat
from ..llm.native import fast_dtype, load_model
from ..llm.shared_prefix import Path as TokenPath
from ..llm.shared_prefix import reply_logprobs
from . import adapters
from .losses import per_reply
from .parallel import Parallel, local

CHECKPOINT_SECONDS = 60.0
SAVING_SECONDS = 3.0  # a checkpoint that takes longer is written less often, so that it costs a twentieth of the time


class Learner:
    """Model, optimiser, schedule and step count, with a checkpoint that resumes to the same bytes.

    `lora_rank`: train adapters of this rank instead of the weights; `train_layers`: of the last so many layers only.
    `partial`: where checkpoints are kept; without it there are none. `max_loss`: the loss beyond which training has
    diverged. Raises FlywheelError where a checkpoint's weights are split over processes and this learner's are not, or
    the other way round.
    """

    def __init__(
        self,
        folder: Path,
        *,
        learning_rate: float,
        steps: int,
        max_prompt_tokens: int,
        threads: int,
        device: str = "cpu",
        warmup_share: float = 0.1,
        train_layers: int | None = None,
        lora_rank: int | None = None,
        gradient_checkpointing: bool = False,
        max_loss: float | None = None,
        partial: Path | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        torch.set_num_threads(threads)
        self.device, self.steps, self.partial, self.max_loss = device, steps, partial, max_loss
        self.parallel = parallel or Parallel.alone()

        def prepare(model: Any) -> None:
            if lora_rank is not None:
                adapters.attach(model, lora_rank, layers=train_layers)
            elif train_layers is not None:
                _freeze_below(model, train_layers)
            if gradient_checkpointing:
                checkpoint_layers(model)

        self.model, self.tokenizer = self._load(folder, prepare)
        self.format = ChatFormat(self.tokenizer, max_prompt_tokens)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0, fused=True)
        warmup = max(1, round(warmup_share * steps))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser,
            lambda s: min(1.0, (s + 1) / warmup) * (0.1 + 0.9 * (1 + math.cos(math.pi * min(1.0, s / steps))) / 2),
        )
        self.step = 0
        self.log: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []
        self.best: list[Tensor] | None = None
        self._saved, self._saving = time.monotonic(), 0.0
        if self._checkpoint and self._checkpoint.exists():
            self._resume()

    def _load(self, folder: Path, prepare: Any) -> tuple[Any, Any]:
        if not self.parallel.sharded:
            model, tokenizer = load_model(folder, torch.float32, self.device)
            prepare(model)
            return model, tokenizer
        from transformers import AutoTokenizer  # noqa: PLC0415

        from .sharding import load_sharded  # noqa: PLC0415 - distributed modules take seconds, and one process has none

        return load_sharded(folder, self.parallel, self.device, prepare), AutoTokenizer.from_pretrained(folder)

    def remaining_steps(self) -> Iterator[int]:
        """The numbers of the steps still to do; between steps, a checkpoint every minute, and one after the last.

        Where saving takes long it is done less often.
        """
        while self.step < self.steps:
            yield self.step
            wait = CHECKPOINT_SECONDS * max(1.0, self._saving / SAVING_SECONDS)
            if self.step == self.steps or self.parallel.agree(time.monotonic() - self._saved > wait):
                self.save_checkpoint()

    def autocast(self) -> AbstractContextManager[Any]:
        """Products in bfloat16 where that is fast."""
        kind = fast_dtype(self.device)
        return torch.autocast(self.device.split(":")[0], dtype=kind, enabled=kind == torch.bfloat16)

    def update(self, **metrics: float) -> None:
        """Clip the accumulated gradient to norm 1, take a step, and log `metrics`.

        With several processes, gradients have been summed (`parallel.reduce_gradients`) and metrics too.

        Raises:
            FlywheelError: the loss or the gradient is not finite, or the loss is above `max_loss`; the weights are
                left as they were.
        """
        loss = metrics.get("loss", 0.0)
        if not math.isfinite(loss):
            raise self._diverged(f"loss is {loss}, must be finite")
        if self.max_loss is not None and loss > self.max_loss:
            raise self._diverged(f"loss is {loss:.4g}, at most {self.max_loss:g} is allowed")
        norm = self._clip()
        if not math.isfinite(norm):
            raise self._diverged(f"gradient norm is {norm}, must be finite")
        rate = float(self.schedule.get_last_lr()[0])
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.log.append({"step": self.step, "learning_rate": rate, "gradient_norm": norm, **metrics})

    def _clip(self) -> float:
        if self.parallel.sharded:
            from .sharding import clip_gradients  # noqa: PLC0415

            return clip_gradients(self.parameters, 1.0)
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, 1.0))

    def _diverged(self, what: str) -> FlywheelError:
        past = ", ".join(f"{row['loss']:.4g}" for row in self.log[-5:] if "loss" in row) or "none"
        return FlywheelError(
            f"step {self.step + 1} of {self.steps}: {what}; lower the learning rate "
            f"({self.schedule.get_last_lr()[0]:.3g} now). Weights are as before the step; last losses: {past}."
        )

    def evaluated(self, loss: float, *, keep_best: bool = False, **more: float) -> None:
        """Log an evaluation after `step` steps; with `keep_best`, the weights are kept if none before did better.

        Raises:
            FlywheelError: the loss is not finite.
        """
        if not math.isfinite(loss):
            raise self._diverged(f"evaluation loss is {loss}, must be finite")
        if keep_best and all(loss < row["evaluation_loss"] for row in self.evaluations):
            self.best = [local(p).to("cpu", copy=True) for p in self.parameters]
        self.evaluations.append({"step": self.step, "evaluation_loss": loss, **more})

    def evaluations_since_best(self) -> int:
        """How many of the last evaluations in a row did not improve on the one before them."""
        losses = [row["evaluation_loss"] for row in self.evaluations]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    @torch.no_grad()
    def return_to_best(self) -> int:
        """Put the weights kept by `evaluated` back, where any are; the number of the step that the weights are of."""
        if self.best is None:
            return self.step
        for parameter, value in zip(self.parameters, self.best, strict=True):
            local(parameter).copy_(value)
        return int(min(self.evaluations, key=lambda row: row["evaluation_loss"])["step"])

    @property
    def _checkpoint(self) -> Path | None:
        return self.partial / "learner.pt" if self.partial else None

    def save_checkpoint(self) -> None:
        """Write everything that the next step depends on, atomically. Weights that are not trained are the parent's."""
        if self._checkpoint is None:
            return
        started = time.monotonic()
        state: dict[str, Any] = {
            "schedule": self.schedule.state_dict(), "step": self.step, "log": self.log,
            "evaluations": self.evaluations, "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.startswith("cuda") else None,
        }  # fmt: skip
        shards = self._checkpoint.with_name(f"shards-{self.step:06d}")
        if self.parallel.sharded:
            from .sharding import save_shards  # noqa: PLC0415

            save_shards(self.model, self.optimiser, shards, self.best)
            state |= {"best": self.best is not None}
        else:
            state |= {"parameters": [p.detach() for p in self.parameters], "optimiser": self.optimiser.state_dict()}
            state |= {"best": self.best}
        if self.parallel.main:
            save_atomically(state, self._checkpoint)
            for old in self._checkpoint.parent.glob("shards-*"):
                if old != shards:
                    shutil.rmtree(old)
        self._saved = time.monotonic()
        self._saving = self._saved - started

    @torch.no_grad()
    def _resume(self) -> None:
        assert self._checkpoint is not None
        state = torch.load(self._checkpoint, weights_only=True, map_location="cpu")
        if (split := "parameters" not in state) != self.parallel.sharded:
            how = {True: "split over processes", False: "whole in every process"}
            raise FlywheelError(
                f"{self._checkpoint} was begun with weights {how[split]}, but [parallel] now says {how[not split]} "
                f"(sharding == {self.parallel.sharding!r}, {self.parallel.world} processes): set it back, or remove "
                f"{self._checkpoint.parent} to begin anew."
            )
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.log, self.evaluations = state["step"], state["log"], state["evaluations"]
        if self.parallel.sharded:
            from .sharding import load_shards  # noqa: PLC0415

            shards = self._checkpoint.with_name(f"shards-{self.step:06d}")
            self.best = load_shards(self.model, self.optimiser, shards, with_best=state["best"])
        else:
            self.best = state["best"]
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
            self.optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)

    def save(self, folder: Path) -> None:
        """Write the model as a plain Hugging Face folder with its tokenizer and chat template.

        In float32: the next stage's steps are far smaller than bfloat16's spacing, and rounding would undo them.
        Adapters are added to the weights, and are also written alone, into `adapter/` beside the folder.
        """
        if self.parallel.sharded:
            from .sharding import save_whole, whole_parameters, whole_weights  # noqa: PLC0415

            _put_away(self.model)
            folder.mkdir(parents=True, exist_ok=True)
            save_whole(whole_weights(self.model), self.model, folder, self.parallel.main)
            if adapters.adapted(self.model):
                named = [(name, weight) for name, weight in whole_parameters(self.model) if adapters.is_adapter(name)]
                if self.parallel.main:
                    adapters.save_adapter(self.model, folder.with_name("adapter"), named)
        elif self.parallel.main:
            folder.mkdir(parents=True, exist_ok=True)
            if adapters.adapted(self.model):
                self.model.save_pretrained(folder, state_dict=dict(adapters.plain_weights(self.model)))
                adapters.save_adapter(self.model, folder.with_name("adapter"))
            else:
                self.model.save_pretrained(folder)
        if self.parallel.main:
            self.tokenizer.save_pretrained(folder)
        self.parallel.barrier()


def save_atomically(value: Any, path: Path) -> None:
    """Write tensors so that a reader sees the old file or the new, even after a power cut."""
    temporary = path.with_suffix(".writing")
    with temporary.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_metrics(folder: Path, learner: Learner) -> None:
    """`metrics.jsonl`: one line a step and one an evaluation, in the order they happened."""
    rows = sorted([*learner.log, *learner.evaluations], key=lambda row: row["step"])
    if learner.parallel.main:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _put_away(model: Any) -> None:
    """Split again what a pass without gradient left gathered (the outermost weights), in the precision of products."""
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415

    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _freeze_below(model: Any, train_layers: int) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in model.model.layers[-train_layers:]:
        for parameter in layer.parameters():
            parameter.requires_grad_(True)
    model.model.norm.weight.requires_grad_(True)


@torch.no_grad()
def reply_sums(learner: Learner, paths: Sequence[TokenPath]) -> Tensor:
    """Summed log-probability of every path's reply under the model as it is now, without gradient: (paths,)."""
    with learner.autocast():
        tokens = reply_logprobs(learner.model, paths, device=learner.device)
    return per_reply(tokens.logprobs, tokens.path, len(paths))
