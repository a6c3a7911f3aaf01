"""One step's updates from its rollouts: GRPO, or online DPO on the best and worst of each group (PAPER section 4).

A group of equal rewards teaches nothing and is left out (GRPO with a KL term keeps it, for the pull to the start).
What is left is cut into mini-batches, one for each optimiser step, and these into micro-batches that share prefixes.
Losses are sums over totals of the mini-batch, so that any cut and any number of processes gives the same gradient.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...config import RLConfig
from ...errors import FlywheelError
from ...ids import derive_seed
from ...llm.shared_prefix import Path as TokenPath
from ...llm.shared_prefix import ReplyTokens, Segment, reply_logprobs
from ...records import Rollout
from .. import losses, policy_gradient
from ..batching import plan
from ..learner import Learner
from ..parallel import Parallel
from .timing import Stopwatch

Logs = dict[int, Tensor]
"""Log-probabilities of a reply's tokens, (tokens,) on the CPU, by the rollout's number within its step."""


class Lesson(NamedTuple):
    """What one prompt teaches: its replies by their number within the step, their token paths, and for each reply the
    sampler's log-probabilities (tokens,) and the advantage (replies,). Online DPO: two replies, the better first."""

    numbers: tuple[int, ...]
    paths: list[TokenPath]
    sampler: list[Tensor]
    advantage: Tensor


class Lessons(NamedTuple):
    """A step's lessons, the advantage of each of its rollouts (GRPO), and how many of its groups taught nothing."""

    lessons: list[Lesson]
    advantage: list[float] | None
    equal_groups: int


class Update(NamedTuple):
    """What one mini-batch was like, over all processes, before its optimiser step.

    `own`: the learner's log-probabilities. `kl` needs a reference; `margin` and `accuracy` are online DPO's.
    """

    loss: float
    tokens: int
    health: policy_gradient.Health
    own: Logs
    clipped_share: float | None = None
    kl: float | None = None
    margin: float | None = None
    accuracy: float | None = None

    def metrics(self) -> dict[str, float]:
        """What is logged; what was not measured is left out."""
        told = {
            "loss": self.loss, "kl": self.kl, "clipped_share": self.clipped_share,
            "margin": self.margin, "accuracy": self.accuracy, "weight_mean": self.health.mean,
            "weight_max": self.health.maximum, "effective_share": self.health.effective_share,
            "masked_share": self.health.masked_share, "exploded": float(self.health.exploded),
            "trained_tokens": float(self.tokens),
        }  # fmt: skip
        return {name: value for name, value in told.items() if value is not None}


def whole_groups(rollouts: Sequence[Rollout], prompts: Sequence[tuple[Segment, Segment]]) -> list[Lesson]:
    """Every rollout, by its prompt; the rollouts lie prompt by prompt, as many to each."""
    size = len(rollouts) // len(prompts)
    numbers = [tuple(range(i * size, (i + 1) * size)) for i in range(len(prompts))]
    return [
        Lesson(
            mine, [(*prompt, rollouts[i].token_ids) for i in mine],
            [torch.tensor(rollouts[i].logprobs) for i in mine], torch.zeros(size),
        )
        for mine, prompt in zip(numbers, prompts, strict=True)
    ]  # fmt: skip


def teach(rollouts: Sequence[Rollout], prompts: Sequence[tuple[Segment, Segment]], config: RLConfig) -> Lessons:
    """The lessons of a step: `config.group` rollouts to each of the tokenised `prompts`, in their order."""
    rewards = torch.tensor([r.reward for r in rollouts]).view(len(prompts), config.group)
    groups = whole_groups(rollouts, prompts)
    if config.algorithm == "online_dpo":
        pairs = policy_gradient.best_against_worst(rewards, config.min_gap)
        found = [_only(group, pair) for group, pair in zip(groups, pairs, strict=True) if pair is not None]
        return Lessons(found, None, len(groups) - len(found))
    advantage = policy_gradient.advantages(rewards, scale=config.advantage_scale)
    groups = [group._replace(advantage=row) for group, row in zip(groups, advantage, strict=True)]
    teaching = [group for group in groups if bool(group.advantage.abs().max() > 0)]
    found = groups if config.kl_weight else teaching
    return Lessons(found, advantage.flatten().tolist(), len(groups) - len(teaching))


