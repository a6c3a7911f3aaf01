"""Direct preference optimisation on a small set: an off-policy, local patch (PAPER section 4).

The reference is the model that training starts from. Its log-probabilities are computed once, in the micro-batches
that the policy will run in, so that rounding cancels and the first margin is 0. A pair's prompt runs once.
"""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import intervals, tables
from ..config import DPOConfig
from ..errors import FlywheelError
from ..ids import derive_seed
from ..llm.shared_prefix import Path as TokenPath
from ..llm.shared_prefix import reply_logprobs
from ..pipeline import Work
from ..progress import Advance
from ..records import Dropped, Estimate, Preference, Record
from . import losses
from .batching import plan, share_prefixes
from .learner import CHECKPOINT_SECONDS, Learner, reply_sums, save_atomically, write_metrics
from .parallel import Parallel
from .paths import Tokenised, check_room, of_pairs, open_format


class DPOSummary(Record):
    """What DPO did; accuracy is how often the implicit reward ranks a pair of the last step right, before that step.

    `evaluation_accuracy` (a tie is one half) and `evaluation_margin` (beta times the difference of log ratios) are of
    held-out pairs after training, with intervals by user; the margin before it is 0 by construction. `cut_replies`
    were longer than `max_reply_tokens` and read up to it; the prompts of `too_long` pairs did not fit the window.
    `ties` prefer neither reply; `left_over` pairs were beyond `config.pairs`, or held out beyond `evaluation_pairs`.
    Pairs learnt, held out and measured (`evaluated`), and these add up to what was given.
    """

    steps: int
    pairs: int
    trained_tokens: int
    first_loss: float
    last_loss: float
    last_accuracy: float
    evaluation_accuracy: Estimate = Estimate(value=None, n=0, reason="not measured")
    evaluation_margin: Estimate = Estimate(value=None, n=0, reason="not measured")
    cut_replies: int = 0
    too_long: int = 0
    evaluated: int = 0
    ties: int = 0
    left_over: int = 0

    def line(self) -> str:
        said = (
            f"{self.steps} steps on {self.pairs} pairs, loss {self.first_loss:.3f} to {self.last_loss:.3f}, "
            f"{self.last_accuracy:.0%} of the last step's pairs ranked right"
        )
        held = self.evaluation_accuracy
        return said if held.value is None else f"{said}, {held.value:.0%} of {held.n} held out"


