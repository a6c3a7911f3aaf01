"""One step of RL: its updates, its line in the log, and the look at whether the policy has gone too far.

See `stage` for the loop around it, `learn` for the update's gradient and `watch` for what a look measures.
"""

import json
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...config import RLConfig
from ...errors import FlywheelError, RewardGone, SamplerGone
from ...ids import derive_seed
from ...pipeline import Work, write_atomically
from ...records import Prompt, Record, Rollout
from ...reward.overoptimisation.rollouts import divergence
from ...style.monitor import Difference
from ..learner import Learner
from ..parallel import Parallel
from . import watch
from .learn import Lesson, Lessons, Logs, accumulate, left_out, mini_batches, read, teach, whole_groups
from .rewards import Scorer, scored
from .rollouts import Rollouts, Shelf, StartReply


class Stop(Record):
    """Why training ended early, or threw its end away where `step` is the one after the last. The model that was kept
    drew step `kept_step`'s replies: it has learnt from `kept_step` - 1 steps."""

    step: int
    kept_step: int
    why: str

    def when(self, steps: int) -> str:
        """In words, of a run that took so many steps."""
        return f"stopped at step {self.step}" if self.step <= steps else f"went back after {steps} steps"


@dataclass(frozen=True)
class Run:
    """All that a step needs. `start`: the start's replies by prompt, to those that will be looked at.

    `reference`: the start's weights in float32, None where nothing asks for them; the learner's own model where it
    trains adapters, which are then put aside.
    """

    work: Work
    config: RLConfig
    learner: Learner
    rollouts: Rollouts
    reference: Any | None
    gold: Scorer | None
    start: dict[str, list[StartReply]]

    @property
    def shelf(self) -> Shelf:
        return self.rollouts.shelf

    @property
    def parallel(self) -> Parallel:
        return self.rollouts.shelf.parallel

    def looks_at(self, step: int) -> bool:
        return watch.looks_at(step, self.config.steps, self.config.alarms.every)

    def file(self, name: str, step: int) -> Path:
        return self.work.partial / f"{name}-{step:06d}.json"

    @property
    def end(self) -> int:
        """The number after the last step: of the replies that the final weights draw, to be looked at."""
        return self.config.steps + 1

    def looked(self, until: int) -> list[int]:
        """The steps up to `until` that are looked at."""
        return [step for step in range(1, until + 1) if self.looks_at(step)]

    def under_reference(self, lessons: Sequence[Lesson]) -> Logs:
        """By the same products as the learner's, so that rounding cancels where both are one."""
        with self.rollouts.clock("reference"), without_adapters(self.reference):
            return read(
                self.reference, lessons, self.config, self.parallel, device=self.learner.device,
                autocast=self.learner.autocast,
            )  # fmt: skip


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """The model as it was before adapters were attached, if any are.

    Only their sum is left out. PEFT's `enable_adapters` also takes their gradient away, and FSDP would keep that for
    good, since it makes a parameter out of its shards once.
    """
    layers = [part for part in model.modules() if hasattr(part, "get_delta_weight")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def take_update(run: Run, step: int, number: int) -> None:
    """The update `number` (from 0) of a step: its rollouts, their gradient, the optimiser's step."""
    config, learner, clock = run.config, run.learner, run.rollouts.clock
    rollouts = _rollouts(run, step)
    found, parts, rest = _lessons(run, step, rollouts)
    part = parts[number]
    if number == 0:
        before: Logs = {}
        for later in (*parts[1 : config.updates_per_step], rest):
            with clock("forward"):
                before |= read(
                    learner.model, later, config, run.parallel, device=learner.device, autocast=learner.autocast
                )
    else:
        before = {i: torch.tensor(r.learner_logprobs) for i, r in enumerate(rollouts) if r.learner_logprobs is not None}
    if part:
        anchored = config.kl_weight > 0 or config.algorithm == "online_dpo"
        reference = run.under_reference(part) if anchored else None
        update = accumulate(learner, part, config, run.parallel, clock, before=before, reference=reference)
        own, metrics = update.own, update.metrics()
    else:
        own, metrics = Logs(), {"trained_tokens": 0.0}
    if number == 0:
        run.rollouts.learnt(step, rollouts, before | own, found.advantage)
        if run.looks_at(step) and config.alarms.stop:
            learner.save(weights_of(run, step) / "model")
    with clock("update"):
        take = learner.update if part else partial(skip_update, learner)
        take(**metrics, equal_groups=float(found.equal_groups))


def _lessons(
    run: Run, step: int, rollouts: Sequence[Rollout]
) -> tuple[Lessons, list[list[Lesson]], list[Lesson]]:  # fmt: skip
    """What a step teaches, cut into its updates; and, where it is looked at, the replies that teach nothing."""
    prompts = [run.learner.format.prompt(p.messages) for p in run.rollouts.batch(step)]
    found = teach(rollouts, prompts, run.config)
    parts = mini_batches(found.lessons, run.config, derive_seed(run.work.seed, "updates", step))
    return found, parts, left_out(rollouts, prompts, found.lessons) if run.looks_at(step) else []


def _rollouts(run: Run, step: int) -> list[Rollout]:
    def push() -> None:
        if run.learner.step:  # the sampler begins with the start's weights
            run.rollouts.sampler.push(run.learner.model, version=run.learner.step)

    try:
        return run.rollouts.of(step, push)
    except (RewardGone, SamplerGone):
        if not run.parallel.sharded:  # others may not have failed, and shards are written by all together
            run.learner.save_checkpoint()
        raise


def end_step(run: Run, step: int) -> Stop | None:
    """Log a step that has made all of its updates, look at it if it is its turn, and say whether to stop."""
    rollouts = run.shelf.read(f"learnt-{step:06d}", Rollout)
    updates = run.learner.log[(step - 1) * run.config.updates : step * run.config.updates]
    return _log(run, step, rollouts, combined(updates))


def end_run(run: Run) -> Stop | None:
    """Look at what the last step made, by replies that the final weights draw; say whether to go back."""
    if not run.looks_at(run.end):
        return None
    rollouts = _rollouts(run, run.end)
    with run.rollouts.clock("look"):
        own = read(
            run.learner.model, _groups(run, run.end, rollouts), run.config, run.parallel, device=run.learner.device,
            autocast=run.learner.autocast,
        )  # fmt: skip
    return _log(run, run.end, run.rollouts.learnt(run.end, rollouts, own, None), {})


def _groups(run: Run, step: int, rollouts: Sequence[Rollout]) -> list[Lesson]:
    return whole_groups(rollouts, [run.learner.format.prompt(p.messages) for p in run.rollouts.batch(step)])


def _log(run: Run, step: int, rollouts: Sequence[Rollout], learnt: Mapping[str, float]) -> Stop | None:
    metrics = {"step": step} | run.rollouts.metrics(rollouts) | dict(learnt)
    stop = None
    if run.looks_at(step):
        with run.rollouts.clock("look"):
            seen = _look(run, step, rollouts, [*_entropies(run, step), metrics.get("entropy")])
        metrics |= seen.metrics()
        rang = watch.alarms(seen, run.config.alarms)
        run.shelf.put(f"alarms-{step:06d}", rang)
        run.shelf.put(f"watched-{step:06d}", watch.watched(seen, run.config.alarms))
        stop = _stop(run, step, rang)
    if run.parallel.main:
        write_atomically(run.file("metrics", step), json.dumps(metrics) + "\n")
        write_atomically(run.file("timing", step), json.dumps({"step": step} | run.rollouts.clock.lap()) + "\n")
    run.parallel.barrier()
    return stop


def _look(run: Run, step: int, rollouts: Sequence[Rollout], entropies: Sequence[float | None]) -> watch.Seen:
    """Set the step's rollouts against the start's replies to the same prompts."""
    config, size = run.config, run.config.group
    batch = run.rollouts.batch(step)
    groups = [rollouts[i : i + size] for i in range(0, len(rollouts), size)]

    def make() -> list[watch.Look]:
        kl = _divergences(run, step, rollouts)
        mine = run.parallel.share(list(range(len(batch))))
        golds = None
        if run.gold is not None:
            asked, texts = [batch[i] for i in mine], [[r.text for r in groups[i]] for i in mine]
            golds = scored(run.gold, asked, texts, "gold model")
        looks = []
        for place, i in enumerate(mine):
            start = run.start[batch[i].id]
            looks.append(
                watch.look(
                    step, batch[i], kl[i * size : (i + 1) * size], [r.score for r in groups[i]],
                    [one.score for one in start], golds[place] if golds is not None else None,
                    [one.gold for one in start if one.gold is not None] if golds is not None else None,
                )
            )  # fmt: skip
        return looks

    run.shelf.kept(f"looks-{step:06d}", watch.Look, make)
    looks = [one for each in run.looked(step) for one in run.shelf.read(f"looks-{each:06d}", watch.Look)]
    drift = _drift(run, run.looked(step)[-config.alarms.window :])
    return watch.see(looks, entropies, drift, config.alarms.window, len(run.looked(run.end)))


def _divergences(run: Run, step: int, rollouts: Sequence[Rollout]) -> list[float]:
    """Each reply's sum of log(policy / start) over its tokens, nats; the policy is the learner when the step began.

    Their mean, over replies that the sampler drew, is KL(policy || start) where the sampler is the policy, and differs
    by KL(sampler || policy) where its precision or age is another. Both models read all replies, in the same
    batches, so that what teaches makes no difference and rounding cancels.
    """
    if step == run.end:
        together = [_groups(run, step, rollouts)]
    else:
        _, parts, rest = _lessons(run, step, rollouts)
        together = [*parts[: run.config.updates_per_step], rest]
    under: Logs = {}
    for lessons in together:
        under |= run.under_reference(lessons)
    own = [r.learner_logprobs or () for r in rollouts]  # all were read, as the step is looked at
    found = [divergence(logs, under[i].tolist()).plain for i, logs in enumerate(own)]
    if not all(map(math.isfinite, found)):
        raise FlywheelError(
            f"step {step} has a KL to the start that is not finite: it diverged; lower the learning rate."
        )
    return found


def _drift(run: Run, window: Sequence[int]) -> list[Difference]:
    """Style of the start and of the policy in some steps, by as many replies to each prompt.

    Of rare features the side with more replies would show some where the other, by chance, shows none: it is of equal
    numbers that a difference falls to either side alike where nothing has drifted.
    """
    each, size = min(run.config.alarms.start_replies, run.config.group), run.config.group
    asked, start, policy = dict[str, Prompt](), list[tuple[str, str]](), list[tuple[str, str]]()
    for step in window:
        rollouts = run.shelf.read(f"learnt-{step:06d}", Rollout)
        for i, prompt in enumerate(run.rollouts.batch(step)):
            policy += [(prompt.id, r.text) for r in rollouts[i * size : i * size + each]]
            if prompt.id not in asked:
                asked[prompt.id] = prompt
                start += [(prompt.id, reply.text) for reply in run.start[prompt.id][:each]]
    return watch.style_drift(asked, start, policy, f"steps {window[0]} to {window[-1]}")


def _stop(run: Run, step: int, rang: Sequence[watch.Alarm]) -> Stop | None:
    """Whether an alarm ends training; if none does, the weights that drew this step are the last known to be good."""
    ends = [one for one in rang if one.action == "stop"]
    before = [each for each in run.looked(step - 1) if weights_of(run, each).exists()]
    if not ends:
        if run.parallel.main:
            for each in before:
                shutil.rmtree(weights_of(run, each))
        return None
    return Stop(step=step, kept_step=max(before, default=1), why="; ".join(one.says for one in ends))


def weights_of(run: Run, step: int) -> Path:
    """Where the weights that drew a step's replies are kept, while it may be that they are the last good ones."""
    return run.work.partial / f"weights-{step:06d}"


def _entropies(run: Run, step: int) -> list[float | None]:
    """Of the steps before."""
    return [json.loads(run.file("metrics", each).read_text("utf-8")).get("entropy") for each in range(1, step)]


def combined(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The log of a step's updates in one: means of those that learnt, maxima and sums where that is what they are."""
    learnt = [row for row in updates if "loss" in row]
    out = {"learning_rate": updates[-1]["learning_rate"], "equal_groups": updates[0]["equal_groups"]}
    for name in dict.fromkeys(name for row in learnt for name in row if name not in (*out, "step")):
        values = [row[name] for row in learnt]
        out[name] = max(values) if name == "weight_max" else math.fsum(values)
        if name not in ("weight_max", "trained_tokens", "exploded"):
            out[name] /= len(values)
    return out | {"trained_tokens": out.get("trained_tokens", 0.0), "skipped": float(len(updates) - len(learnt))}


def skip_update(learner: Learner, **metrics: float) -> None:
    """Count an optimiser step that had nothing to learn from. Weights and AdamW's state stay as they are: its momentum
    would move weights without a gradient. The schedule goes on."""
    rate = float(learner.schedule.get_last_lr()[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)  # as it is meant here
        learner.schedule.step()
    learner.step += 1
    learner.log.append({"step": learner.step, "learning_rate": rate, **metrics})
