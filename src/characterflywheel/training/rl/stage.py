"""Online RL: GRPO on near-policy prompts, with importance correction for the sampler (PAPER section 4).

Single-turn: the prompt is a fixed partial conversation from fresh traffic, only the reply is optimised. Rollouts come
from a bfloat16 copy of the weights that are trained, sampling and training share the prompt's pass, and the sampler's
own log-probabilities are kept, so that the difference between the two is corrected and reported.
"""

import random
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ... import tables
from ...config import RLConfig
from ...errors import FlywheelError
from ...ids import derive_seed
from ...llm.base import Sampling
from ...llm.chat_format import ChatFormat
from ...llm.native import NativeModel, fast_dtype, load_model
from ...llm.shared_prefix import Path as TokenPath
from ...llm.shared_prefix import reply_logprobs
from ...pipeline import Work, write_atomically
from ...progress import Advance
from ...records import Candidate, ChatMessage, Prompt, Record, Rollout
from ...safety.policy import SafetyPolicy
from .. import policy_gradient
from ..learner import Learner, micro_batches
from ..sft import write_metrics


class Scorer(Protocol):
    """The pointwise reward model."""

    def score(
        self, prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]]
    ) -> list[list[float]]: ...


class RLSummary(Record):
    """Rewards at the start and the end, and how far the policy moved.

    `entropy` (of the last step that learnt) and `effective_share` (mean over those steps) are None if no step did,
    since all groups had equal rewards.
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

    def line(self) -> str:
        share = "unknown, as all rewards were equal" if self.effective_share is None else f"{self.effective_share:.0%}"
        return (
            f"{self.steps} steps, {self.rollouts} rollouts, reward {self.first_reward:+.2f} to "
            f"{self.last_reward:+.2f}, {self.first_words:.0f} to {self.last_words:.0f} words, "
            f"effective samples {share}"
        )


class Group(NamedTuple):
    """The replies to one prompt, as the sampler drew them, with rewards and advantages (group,)."""

    paths: list[TokenPath]
    sampler: Tensor
    rewards: Tensor
    advantage: Tensor
    texts: list[str]


class Learnt(NamedTuple):
    """What a step logs, and its policy's own log-probabilities of each rollout, None of one that taught nothing."""

    metrics: dict[str, float]
    logprobs: list[list[float] | None]


def choose_prompts(
    prompts: Sequence[Prompt], scored: Sequence[Candidate], count: int, ordinary_share: float, seed: int
) -> list[Prompt]:
    """Prompts to learn from: those whose candidates' scores vary most, and a floor of ordinary ones.

    `scored` are rejection sampling's candidates; a prompt without two scores counts as ordinary.
    """
    scores: dict[str, list[float]] = {}
    for candidate in scored:
        if candidate.score is not None:
            scores.setdefault(candidate.prompt_id, []).append(candidate.score)
    fresh = sorted((p for p in prompts if p.split == "train"), key=lambda p: p.id)
    varied = [p for p in fresh if len(scores.get(p.id, ())) > 1]
    varied.sort(key=lambda p: (-statistics.variance(scores[p.id]), p.id))
    picked = varied[: round(count * (1 - ordinary_share))]
    rest = [p for p in fresh if p not in picked]
    picked += random.Random(seed).sample(rest, min(len(rest), count - len(picked)))
    random.Random(derive_seed(seed, "order")).shuffle(picked)
    return picked


