"""Online RL: GRPO or online DPO on near-policy prompts, with importance correction for any sampler (PAPER section 4).

A step draws replies with the weights that it begins with, scores them, and makes `updates_per_step` x `epochs` updates
from them. Every few steps it is looked at whether the policy has gone too far (`watch`). Everything that took sampling
or scoring is kept when it is made (`rollouts`), everything an update depends on is in the learner's checkpoint, so a
run that was killed anywhere goes on and ends in the same bytes.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ... import tables
from ...config import RLConfig
from ...errors import FlywheelError
from ...llm.native import load_model
from ...pipeline import Work
from ...progress import Advance
from ...records import Dropped, Prompt, Record, Rollout
from ...safety.policy import SafetyPolicy
from ..adapters import adapted
from ..learner import Learner
from ..parallel import Parallel
from ..sizes import check_context
from . import watch
from .rewards import Scorer, Terms
from .rollouts import Rollouts, Shelf, fitting
from .samplers import open_sampler
from .step import Run, Stop, end_run, end_step, take_update, weights_of
from .timing import Stopwatch

__all__ = ["RLSummary", "Scorer", "Stop", "train_rl"]


class RLSummary(Record):
    """Rewards at the start and the end, how far the policy moved, and what rang.

    The model is that after the last update; where training stopped it is the one that drew step `stopped.kept_step`'s
    replies. `last_reward`, `last_words`, `entropy` (None: the sampler gave no number) are of the last step that the
    kept weights drew, `watched` (empty: no look was at them, or none was asked for) of the look at them,
    `effective_share` of the steps that they learnt from (None: all groups had equal rewards). What was spent on
    learning counts in full: `steps`, distinct `prompts`, `rollouts`, tokens, `equal_groups`, `skipped_updates` (nothing
    to learn from), `exploded_tokens` (no sane ratio between learner and sampler: masked), `stale_rollouts` (drawn by
    older weights than the learner's). `dropped` prompts did not fit the window. `alarms` are those of all looks.
    """

    steps: int
    prompts: int
    rollouts: int
    trained_tokens: int
    sampled_tokens: int
    first_reward: float
    last_reward: float
    first_words: float
    last_words: float
    entropy: float | None
    effective_share: float | None
    equal_groups: int
    skipped_updates: int = 0
    exploded_tokens: int = 0
    stale_rollouts: int = 0
    dropped: int = 0
    alarms: tuple[watch.Alarm, ...] = ()
    watched: tuple[watch.Watched, ...] = ()
    stopped: Stop | None = None

    def kept(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Those that the kept weights or their forerunners drew; what a stop threw away is left out."""
        return [r for r in rollouts if r.step <= (self.stopped.kept_step if self.stopped else self.steps)]

    def line(self) -> str:
        share = "unknown, as all rewards were equal" if self.effective_share is None else f"{self.effective_share:.0%}"
        rang = (
            f", {len(self.alarms)} alarms ({', '.join(sorted({a.kind for a in self.alarms}))})" if self.alarms else ""
        )
        ended = (
            f"; {self.stopped.when(self.steps)}: {self.stopped.why}; the model kept has learnt from "
            f"{self.stopped.kept_step - 1} of them"
            if self.stopped
            else ""
        )
        return (
            f"{self.steps} steps, {self.rollouts} rollouts, reward {self.first_reward:+.2f} to "
            f"{self.last_reward:+.2f}, {self.first_words:.0f} to {self.last_words:.0f} words, "
            f"effective samples {share}{rang}{ended}"
        )


def train_rl(
    work: Work, config: RLConfig, parent: Path, prompts: Sequence[Prompt], scorer: Scorer, safety: SafetyPolicy, *,
    threads: int, batch_replies: int, device: str = "cpu", gold: Scorer | None = None,
    parallel: Parallel | None = None, gradient_checkpointing: bool = False,
    on_progress: Advance = lambda done, total: None,
) -> RLSummary:  # fmt: skip
    """Run `config.steps` steps. Writes `model/`, `metrics.jsonl` (a line a step, and one of what the last made),
    `rollouts.parquet` (Rollout), `looks.parquet` (watch.Look), `alarms.jsonl` (watch.Alarm), `dropped.parquet`
    (Dropped) and `timing.jsonl`.

    Prompts are taken in order, from the front again when they run out. A reply that safety refuses as the answer to its
    prompt gets less than any that it allows. A step, or a mini-batch of one, with nothing to learn from takes no
    optimiser step: AdamW's momentum would move the weights without a gradient. `gold` judges what is looked at.

    Raises:
        FlywheelError: no prompt fits, a reward is not finite, or the learner diverged.
        RewardGone, SamplerGone: what was drawn is kept, and a rerun goes on from there.
    """
    parallel = parallel or Parallel.alone()
    learner = Learner(
        parent, learning_rate=config.learning_rate, steps=config.steps * config.updates,
        max_prompt_tokens=config.max_prompt_tokens, threads=threads, device=device, train_layers=config.train_layers,
        lora_rank=config.lora_rank, gradient_checkpointing=gradient_checkpointing, partial=work.partial,
        parallel=parallel,
    )  # fmt: skip
    kept, dropped = fitting(prompts, learner.format)
    _check_room(config, learner, len(prompts), len(kept))
    sampler = open_sampler(
        config, parent, learner.tokenizer, scratch=work.partial / "sampler", threads=threads,
        batch_replies=batch_replies, device=device, parallel=parallel,
    )  # fmt: skip
    terms = Terms(scorer, safety, config.terms)
    rollouts = Rollouts(config, kept, sampler, terms, Shelf(work, parallel), Stopwatch(device), work.seed)
    stop = None
    try:
        run = _begin(work, config, parent, learner, rollouts, gold)
        for number in learner.remaining_steps():
            step, update = number // config.updates + 1, number % config.updates
            take_update(run, step, update)
            if update + 1 < config.updates:
                continue
            stop = end_step(run, step)
            on_progress(step, config.steps)
            if stop:
                break
        else:
            stop = end_run(run)
    finally:
        sampler.close()
    return _finish(run, parent, dropped, stop)


def _check_room(config: RLConfig, learner: Learner, prompts: int, kept: int) -> None:
    if not kept:
        raise FlywheelError(
            f"no prompt to learn from: none of {prompts} has room in rl.max_prompt_tokens == "
            f"{config.max_prompt_tokens}; reinforcement learning needs prompts of the training split."
        )
    check_context(config, learner.model.config.max_position_embeddings)


def _begin(
    work: Work, config: RLConfig, parent: Path, learner: Learner, rollouts: Rollouts, gold: Scorer | None
) -> Run:
    """Load the reference; before the first step, draw the start's replies that looks compare with."""
    run = Run(work, config, learner, rollouts, _start_weights(parent, learner) if config.anchored else None, gold, {})
    asked = {prompt.id: prompt for step in run.looked(run.end) for prompt in rollouts.batch(step)}
    if asked:
        run.start.update(rollouts.start(list(asked.values()), gold))
    return run


def _start_weights(parent: Path, learner: Learner) -> Any:
    if adapted(learner.model):
        return learner.model
    if not learner.parallel.sharded:
        return load_model(parent, torch.float32, learner.device)[0].requires_grad_(False)
    from ..sharding import load_sharded  # noqa: PLC0415 - distributed modules take seconds, and one process has none

    return load_sharded(parent, learner.parallel, learner.device, lambda model: model.requires_grad_(False))


def _finish(run: Run, parent: Path, dropped: Sequence[Dropped], stop: Stop | None) -> RLSummary:
    """Write the model and what was logged."""
    until = stop.step if stop else run.end
    folder, steps = run.work.folder, range(1, min(until, run.config.steps) + 1)
    if stop is None:
        run.learner.save(folder / "model")
    log = [json.loads(run.file("metrics", step).read_text("utf-8")) for step in steps]
    looked = run.looked(until)
    alarms = watch.onsets(
        [run.shelf.read(f"alarms-{step:06d}", watch.Alarm) for step in looked], run.config.alarms.window
    )
    last = stop.kept_step if stop else run.end
    watched = run.shelf.read(f"watched-{last:06d}", watch.Watched) if last in looked else []
    if run.parallel.main:
        if stop is not None:
            kept = weights_of(run, stop.kept_step)
            if kept.exists():
                shutil.copytree(kept, folder, dirs_exist_ok=True)  # adapters lie beside the model
            else:
                shutil.copytree(parent, folder / "model")
        told = [*steps, run.end] if run.end in looked else steps
        for name in ("metrics", "timing"):
            lines = "".join(run.file(name, step).read_text("utf-8") for step in told)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        rows = chain.from_iterable(run.shelf.read(f"learnt-{step:06d}", Rollout) for step in steps)
        tables.write(folder / "rollouts.parquet", Rollout, rows)
        looks = chain.from_iterable(run.shelf.read(f"looks-{step:06d}", watch.Look) for step in looked)
        tables.write(folder / "looks.parquet", watch.Look, looks)
        tables.write_jsonl(folder / "alarms.jsonl", alarms)
        tables.write(folder / "dropped.parquet", Dropped, dropped)
    run.parallel.barrier()
    return _summary(log, run, stop).model_copy(
        update={"alarms": tuple(alarms), "watched": tuple(watched), "dropped": len(dropped)}
    )


def _summary(log: Sequence[Mapping[str, float]], run: Run, stop: Stop | None) -> RLSummary:
    """From a line of the log for each step that was taken."""
    first, last = log[0], log[stop.kept_step - 1 if stop else -1]
    learnt = [row for row in log[: stop.kept_step - 1 if stop else None] if "effective_share" in row]
    rollouts = run.config.prompts_per_step * run.config.group
    return RLSummary(
        steps=len(log),
        prompts=len({prompt.id for step in range(1, len(log) + 1) for prompt in run.rollouts.batch(step)}),
        rollouts=rollouts * len(log),
        trained_tokens=int(sum(row["trained_tokens"] for row in log)),
        sampled_tokens=int(sum(row["tokens"] for row in log)),
        first_reward=first["reward"],
        last_reward=last["reward"],
        first_words=first["words"],
        last_words=last["words"],
        entropy=last.get("entropy"),
        effective_share=sum(row["effective_share"] for row in learnt) / len(learnt) if learnt else None,
        equal_groups=int(sum(row["equal_groups"] for row in log)),
        skipped_updates=int(sum(row["skipped"] for row in log)),
        exploded_tokens=int(sum(row.get("exploded", 0.0) for row in log)),
        stale_rollouts=round(sum(row["stale_share"] for row in log) * rollouts),
        stopped=stop,
    )
