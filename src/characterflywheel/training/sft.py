"""Supervised fine-tuning on the mixture; only the last reply of each example is learnt (PAPER section 4)."""

import math
from collections.abc import Sequence
from pathlib import Path

from ..config import SFTConfig
from ..errors import FlywheelError
from ..llm.shared_prefix import Path as TokenPath
from ..llm.shared_prefix import reply_logprobs
from ..pipeline import Work
from ..progress import Advance
from ..records import Example, Record
from .learner import Learner, micro_batches, write_metrics
from .mixture import SourceShare, mix


class TrainingSummary(Record):
    """What a training stage did: steps, what it learnt from, its loss at the start and the end."""

    steps: int
    examples: int
    trained_tokens: int
    first_loss: float
    last_loss: float
    sources: tuple[SourceShare, ...] = ()
    duplicates: int = 0

    def line(self) -> str:
        return f"{self.steps} steps on {self.examples} examples, loss {self.first_loss:.3f} to {self.last_loss:.3f}"


def train_sft(
    work: Work, config: SFTConfig, parent: Path, examples: Sequence[Example], *, threads: int, device: str = "cpu",
    on_progress: Advance = lambda done, total: None,
) -> TrainingSummary:  # fmt: skip
    """Fine-tune the model folder `parent`; writes `model/` and `metrics.jsonl` into the work folder.

    Raises:
        FlywheelError: the mixture is empty, or the loss diverged.
    """
    mixture = mix(examples, config.weights, config.epochs, work.seed)
    if not mixture.examples:
        raise FlywheelError(f"no example to learn from: {len(examples)} offered, weights {config.weights}.")
    batches = [
        mixture.examples[i : i + config.examples_per_step]
        for i in range(0, len(mixture.examples), config.examples_per_step)
    ]
    learner = Learner(
        parent, learning_rate=config.learning_rate, steps=len(batches), warmup_share=config.warmup_share,
        max_prompt_tokens=config.max_prompt_tokens, threads=threads, device=device, train_layers=config.train_layers,
        partial=work.partial,
    )  # fmt: skip
    for step in learner.remaining_steps():
        paths = sorted(_path(learner, example) for example in batches[step])
        total = sum(len(path[-1]) for path in paths)
        loss_sum = 0.0
        for group in micro_batches([(None, [path]) for path in paths]):
            with learner.autocast():
                logprobs = reply_logprobs(learner.model, [p for _, [p] in group], device=device).logprobs
            loss = -logprobs.sum() / total
            loss.backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.item()
        learner.update(loss=loss_sum, tokens=total)
        on_progress(step + 1, len(batches))
    learner.save(work.folder / "model")
    write_metrics(work.folder, learner)
    losses = [row["loss"] for row in learner.log]
    edge = max(1, math.ceil(len(losses) / 5))
    return TrainingSummary(
        steps=len(batches), examples=len(mixture.examples), trained_tokens=int(sum(r["tokens"] for r in learner.log)),
        first_loss=sum(losses[:edge]) / edge, last_loss=sum(losses[-edge:]) / edge, sources=mixture.sources,
        duplicates=len(mixture.dropped),
    )  # fmt: skip


def _path(learner: Learner, example: Example) -> TokenPath:
    return (*learner.format.prompt(example.messages[:-1]), learner.format.reply(example.messages[-1].content))