def left_out(
    rollouts: Sequence[Rollout], prompts: Sequence[tuple[Segment, Segment]], lessons: Sequence[Lesson]
) -> list[Lesson]:
    """The replies that no lesson has, by their prompt."""
    taught = {number for lesson in lessons for number in lesson.numbers}
    rest = [(g, [i for i, n in enumerate(g.numbers) if n not in taught]) for g in whole_groups(rollouts, prompts)]
    return [_only(group, places) for group, places in rest if places]


def _only(group: Lesson, these: Sequence[int]) -> Lesson:
    return Lesson(
        tuple(group.numbers[i] for i in these), [group.paths[i] for i in these], [group.sampler[i] for i in these],
        group.advantage[list(these)],
    )  # fmt: skip


def mini_batches(lessons: Sequence[Lesson], config: RLConfig, seed: int) -> list[list[Lesson]]:
    """The lessons of each optimiser step of a step, `config.updates` of them; some are empty if lessons are few.

    Each epoch takes the same mini-batches, the first in order, later ones shuffled.
    """
    parts, size = config.updates_per_step, len(lessons)
    cut = [list(lessons[size * i // parts : size * (i + 1) // parts]) for i in range(parts)]
    out = list(cut)
    for epoch in range(1, config.epochs):
        again = list(cut)
        random.Random(derive_seed(seed, "epoch", epoch)).shuffle(again)
        out += again
    return out


@torch.no_grad()
def read(
    model: Any, lessons: Sequence[Lesson], config: RLConfig, parallel: Parallel, *, device: str,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Logs:  # fmt: skip
    """The log-probabilities of all replies of the lessons under a model as it is now, on every process."""
    found: list[tuple[int, Tensor]] = []
    for turn in parallel.turns(plan([lesson.paths for lesson in lessons], config.micro_batch_tokens)):
        batch = [lessons[i] for i in turn.batch]
        with autocast():
            tokens = reply_logprobs(model, _paths(batch), temperature=config.temperature, device=device)
        found += _by_number(batch, tokens).items() if turn.counts else ()
    return dict(parallel.gather(found))


def accumulate(
    learner: Learner, lessons: Sequence[Lesson], config: RLConfig, parallel: Parallel, clock: Stopwatch, *,
    before: Logs, reference: Logs | None,
) -> Update:  # fmt: skip
    """Add the gradient of one mini-batch, summed over processes; takes no optimiser step. Needs at least one lesson.

    `before`: log-probabilities when the step began, of replies that an update has touched since; for others they are
    those of now. `reference`: the start's, for the KL term or online DPO.

    Raises:
        FlywheelError: the loss is not finite, the policy moved too far within the step, or more than
            `max_exploded_share` of the tokens have no sane ratio to the sampler.
    """
    total = policy_gradient.denominator(
        [len(path[-1]) for lesson in lessons for path in lesson.paths], config.aggregation, config.max_tokens
    )
    tokens = sum(len(path[-1]) for lesson in lessons for path in lesson.paths)
    sums: dict[str, float] = {}
    health: list[policy_gradient.Health] = []
    own: list[tuple[int, Tensor]] = []
    for turn in parallel.turns(plan([lesson.paths for lesson in lessons], config.micro_batch_tokens)):
        batch = [lessons[i] for i in turn.batch]
        with clock("forward"):
            with learner.autocast():
                now = reply_logprobs(
                    learner.model, _paths(batch), temperature=config.temperature, device=learner.device
                )
            mine = _by_number(batch, now)
            start = torch.cat([before.get(number, logs) for number, logs in mine.items()]).to(learner.device)
            anchor = None if reference is None else torch.cat([reference[number] for number in mine]).to(learner.device)
            sampler = torch.cat([logs for lesson in batch for logs in lesson.sampler])
            with _named(learner):
                ratio = policy_gradient.importance(
                    start, sampler, now.path, len(mine), level=config.importance_level, truncate=config.truncate_ratio,
                    token_low=config.token_low, token_high=config.token_high, sequence_low=config.sequence_low,
                    sequence_high=config.sequence_high,
                )  # fmt: skip
                loss, told = (  # online DPO's gradient is of pairs, whoever drew them: it only counts what is not sane
                    _online_dpo(now, anchor, len(mine), len(lessons), config)
                    if config.algorithm == "online_dpo"
                    else _grpo(now, start, ratio.weights, batch, anchor, total, tokens, config)
                )
            value = loss.item()
        if not turn.counts:
            loss = loss * 0.0
        with clock("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        if turn.counts:
            health.append(ratio.health)
            own += mine.items()
            for name, part in {"loss": value, **told}.items():
                sums[name] = sums.get(name, 0.0) + part
    with clock("update"):
        parallel.reduce_gradients(learner.parameters)
    # processes without a micro-batch of their own have no sums, but take part in adding them up
    names = ("loss", *(("margin", "accuracy") if config.algorithm == "online_dpo" else ("clipped_share",)))
    names += ("kl",) if config.algorithm == "grpo" and reference is not None else ()
    update = Update(
        tokens=tokens, health=policy_gradient.merge(parallel.gather(health)), own=dict(parallel.gather(own)),
        **{name: parallel.sum(sums.get(name, 0.0)) for name in names},
    )  # fmt: skip
    if update.health.exploded_share > config.max_exploded_share:
        raise FlywheelError(
            f"step {learner.step + 1} of {learner.steps}: {update.health.exploded_share:.1%} of {tokens} tokens have "
            f"no sane ratio between learner and sampler, at most {config.max_exploded_share:.1%} may: the sampler has "
            "other weights than the learner, or one of them diverged; look at rl.sampler and the learning rate."
        )
    return update


@contextmanager
def _named(learner: Learner) -> Iterator[None]:
    """Say of an error at which step it was."""
    try:
        yield
    except FlywheelError as error:
        raise FlywheelError(f"step {learner.step + 1} of {learner.steps}: {error}") from error


def _grpo(
    now: ReplyTokens, before: Tensor, weights: Tensor, batch: Sequence[Lesson], reference: Tensor | None, total: int,
    tokens: int, config: RLConfig,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    advantage = torch.cat([lesson.advantage for lesson in batch])
    out = policy_gradient.grpo(
        now.logprobs, before, weights, advantage, now.path, clip_low=config.clip_low, clip_high=config.clip_high,
        total=total, aggregation=config.aggregation, ratio_max=config.ratio_max, reference=reference,
        kl_weight=config.kl_weight,
    )  # fmt: skip
    told = {"clipped_share": out.clipped_share.item() * len(now.path) / tokens}
    return out.loss, told if out.kl is None else told | {"kl": out.kl.item()}


def _online_dpo(
    now: ReplyTokens, reference: Tensor | None, replies: int, pairs: int, config: RLConfig
) -> tuple[Tensor, dict[str, float]]:
    assert reference is not None, "online DPO has a reference"
    chosen, rejected = losses.per_reply(now.logprobs, now.path, replies).view(-1, 2).unbind(1)
    was_chosen, was_rejected = losses.per_reply(reference, now.path, replies).view(-1, 2).unbind(1)
    totals = losses.Totals(pairs, 0)  # no SFT term, so no chosen tokens are counted
    out = losses.dpo(chosen, rejected, was_chosen, was_rejected, config.beta, totals=totals)
    share = len(chosen) / pairs
    return out.loss, {"margin": out.margin.item() * share, "accuracy": out.accuracy.item() * share}


def _paths(batch: Sequence[Lesson]) -> list[TokenPath]:
    return [path for lesson in batch for path in lesson.paths]


def _by_number(batch: Sequence[Lesson], tokens: ReplyTokens) -> Logs:
    """Each reply's own log-probabilities, without gradient."""
    numbers = [number for lesson in batch for number in lesson.numbers]
    lengths = [len(path[-1]) for path in _paths(batch)]
    return dict(zip(numbers, torch.split(tokens.logprobs.detach().cpu(), lengths), strict=True))