def train_dpo(
    work: Work, config: DPOConfig, parent: Path, preferences: Sequence[Preference], *, threads: int,
    device: str = "cpu", parallel: Parallel | None = None, gradient_checkpointing: bool = False,
    on_progress: Advance = lambda done, total: None,
) -> DPOSummary:  # fmt: skip
    """Train on the pairs that reviewers agreed on most, `config.pairs` of them; held-out pairs only evaluate.

    Writes `model/`, `metrics.jsonl` and `dropped.parquet` (Dropped).

    Raises:
        FlywheelError: no pair to learn from, a pair is beyond the model's context, or the loss diverged.
    """
    form = open_format(parent, config.max_prompt_tokens)
    seen = of_pairs(form, [p for p in preferences if p.label > 0.5], config.max_reply_tokens)
    usable = [p for p in preferences if p.id in seen.lessons]
    pairs = choose_pairs([p for p in usable if not p.held_out], config.pairs, work.seed)
    held = choose_pairs([p for p in usable if p.held_out], config.evaluation_pairs, work.seed)
    if not pairs:
        raise FlywheelError(f"none of {len(preferences)} preference pairs is for training: annotate more prompts.")
    check_room(parent, "dpo", (seen.lessons[pair.id] for pair in (*pairs, *held)))
    size = config.pairs_per_step
    batches = [_batch(pairs[i : i + size], seen, config) for i in range(0, len(pairs), size)]
    evaluation = _batch(held, seen, config)
    learner = Learner(
        parent, learning_rate=config.learning_rate, steps=len(batches), max_prompt_tokens=config.max_prompt_tokens,
        threads=threads, device=device, train_layers=config.train_layers, lora_rank=config.lora_rank,
        gradient_checkpointing=gradient_checkpointing, max_loss=config.max_loss, partial=work.partial,
        parallel=parallel,
    )  # fmt: skip
    *references, of_evaluation = reference_sums(work, learner, [*batches, evaluation])
    margins: Tensor | None = None
    for step in learner.remaining_steps():
        learner.update(**accumulate(learner, batches[step], references[step], config))
        if (config.evaluate_every and (step + 1) % config.evaluate_every == 0) or step + 1 == len(batches):
            margins = _evaluate(learner, evaluation, of_evaluation, config)
        on_progress(step + 1, len(batches))
    if margins is None:  # a run that resumed after its last step
        margins = _margins(_sums(learner, evaluation), of_evaluation, config)
    learner.save(work.folder / "model")
    write_metrics(work.folder, learner)
    if learner.parallel.main:
        tables.write(work.folder / "dropped.parquet", Dropped, seen.dropped)
    first, last, users = learner.log[0], learner.log[-1], [p.user_id for p in held]
    missing = "evaluation_pairs is 0" if not config.evaluation_pairs else "no pair is held out"
    none = Estimate(value=None, n=0, reason=missing)
    chosen = {p.id for p in (*pairs, *held)}
    return DPOSummary(
        steps=len(batches), pairs=len(pairs), trained_tokens=int(sum(r["tokens"] for r in learner.log)),
        first_loss=first["loss"], last_loss=last["loss"], last_accuracy=last["accuracy"],
        cut_replies=sum(seen.lessons[name].cut for name in chosen), too_long=len(seen.dropped),
        evaluated=len(held), ties=sum(p.label <= 0.5 for p in preferences),
        left_over=len(usable) - len(pairs) - len(held),
        evaluation_accuracy=intervals.share((margins.sign() / 2 + 0.5).numpy(), users) if held else none,
        evaluation_margin=intervals.mean(margins.numpy(), users) if held else none,
    )  # fmt: skip


def choose_pairs(pairs: Sequence[Preference], count: int, seed: int) -> list[Preference]:
    """The clearest pairs, no ties; each prompt's first before any prompt's second, seeded among equals."""
    ordered = sorted((p for p in pairs if p.label > 0.5), key=lambda p: (-p.label, derive_seed(seed, p.id)))
    taken = Counter[str]()
    rounds = []
    for pair in ordered:
        rounds.append(taken[pair.prompt_id])
        taken[pair.prompt_id] += 1
    order = sorted(range(len(ordered)), key=lambda i: (rounds[i], i))
    return [ordered[i] for i in order[:count]]


class Batch(NamedTuple):
    """The pairs of a step: two paths each, how likely each label is wrong, and which pairs run together.

    `lengths`: (pairs, 2), tokens of the chosen and of the rejected reply.
    """

    paths: list[list[TokenPath]]
    noise: Tensor
    lengths: Tensor
    together: list[list[int]]


def _batch(pairs: Sequence[Preference], seen: Tokenised, config: DPOConfig) -> Batch:
    flat = share_prefixes([path for pair in pairs for path in seen.lessons[pair.id].paths])
    paths = [flat[i : i + 2] for i in range(0, len(flat), 2)]
    agreement = torch.tensor([pair.label if config.soft_labels else 1.0 for pair in pairs])
    lengths = torch.tensor([[len(path[-1]) for path in both] for both in paths]).view(-1, 2)
    return Batch(
        paths, losses.label_noise(agreement, config.label_smoothing), lengths, plan(paths, config.micro_batch_tokens)
    )


