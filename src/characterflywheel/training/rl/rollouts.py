"""The replies that RL learns from: drawn, scored and kept step by step, so that a killed run draws none twice.

Single-turn: the prompt is a fixed partial conversation from fresh traffic, only the reply is optimised (PAPER section
4). A step's replies are kept once when drawn, again with their rewards, and again with what the learner thought of them
when the step began; whatever ends a run, the next one goes on from the last of these. Several processes draw and
score a share of the prompts each; the main one writes, all read.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from ... import tables
from ...config import RLConfig
from ...ids import derive_seed
from ...llm.base import Completion, Sampling
from ...llm.chat_format import ChatFormat
from ...pipeline import Work, release_memory, write_atomically
from ...records import Dropped, Prompt, Record, Rollout
from ...style.monitor import MIN_PROMPTS
from ..parallel import Parallel
from ..paths import in_window
from .learn import Logs
from .rewards import Scorer, Terms, TermScores, scored
from .sampler import RolloutSampler
from .timing import Stopwatch

R = TypeVar("R", bound=BaseModel)


class DrawnReply(Record):
    """A reply as the sampler drew it; `finish` says whether it ended by itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    prompt_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Literal["stop", "length"]
    version: int


class StartReply(Record):
    """A reply of RL's start to a prompt that will be looked at, for the policy's replies to be compared with."""

    prompt_id: str
    text: str
    score: float
    gold: float | None = None


@dataclass(frozen=True)
class Shelf:
    """Rows kept between a kill and the next run, by name; for several processes as for one."""

    work: Work
    parallel: Parallel

    def path(self, name: str) -> Path:
        return self.work.partial / f"{name}.jsonl"

    def has(self, name: str) -> bool:
        return self.parallel.agree(self.path(name).exists())

    def read(self, name: str, record: type[R]) -> list[R]:
        return list(tables.read_jsonl(self.path(name), record))

    def put(self, name: str, rows: Iterable[BaseModel]) -> None:
        """Written by the main process from rows that all have."""
        if self.parallel.main:
            write_atomically(self.path(name), "".join(row.model_dump_json() + "\n" for row in rows))
        self.parallel.barrier()

    def kept(self, name: str, record: type[R], make: Callable[[], list[R]]) -> list[R]:
        """What an earlier run left, else what each process makes of its share, in order."""
        if not self.has(name):
            rows: list[R] = self.parallel.gather(make())
            self.put(name, rows)
        return self.read(name, record)

    def drop(self, *names: str) -> None:
        if self.parallel.main:
            for name in names:
                self.path(name).unlink(missing_ok=True)


