"""Supervised fine-tuning on the mixture; only replies are learnt, by default the last one (PAPER section 4).

A share of users is held out, and the loss on their examples is measured before, during and after. Where it no longer
falls, training can stop early and go back to the best weights.
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import intervals
from ..config import SFTConfig
from ..errors import FlywheelError
from ..ids import derive_seed
from ..llm.shared_prefix import reply_logprobs
from ..pipeline import Work
from ..progress import Advance
from ..records import Estimate, Example, ExampleSource, Record
from ..safety.policy import SafetyPolicy
from . import losses, sources
from .batching import plan, share_prefixes
from .learner import Learner, save_atomically, write_metrics
from .mixture import SourceShare, blend, distinct_of, draws, write
from .parallel import Parallel
from .paths import Lesson, check_room, of_examples, open_format
from .sources import Lost, Reserved


class SourceLoss(Record):
    """Loss in nats a reply token on a source's held-out examples, before and after; intervals are by user."""

    source: str
    examples: int
    before: Estimate
    after: Estimate


class TrainingSummary(Record):
    """What a training stage did: steps, what it learnt from, its loss at the start and the end.

    `steps` were taken of `planned_steps`; the weights are those after `kept_step`, which is earlier after an early
    stop. `evaluation` is of all sources together ("all") and of each; without it, `not_evaluated` says why.
    `cut_replies` of the examples that were drawn were longer than `max_reply_tokens` and learnt up to it; of
    `too_long` examples, learnt or held out, a turn did not fit the window.
    """

    steps: int
    examples: int
    trained_tokens: int
    first_loss: float
    last_loss: float
    sources: tuple[SourceShare, ...] = ()
    duplicates: int = 0
    planned_steps: int = 0
    kept_step: int = 0
    evaluation: tuple[SourceLoss, ...] = ()
    not_evaluated: str | None = None
    cut_replies: int = 0
    too_long: int = 0

    def line(self) -> str:
        said = f"{self.steps} steps on {self.examples} examples, loss {self.first_loss:.3f} to {self.last_loss:.3f}"
        if self.evaluation:
            every = self.evaluation[0]
            said += f"; held out {every.before.value:.3f} to {every.after.value:.3f} (n = {every.examples})"
        return said if self.steps == self.planned_steps else f"{said}; stopped early of {self.planned_steps}"