def train_rl(
    work: Work, config: RLConfig, parent: Path, prompts: Sequence[Prompt], scorer: Scorer, safety: SafetyPolicy, *,
    threads: int, batch_replies: int, device: str = "cpu", on_progress: Advance = lambda done, total: None,
) -> RLSummary:  # fmt: skip
    """Run `config.steps` GRPO steps; writes `model/`, `metrics.jsonl` and `rollouts.parquet` (Rollout).

    Prompts are taken in order, from the front again when they run out. A reply that safety refuses as the answer to its
    prompt gets its group's lowest reward. Each step samples, scores, and makes one update; with one update a step the
    clipped ratio is 1 and only the importance weights act, but the loss holds for more.

    Raises:
        FlywheelError: no prompt, a reward that is not finite, or a diverged gradient.
    """
    if not prompts:
        raise FlywheelError("no prompt to learn from: reinforcement learning needs prompts of the training split.")
    learner = Learner(
        parent, learning_rate=config.learning_rate, steps=config.steps, max_prompt_tokens=config.max_prompt_tokens,
        threads=threads, device=device, train_layers=config.train_layers, partial=work.partial,
    )  # fmt: skip
    reference = load_model(parent, fast_dtype(device), device)[0] if config.kl_weight else None
    policy = load_model(parent, fast_dtype(device), device)[0]
    sampler = NativeModel(
        policy, learner.tokenizer, "rl", max_prompt_tokens=config.max_prompt_tokens, threads=threads,
        batch_replies=batch_replies,
    )  # fmt: skip
    for step in learner.remaining_steps():
        _push_weights(learner.model, policy)
        start = step * config.prompts_per_step
        batch = [prompts[(start + i) % len(prompts)] for i in range(config.prompts_per_step)]
        draw = partial(_roll_out, sampler, scorer, safety, batch, config, step + 1, derive_seed(work.seed, step))
        rollouts = work.resumed(f"drawn-{step + 1:06d}", Rollout, draw)  # a killed run draws none twice
        groups = _groups(rollouts, batch, sampler.format, config.group)
        learnt = _learn(learner, groups, config, reference)
        _keep(work, step + 1, rollouts, learnt.logprobs)
        learner.update(**learnt.metrics)
        on_progress(step + 1, config.steps)
    learner.save(work.folder / "model")
    write_metrics(work.folder, learner)
    every = (tables.read_jsonl(work.partial / f"learnt-{s + 1:06d}.jsonl", Rollout) for s in range(config.steps))
    tables.write(work.folder / "rollouts.parquet", Rollout, chain.from_iterable(every))
    return _summary(learner.log, config)


def _keep(work: Work, step: int, rollouts: Sequence[Rollout], logprobs: Sequence[Sequence[float] | None]) -> None:
    """Put a step's rollouts aside until the stage is complete, before its update can be in a checkpoint."""
    rows = [
        rollout.model_copy(update={"learner_logprobs": None if logs is None else tuple(logs)})
        for rollout, logs in zip(rollouts, logprobs, strict=True)
    ]
    write_atomically(work.partial / f"learnt-{step:06d}.jsonl", "".join(r.model_dump_json() + "\n" for r in rows))


def _roll_out(
    sampler: NativeModel, scorer: Scorer, safety: SafetyPolicy, batch: Sequence[Prompt], config: RLConfig, step: int,
    seed: int,
) -> list[Rollout]:  # fmt: skip
    """`config.group` replies to each prompt of the batch, in its order."""
    sampling = Sampling(temperature=config.temperature, max_tokens=config.max_tokens)
    drawn = sampler.sample(
        [sampler.format.prompt(p.messages) for p in batch], n=config.group, sampling=sampling,
        seeds=[derive_seed(seed, p.id, i) for i, p in enumerate(batch)],
    )  # fmt: skip
    texts = [[sampler.format.decode(ids).strip() for ids, _ in group] for group in drawn]
    scores = torch.tensor(scorer.score([p.messages for p in batch], texts))
    if not scores.isfinite().all():
        raise FlywheelError("the reward model gave a score that is not finite: look at its training before going on.")
    unsafe = torch.tensor(
        [
            [not safety.check_answer(p.messages, text).allowed for text in group]
            for p, group in zip(batch, texts, strict=True)
        ]
    )
    rewards = torch.where(unsafe, scores.min(1, keepdim=True).values, scores)
    return [
        Rollout(
            step=step, prompt_id=prompt.id, text=text, token_ids=tuple(ids), logprobs=tuple(logs), score=score,
            reward=reward,
        )
        for prompt, *groups in zip(batch, texts, drawn, scores.tolist(), rewards.tolist(), strict=True)
        for text, (ids, logs), score, reward in zip(*groups, strict=True)
    ]  # fmt: skip


def _groups(rollouts: Sequence[Rollout], batch: Sequence[Prompt], form: ChatFormat, size: int) -> list[Group]:
    rewards = torch.tensor([r.reward for r in rollouts]).view(len(batch), size)
    segments = [form.prompt(p.messages) for p in batch]
    return [
        Group(
            paths=[(*prompt, r.token_ids) for r in rollouts[size * i : size * (i + 1)]],
            sampler=torch.tensor([value for r in rollouts[size * i : size * (i + 1)] for value in r.logprobs]),
            rewards=rewards[i], advantage=advantage,
            texts=[r.text for r in rollouts[size * i : size * (i + 1)]],
        )
        for i, (prompt, advantage) in enumerate(zip(segments, policy_gradient.advantages(rewards), strict=True))
    ]  # fmt: skip