@dataclass
class Rollouts:
    """Whoever draws and scores: sampler, reward terms, prompts, and where it is kept."""

    config: RLConfig
    prompts: Sequence[Prompt]
    sampler: RolloutSampler
    terms: Terms
    shelf: Shelf
    clock: Stopwatch
    seed: int

    def batch(self, step: int) -> list[Prompt]:
        """The prompts of a step (from 1), in order, from the front again when they run out.

        After the last step they are asked for the sake of a look alone, which needs as many as style can be told by.
        """
        count, first = self.config.prompts_per_step, (step - 1) * self.config.prompts_per_step
        if step > self.config.steps:
            count = min(len(self.prompts), max(count, MIN_PROMPTS))
        return [self.prompts[(first + i) % len(self.prompts)] for i in range(count)]

    def of(self, step: int, push: Callable[[], None]) -> list[Rollout]:
        """The step's rollouts, prompt by prompt. `push` brings the learner's weights to the sampler, if they draw."""
        learnt, scored, drawn = (f"{name}-{step:06d}" for name in ("learnt", "scored", "drawn"))
        if self.shelf.has(learnt):  # what it adds is replaced by the same
            return self.shelf.read(learnt, Rollout)
        batch = self.batch(step)

        def draw() -> list[DrawnReply]:
            with self.clock("push"):
                push()
            return self._draw(batch, self.config.group, derive_seed(self.seed, step - 1))

        replies = self.shelf.kept(drawn, DrawnReply, draw)
        self.sampler.rest()  # whoever draws next has learnt from these, and pushes
        rollouts = self.shelf.kept(scored, Rollout, lambda: self._score(step, batch, replies))
        release_memory()  # or what drawing and scoring left sits under what learning holds
        return rollouts

    def learnt(
        self, step: int, rollouts: Sequence[Rollout], before: Logs, advantage: Sequence[float] | None
    ) -> list[Rollout]:
        """Keep what the learner thought of each rollout when the step began. Called before the step's first update."""
        rows = [
            rollout.model_copy(
                update={
                    "learner_logprobs": tuple(before[i].tolist()) if i in before else None,
                    "advantage": advantage[i] if advantage is not None else None,
                }
            )
            for i, rollout in enumerate(rollouts)
        ]
        self.shelf.put(f"learnt-{step:06d}", rows)
        self.shelf.drop(f"scored-{step:06d}", f"drawn-{step:06d}")
        return rows

    def start(self, prompts: Sequence[Prompt], gold: Scorer | None) -> dict[str, list[StartReply]]:
        """The start's replies to prompts, drawn before the first step, while the sampler has the start's weights."""
        each = self.config.alarms.start_replies

        def score() -> list[StartReply]:
            mine, texts = self._mine(prompts, drawn, each)
            golds: Sequence[Sequence[float | None]] = [[None] * len(several) for several in texts]
            with self.clock("scoring"):
                scores = scored(self.terms.scorer, mine, texts)
                if gold is not None:
                    golds = scored(gold, mine, texts, "gold model")
            return [
                StartReply(prompt_id=prompt.id, text=text, score=score, gold=true)
                for prompt, *groups in zip(mine, texts, scores, golds, strict=True)
                for text, score, true in zip(*groups, strict=True)
            ]

        drawn = self.shelf.kept(
            "start-drawn", DrawnReply, lambda: self._draw(prompts, each, derive_seed(self.seed, "start"))
        )
        found: dict[str, list[StartReply]] = {}
        for reply in self.shelf.kept("start-scored", StartReply, score):
            found.setdefault(reply.prompt_id, []).append(reply)
        return found

    def metrics(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Means over a step's rollouts, every term of the reward apart.

        `entropy`, nats, is minus the mean log-probability of all tokens drawn, under what drew them: a Monte Carlo
        estimate that is unbiased and blind to nothing, where groups that teach would leave out those that collapsed.
        It is left out where an engine reported no number at all. `stale_share` of the rollouts was drawn by weights
        older than the learner's.
        """
        size = self.config.group
        groups = [[_terms(r) for r in rollouts[i : i + size]] for i in range(0, len(rollouts), size)]
        rewards = [r.reward for r in rollouts]
        deviations = [_deviation([one.reward for one in group]) for group in groups]
        logs = [value for r in rollouts for value in r.logprobs if math.isfinite(value)]
        entropy = {"entropy": -math.fsum(logs) / len(logs)} if logs else {}
        return {
            "reward": sum(rewards) / len(rewards), "reward_deviation": sum(deviations) / len(deviations),
            "words": sum(len(r.text.split()) for r in rollouts) / len(rollouts),
            "tokens": float(sum(len(r.token_ids) for r in rollouts)), **entropy,
            "stale_share": sum(self._stale(r) for r in rollouts) / len(rollouts), **self.terms.metrics(groups),
        }  # fmt: skip

    def _stale(self, rollout: Rollout) -> bool:
        """Whether fewer updates are behind what drew it than the learner had made."""
        return rollout.version is not None and rollout.version < (rollout.step - 1) * self.config.updates

    def _draw(self, prompts: Sequence[Prompt], n: int, seed: int) -> list[DrawnReply]:
        """This process's share of `n` replies to each prompt."""
        form = self.sampler.format
        sampling = Sampling(temperature=self.config.temperature, max_tokens=self.config.max_tokens)
        mine = self.shelf.parallel.share([(p, derive_seed(seed, p.id, i)) for i, p in enumerate(prompts)])
        with self.clock("sampling"):
            drawn = self.sampler.sample(
                [form.prompt(p.messages) for p, _ in mine], n=n, sampling=sampling, seeds=[s for _, s in mine]
            )
        return [
            _reply(prompt, form.completion(ids, logs, self.sampler.ends), version)
            for (prompt, _), replies, versions in zip(mine, drawn, self.sampler.versions, strict=True)
            for (ids, logs), version in zip(replies, versions, strict=True)
        ]

    def _score(self, step: int, prompts: Sequence[Prompt], drawn: Sequence[DrawnReply]) -> list[Rollout]:
        """This process's share of the rewards."""
        size = self.config.group
        mine, texts = self._mine(prompts, drawn, size)
        replies = self.shelf.parallel.share([drawn[i : i + size] for i in range(0, len(drawn), size)])
        with self.clock("scoring"):
            judged = self.terms.judge(mine, texts, [[one.finish for one in several] for several in replies])
        return [
            Rollout(
                step=step, prompt_id=one.prompt_id, text=one.text, token_ids=one.token_ids, logprobs=one.logprobs,
                score=told.score, reward=told.reward, length=told.length, repetition=told.repetition,
                style=told.style, features=told.features, vetoed=told.vetoed, cut_off=told.cut_off,
                version=one.version,
            )
            for several, terms in zip(replies, judged, strict=True)
            for one, told in zip(several, terms, strict=True)
        ]  # fmt: skip

    def _mine(
        self, prompts: Sequence[Prompt], drawn: Sequence[DrawnReply], size: int
    ) -> tuple[list[Prompt], list[list[str]]]:
        """This process's share of the prompts, and the texts of their replies."""
        texts = [[one.text for one in drawn[i : i + size]] for i in range(0, len(drawn), size)]
        share = self.shelf.parallel.share
        return share(prompts), share(texts)


def fitting(prompts: Sequence[Prompt], form: ChatFormat) -> tuple[list[Prompt], list[Dropped]]:
    """The prompts that fit the window once their oldest turns are cut off, and those that cannot.

    One that would lose its character, or the beginning of the very message that it asks an answer to, is dropped, as
    in SFT and DPO; one long card stops no run.
    """
    kept, dropped = list[Prompt](), list[Dropped]()
    for prompt in prompts:
        shown = in_window(form, prompt.messages)
        if isinstance(shown, str):
            dropped.append(Dropped(id=prompt.id, stage="rl", reason="too_long", detail=shown, prompt_id=prompt.id))
        else:
            kept.append(prompt)
    return kept, dropped


def _reply(prompt: Prompt, drawn: Completion, version: int) -> DrawnReply:
    return DrawnReply(
        prompt_id=prompt.id, text=drawn.text, token_ids=drawn.token_ids, logprobs=drawn.logprobs,
        finish=drawn.finish_reason, version=version,
    )  # fmt: skip


def _terms(rollout: Rollout) -> TermScores:
    """The terms of a kept rollout."""
    return TermScores(
        rollout.score, rollout.length or 0.0, rollout.repetition or 0.0, rollout.style or 0.0, rollout.features,
        rollout.vetoed, bool(rollout.cut_off), rollout.reward,
    )  # fmt: skip


def _deviation(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