def train_sft(
    work: Work, config: SFTConfig, parent: Path, examples: Sequence[Example], *, threads: int, device: str = "cpu",
    reserved: Reserved = Reserved(), safety: SafetyPolicy = SafetyPolicy(), parallel: Parallel | None = None,
    gradient_checkpointing: bool = False, on_progress: Advance = lambda done, total: None,
) -> TrainingSummary:  # fmt: skip
    """Fine-tune the model folder `parent` on these examples and those of `config.extra`.

    Nothing is learnt of what is `reserved`, of files' replies that `safety` refuses, and of held-out users. Writes
    `model/`, `metrics.jsonl`, and what the model is trained on (`mixture.write`).

    Raises:
        FlywheelError: nothing is left to learn from, an example is beyond the model's context, or the loss diverged.
    """
    parallel = parallel or Parallel.alone()
    offered = sources.offer(config, examples, reserved, safety)
    distinct = distinct_of(offered.examples, config.near_duplicates, config.weights, config.max_examples)
    drawn = [e for e in distinct.kept if draws(e.source, config.weights, config.max_examples)]
    idle = [e for e in distinct.kept if not draws(e.source, config.weights, config.max_examples)]
    split = hold_out(drawn, config.evaluation_share, config.evaluation_examples, work.seed)
    seen = of_examples(open_format(parent, config.max_prompt_tokens), drawn, config.learn, config.max_reply_tokens)
    check_room(parent, "sft", seen.lessons.values())
    unread = {row.id: row for row in reversed(seen.dropped) if row.id not in seen.lessons}
    refused = [*offered.refused, *distinct.lost, *(Lost(e.source, unread[e.id]) for e in drawn if e.id in unread)]
    refused += [Lost.of(e, "held_out") for e in split.held if e.id not in unread]
    mixture = blend(
        config.model_copy(update={"near_duplicates": None}),  # they are gone
        [e for e in split.learnt if e.id in seen.lessons] + idle, work.seed, refused=refused,
        tokens=lambda example: seen.lessons[example.id].tokens,
    )  # fmt: skip
    also = [row for row in seen.dropped if row is not unread.get(row.id)]
    if not mixture.examples:
        dropped = Counter(row.reason for row in (*mixture.dropped, *also))
        raise FlywheelError(
            f"no example to learn from: {len(examples)} offered, dropped {dict(dropped)}, weights "
            f"{dict(config.weights)}: lower what is held out or reserved, or give sources a weight."
        )
    batches = [
        [seen.lessons[example.id] for example in mixture.examples[i : i + config.examples_per_step]]
        for i in range(0, len(mixture.examples), config.examples_per_step)
    ]
    held = HeldOut([e for e in split.held if e.id in seen.lessons], seen.lessons, config.micro_batch_tokens)
    learner = Learner(
        parent, learning_rate=config.learning_rate, steps=len(batches), warmup_share=config.warmup_share,
        max_prompt_tokens=config.max_prompt_tokens, threads=threads, device=device, train_layers=config.train_layers,
        lora_rank=config.lora_rank, gradient_checkpointing=gradient_checkpointing, max_loss=config.max_loss,
        partial=work.partial, parallel=parallel,
    )  # fmt: skip
    before = _before(work, learner, held, config.patience is not None)
    after = _learn(learner, batches, held, config, on_progress)
    kept = learner.return_to_best()
    if after is None or kept != learner.step:
        after = held.losses(learner)
    learner.save(work.folder / "model")
    write_metrics(work.folder, learner)
    if parallel.main:
        write(work.folder, config, work.seed, mixture, also)
    steps = [row["loss"] for row in learner.log]
    edge = max(1, math.ceil(len(steps) / 5))
    twice = sum(row.reason in ("duplicate", "near_duplicate") for row in mixture.dropped)
    return TrainingSummary(
        steps=len(steps), planned_steps=len(batches), kept_step=kept, examples=len(mixture.examples),
        trained_tokens=int(sum(row["tokens"] for row in learner.log)),
        first_loss=sum(steps[:edge]) / edge, last_loss=sum(steps[-edge:]) / edge, sources=mixture.sources,
        duplicates=twice, evaluation=held.compare(before, after),
        not_evaluated=None if held.examples else _why_not(config.evaluation_share, split),
        cut_replies=sum(seen.lessons[name].cut for name in {e.id for e in mixture.examples}),
        too_long=len({row.id for row in seen.dropped if row.reason == "longer_than_window"}),
    )  # fmt: skip


def _learn(
    learner: Learner, batches: Sequence[Sequence[Lesson]], held: "HeldOut", config: SFTConfig, on_progress: Advance
) -> list[Tensor] | None:
    """Take the steps, with an evaluation every so many and after the last; the last one's losses, if any was made."""
    patience, each = config.patience, None
    for step in learner.remaining_steps():
        if patience and learner.evaluations_since_best() >= patience:
            break
        learner.update(**accumulate(learner, batches[step], config.micro_batch_tokens))
        if (config.evaluate_every and (step + 1) % config.evaluate_every == 0) or step + 1 == len(batches):
            each = held.evaluate(learner, keep_best=patience is not None)
        on_progress(step + 1, len(batches))
    return each


def accumulate(learner: Learner, lessons: Sequence[Lesson], limit: int) -> dict[str, float]:
    """Add the gradient of one step's mean loss over all reply tokens, in micro-batches; the step's `loss`, `tokens`."""
    paths = share_prefixes([path for lesson in lessons for path in lesson.paths])
    total = sum(len(path[-1]) for path in paths)
    parts = [torch.zeros((), device=learner.device)]
    for turn in learner.parallel.turns(plan([[path] for path in paths], limit)):
        with learner.autocast():
            logprobs = reply_logprobs(learner.model, [paths[i] for i in turn.batch], device=learner.device).logprobs
        loss = losses.sft(logprobs, total) * float(turn.counts)
        loss.backward()  # type: ignore[no-untyped-call]
        parts.append(loss.detach())
    learner.parallel.reduce_gradients(learner.parameters)
    return {"loss": learner.parallel.sum(torch.stack(parts).sum().item()), "tokens": total}


class Split(NamedTuple):
    """Examples to learn from, and those of held-out users."""

    learnt: list[Example]
    held: list[Example]