def _learn(learner: Learner, rollouts: Sequence[Group], config: RLConfig, reference: Any | None) -> Learnt:
    """Accumulate the gradient of one step over all rollouts.

    Groups of equal rewards have no gradient (unless a KL term is on) and are left out of the pass; a step with no
    other group has nothing to say of loss, entropy or weights.
    """
    live = [r for r in rollouts if bool(r.advantage.abs().max() > 0) or reference is not None]
    total = sum(len(path[-1]) for r in live for path in r.paths)
    sums = {"loss": 0.0, "entropy": 0.0, "kl": 0.0}
    health: list[policy_gradient.Health] = []
    own: dict[int, list[list[float]]] = {}
    for group in micro_batches([(r, r.paths) for r in live]):
        paths = [path for _, several in group for path in several]
        with learner.autocast():
            now = reply_logprobs(learner.model, paths, temperature=config.temperature, device=learner.device)
        values = iter(now.logprobs.tolist())
        own |= {id(r): [[next(values) for _ in path[-1]] for path in several] for r, several in group}
        sampler = torch.cat([r.sampler for r, _ in group]).to(learner.device)
        advantage = torch.cat([r.advantage for r, _ in group]).to(learner.device)
        anchor = None
        if reference is not None:
            with torch.no_grad():
                anchor = reply_logprobs(
                    reference, paths, temperature=config.temperature, device=learner.device
                ).logprobs
        before = now.logprobs.detach()
        ratio = policy_gradient.importance(before, sampler, now.path, len(paths), truncate=config.truncate_ratio)
        out = policy_gradient.grpo(
            now.logprobs, before, ratio.weights, advantage, now.path, clip_low=config.clip_low,
            clip_high=config.clip_high, total=total, reference=anchor, kl_weight=config.kl_weight,
        )  # fmt: skip
        out.loss.backward()  # type: ignore[no-untyped-call]
        health.append(ratio.health)
        sums["loss"] += out.loss.item()
        sums["entropy"] += now.entropy.sum().item() / total
        sums["kl"] += 0.0 if out.kl is None else out.kl.item()
    if not live:
        for parameter in learner.parameters:
            parameter.grad = torch.zeros_like(parameter)
    rewards = torch.stack([r.rewards for r in rollouts])
    words = [len(text.split()) for r in rollouts for text in r.texts]
    metrics = {
        **(sums | _weights(policy_gradient.merge(health)) if live else {}),
        "reward": rewards.mean().item(),
        "reward_deviation": rewards.std(1).mean().item(),
        "words": sum(words) / len(words),
        "equal_groups": float(len(rollouts) - sum(bool(r.advantage.abs().max() > 0) for r in rollouts)),
        "tokens": float(sum(len(path[-1]) for r in rollouts for path in r.paths)),
        "trained_tokens": float(total),
    }
    return Learnt(metrics, [logs for r in rollouts for logs in own.get(id(r), [None] * len(r.paths))])


def _weights(health: policy_gradient.Health) -> dict[str, float]:
    return {"weight_mean": health.mean, "weight_max": health.maximum, "effective_share": health.effective_share}


@torch.no_grad()
def _push_weights(trained: Any, policy: Any) -> None:
    """Copy the trained weights into the sampler's, rounding to its precision."""
    for source, target in zip(trained.parameters(), policy.parameters(), strict=True):
        target.copy_(source)


def _summary(log: Sequence[Mapping[str, float]], config: RLConfig) -> RLSummary:
    first, last = log[0], log[-1]
    learnt = [row for row in log if "entropy" in row]
    return RLSummary(
        steps=len(log),
        prompts=config.prompts_per_step * len(log),
        rollouts=config.prompts_per_step * config.group * len(log),
        trained_tokens=int(sum(row["trained_tokens"] for row in log)),
        sampled_tokens=int(sum(row["tokens"] for row in log)),
        first_reward=first["reward"],
        last_reward=last["reward"],
        first_words=first["words"],
        last_words=last["words"],
        entropy=learnt[-1]["entropy"] if learnt else None,
        effective_share=sum(row["effective_share"] for row in learnt) / len(learnt) if learnt else None,
        equal_groups=int(sum(row["equal_groups"] for row in log)),
    )
