"""A model being trained: master weights in float32, products in bfloat16 where the processor has them, AdamW.

One class for SFT, DPO and RL, since it is the state that a killed stage resumes from. The loops are in the stages.
"""

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import FlywheelError
from ..llm.chat_format import ChatFormat
from ..llm.native import fast_dtype, load_model
from ..llm.shared_prefix import Path as TokenPath

T = TypeVar("T")
CHECKPOINT_SECONDS = 60.0
MICRO_BATCH_TOKENS = 1536


class Learner:
    """Model, optimiser, schedule and step count, with a checkpoint that resumes to the same bytes."""

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
        partial: Path | None = None,
    ) -> None:
        torch.set_num_threads(threads)
        self.device, self.steps, self.partial = device, steps, partial
        self.model, self.tokenizer = load_model(folder, torch.float32, device)
        self.format = ChatFormat(self.tokenizer, max_prompt_tokens)
        if train_layers is not None:
            _freeze_below(self.model, train_layers)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0, fused=True)
        warmup = max(1, round(warmup_share * steps))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser,
            lambda s: min(1.0, (s + 1) / warmup) * (0.1 + 0.9 * (1 + math.cos(math.pi * min(1.0, s / steps))) / 2),
        )
        self.step = 0
        self.log: list[dict[str, float]] = []
        self._saved = time.monotonic()
        if self._checkpoint and self._checkpoint.exists():
            self._resume()

    @property
    def _checkpoint(self) -> Path | None:
        return self.partial / "learner.pt" if self.partial else None

    def remaining_steps(self) -> Iterator[int]:
        """The numbers of the steps still to do; between steps, a checkpoint every minute."""
        while self.step < self.steps:
            yield self.step
            if time.monotonic() - self._saved > CHECKPOINT_SECONDS:
                self.save_checkpoint()

    def autocast(self) -> AbstractContextManager[Any]:
        """Products in bfloat16 where that is fast."""
        kind = fast_dtype(self.device)
        return torch.autocast(self.device.split(":")[0], dtype=kind, enabled=kind == torch.bfloat16)

    def update(self, **metrics: float) -> None:
        """Clip the accumulated gradient to norm 1, take a step, and log `metrics`.

        Raises:
            FlywheelError: the gradient is not finite; the weights are left as they were.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, 1.0))
        if not math.isfinite(norm):
            raise FlywheelError(
                f"step {self.step + 1} of {self.steps}: gradient norm is {norm}, must be finite; lower the learning "
                "rate or look at the batch's losses in metrics.jsonl."
            )
        rate = float(self.schedule.get_last_lr()[0])
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.log.append({"step": self.step, "learning_rate": rate, "gradient_norm": norm, **metrics})

    def save_checkpoint(self) -> None:
        """Write everything that the next step depends on, atomically."""
        if self._checkpoint is None:
            return
        state = {
            "model": self.model.state_dict(), "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(), "step": self.step, "log": self.log,
        }  # fmt: skip
        temporary = self._checkpoint.with_suffix(".writing")
        torch.save(state, temporary)
        os.replace(temporary, self._checkpoint)
        self._saved = time.monotonic()

    def _resume(self) -> None:
        assert self._checkpoint is not None
        state = torch.load(self._checkpoint, weights_only=True, map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.log = state["step"], state["log"]

    def save(self, folder: Path) -> None:
        """Write the model as a Hugging Face folder with its tokenizer and chat template.

        In float32: the next stage's steps are far smaller than bfloat16's spacing, and rounding would undo them.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def micro_batches(items: Sequence[tuple[T, Sequence[TokenPath]]]) -> Iterator[list[tuple[T, Sequence[TokenPath]]]]:
    """Group items (each with its token paths) so that a forward pass stays near `MICRO_BATCH_TOKENS` tokens."""
    batch: list[tuple[T, Sequence[TokenPath]]] = []
    tokens = 0
    for item in items:
        size = sum(len(s) for s in {segment for path in item[1] for segment in path})
        if batch and tokens + size > MICRO_BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(item)
        tokens += size
    if batch:
        yield batch


def _freeze_below(model: Any, train_layers: int) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in model.model.layers[-train_layers:]:
        for parameter in layer.parameters():
            parameter.requires_grad_(True)
    model.model.norm.weight.requires_grad_(True)


def reference_logprobs(learner: Learner, batches: Sequence[Sequence[TokenPath]]) -> list[Tensor]:
    """Summed reply log-probabilities of each batch's paths under the model as it is now, without gradient."""
    from ..llm.shared_prefix import reply_logprobs  # noqa: PLC0415
    from .losses import per_reply  # noqa: PLC0415

    sums = []
    with torch.no_grad(), learner.autocast():
        for paths in batches:
            tokens = reply_logprobs(learner.model, paths, device=learner.device)
            sums.append(per_reply(tokens.logprobs, tokens.path, len(paths)))
    return sums