def hold_out(examples: Sequence[Example], share: float, most: int, seed: int) -> Split:
    """Set `share` of each source's users aside, drawn by the seed: at least one, and at least one stays to learn from.

    A user is the source's that most of their examples are of, and is held out with all of them; who wrote an example
    that names no user counts as another user each. Users are taken from the source with the fewest examples held out
    so far, and none more once there are `most` examples, so that no source crowds out the others. `examples` are
    distinct: what is learnt must not be held out under another name.
    """
    owned: dict[str, list[Example]] = {}
    for example in sorted(examples, key=lambda e: e.id):
        owned.setdefault(_who(example), []).append(example)
    users: dict[ExampleSource, list[str]] = {}
    for who in sorted(owned, key=lambda who: (derive_seed(seed, "held out", who), who)):
        of = Counter(e.source for e in owned[who])
        users.setdefault(min(of, key=lambda source: (-of[source], source)), []).append(who)
    wanted = {
        source: theirs[: min(len(theirs) - 1, max(1, round(share * len(theirs)))) if share else 0]
        for source, theirs in sorted(users.items())
    }
    held: dict[str, list[Example]] = {}
    counts = Counter[ExampleSource]()
    while counts.total() < most and (left := [source for source, theirs in wanted.items() if theirs]):
        source = min(left, key=lambda source: counts[source])
        who = wanted[source].pop(0)
        held[who] = owned[who]
        counts[source] += len(owned[who])
    aside = sorted((e for theirs in held.values() for e in theirs), key=lambda e: e.id)
    return Split([e for e in examples if _who(e) not in held], aside)


def _who(example: Example) -> str:
    return example.user_id or example.id


def _why_not(share: float, split: Split) -> str:
    if not share:
        return "evaluation_share is 0"
    return f"no example of {len(split.held)} held out fits the window" if split.held else "no source has two users"


class HeldOut:
    """Examples of held-out users, packed once for every evaluation."""

    def __init__(self, examples: Sequence[Example], lessons: dict[str, Lesson], limit: int) -> None:
        self.examples = examples
        owned = [(place, path) for place, example in enumerate(examples) for path in lessons[example.id].paths]
        self._owner = [place for place, _ in owned]
        self._paths = share_prefixes([path for _, path in owned])
        self._batches = plan([[path] for path in self._paths], limit)

    @torch.no_grad()
    def losses(self, learner: Learner) -> list[Tensor]:
        """The negative log-likelihood of every reply token, example by example."""
        found: list[tuple[int, Tensor]] = []
        for turn in learner.parallel.turns(self._batches):
            with learner.autocast():
                paths = [self._paths[i] for i in turn.batch]
                logs = reply_logprobs(learner.model, paths, device=learner.device).logprobs.cpu()
            if turn.counts:
                found += zip(turn.batch, torch.split(-logs, [len(path[-1]) for path in paths]), strict=True)
        each: list[list[Tensor]] = [[] for _ in self.examples]
        for path, values in sorted(learner.parallel.gather(found), key=lambda pair: pair[0]):
            each[self._owner[path]].append(values)
        return [torch.cat(values) for values in each]

    def evaluate(self, learner: Learner, *, keep_best: bool) -> list[Tensor]:
        """Log the loss now, all together and by source."""
        each = self.losses(learner)
        if each:
            by_source = {f"evaluation_loss_{name}": float(self._joined(each, name).mean()) for name in self._sources}
            learner.evaluated(float(torch.cat(each).mean()), keep_best=keep_best, **by_source)
        return each

    def compare(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[SourceLoss, ...]:
        """Both losses by source, the first row of all together."""
        return tuple(
            SourceLoss(
                source=source or "all", examples=sum(source in (None, e.source) for e in self.examples),
                before=self._estimate(before, source), after=self._estimate(after, source),
            )
            for source in ((None, *self._sources) if self.examples else ())
        )  # fmt: skip

    @property
    def _sources(self) -> list[str]:
        return sorted({example.source for example in self.examples})

    def _joined(self, each: Sequence[Tensor], source: str | None) -> Tensor:
        return torch.cat([v for v, e in zip(each, self.examples, strict=True) if source in (None, e.source)])

    def _estimate(self, each: Sequence[Tensor], source: str | None) -> Estimate:
        rows = zip(each, self.examples, strict=True)
        users = [_who(e) for values, e in rows if source in (None, e.source) for _ in range(len(values))]
        return intervals.mean(self._joined(each, source).double().numpy(), users)


def _before(work: Work, learner: Learner, held: HeldOut, keep_best: bool) -> list[Tensor]:
    """The held-out losses of the parent, kept for a run that resumes."""
    file = work.partial / "before.pt"
    if learner.step:
        return list(torch.load(file, weights_only=True))
    each = held.evaluate(learner, keep_best=keep_best)
    if learner.parallel.main:
        save_atomically(each, file)
    return each