def reference_sums(work: Work, learner: Learner, batches: Sequence[Batch]) -> list[Tensor]:
    """Summed reply log-probabilities (pairs, 2) of each batch under the parent, which `learner` is before its steps.

    They are kept as they come, so a killed run computes none twice for more than a minute; a learner that has taken
    steps finds them all.
    """
    file = work.partial / "reference.pt"
    done: list[Tensor] = torch.load(file, weights_only=True) if file.exists() else []
    kept = time.monotonic()
    for number in range(len(done), len(batches)):
        done.append(_sums(learner, batches[number]))
        if learner.parallel.main and (number + 1 == len(batches) or time.monotonic() - kept > CHECKPOINT_SECONDS):
            save_atomically(done, file)
            kept = time.monotonic()
    return done


def _sums(learner: Learner, batch: Batch) -> Tensor:
    """Summed reply log-probabilities (pairs, 2) under the model as it is."""
    found: list[tuple[int, Tensor]] = []
    for turn in learner.parallel.turns(batch.together):
        sums = reply_sums(learner, [path for i in turn.batch for path in batch.paths[i]]).view(-1, 2).cpu()
        if turn.counts:
            found += zip(turn.batch, sums, strict=True)
    rows = [row for _, row in sorted(learner.parallel.gather(found), key=lambda pair: pair[0])]
    return torch.stack(rows) if rows else torch.zeros(0, 2)


def accumulate(learner: Learner, batch: Batch, reference: Tensor, config: DPOConfig) -> dict[str, float]:
    """Add the gradient of one step's mean loss over its pairs, in micro-batches; what the step logs."""
    totals = losses.Totals(len(batch.paths), int(batch.lengths[:, 0].sum()))
    sums = dict.fromkeys(("loss", "accuracy", "margin", "chosen", "rejected"), 0.0)
    for turn in learner.parallel.turns(batch.together):
        paths = [path for i in turn.batch for path in batch.paths[i]]
        with learner.autocast():
            now = reply_logprobs(learner.model, paths, device=learner.device)
        policy = losses.per_reply(now.logprobs, now.path, len(paths)).view(-1, 2)
        before, noise, lengths = (
            values[turn.batch].to(learner.device) for values in (reference, batch.noise, batch.lengths)
        )
        out = losses.dpo(
            policy[:, 0], policy[:, 1], before[:, 0], before[:, 1], config.beta, smoothing=noise, lengths=lengths,
            normalise=config.length_normalised, sft_weight=config.sft_weight, totals=totals,
        )  # fmt: skip
        (out.loss * float(turn.counts)).backward()  # type: ignore[no-untyped-call]
        if turn.counts:
            sums["loss"] += out.loss.item()
            for name in ("accuracy", "margin", "chosen", "rejected"):
                sums[name] += getattr(out, name).item() * len(turn.batch) / totals.pairs
    learner.parallel.reduce_gradients(learner.parameters)
    return {name: learner.parallel.sum(value) for name, value in sums.items()} | {"tokens": int(batch.lengths.sum())}


def _margins(sums: Tensor, reference: Tensor, config: DPOConfig) -> Tensor:
    """Implicit reward of each pair's chosen reply less that of the rejected one: (pairs,)."""
    return config.beta * ((sums - reference) @ torch.tensor([1.0, -1.0]))


def _evaluate(learner: Learner, batch: Batch, reference: Tensor, config: DPOConfig) -> Tensor:
    """Log loss (sigmoid, with the labels' noise), accuracy and margin of the held-out pairs, if any; their margins."""
    sums = _sums(learner, batch)
    if batch.paths:
        out = losses.dpo(
            sums[:, 0], sums[:, 1], reference[:, 0], reference[:, 1], config.beta, smoothing=batch.noise,
            lengths=batch.lengths, normalise=config.length_normalised,
        )  # fmt: skip
        learner.evaluated(out.loss.item(), evaluation_accuracy=out.accuracy.item(), evaluation_margin=out.margin.item())
    return _margins(sums, reference, config)
