"""Rejection sampling: candidates from a pool for fresh prompts, the best kept when good enough (PAPER section 4)."""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

from .. import tables
from ..config import RejectionConfig
from ..errors import FlywheelError
from ..ids import derive_id, derive_seed
from ..llm.base import ChatModel, Sampling
from ..pipeline import Work
from ..progress import Advance
from ..records import Candidate, ChatMessage, Dropped, Example, Prompt, Record, Scored, SignalKind
from ..safety.policy import SafetyPolicy

PROMPTS_A_CHUNK = 32


class Judge(Protocol):
    """The composite score of reward models: preference first, reliable signals as auxiliaries, safety as a veto."""

    def judge(
        self, prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]], safety: SafetyPolicy
    ) -> list[list[Scored]]: ...


class RejectionSummary(Record):
    """How many candidates of which policy were kept, and what their scores were."""

    prompts: int
    candidates: int
    accepted: int
    accepted_by_policy: dict[str, int]
    threshold: float
    mean_score: float
    accepted_mean_score: float
    sampled_tokens: int
    reasons: dict[str, int]

    def line(self) -> str:
        pool = ", ".join(f"{policy} {n}" for policy, n in self.accepted_by_policy.items())
        return (
            f"{self.accepted} of {self.candidates} replies to {self.prompts} prompts accepted ({pool}); "
            f"mean score {self.mean_score:+.2f}, of the accepted {self.accepted_mean_score:+.2f}"
        )


class Drawn(Record):
    """A candidate with its length, as kept between a kill and the next run."""

    candidate: Candidate
    tokens: int


class CandidateScore(Record):
    """Why a candidate was chosen or not: the parts of its score (see `Scored`) and what became of it."""

    id: str
    prompt_id: str
    policy: str
    score: float
    preference: float
    signals: dict[SignalKind, float]
    vetoed: str | None
    accepted: bool


def reject(
    work: Work,
    config: RejectionConfig,
    prompts: Sequence[Prompt],
    pool: Mapping[str, ChatModel],
    judge: Judge,
    safety: SafetyPolicy,
    on_progress: Advance = lambda done, total: None,
) -> RejectionSummary:
    """Best of n with a threshold over prompts; a reply that is unsafe, empty, cut off or repeated is never accepted.

    The threshold is the score that `config.accept_share` of the prompts' best replies reach, so hard prompts
    without a good reply teach nothing. Writes `accepted.parquet`, `rejected.parquet` (Candidate with score),
    `scores.parquet` (CandidateScore, every candidate's parts), `examples.parquet` (Example) and `dropped.parquet`.

    Raises:
        FlywheelError: no prompt is for training, or a score is not finite.
    """
    fresh = [p for p in prompts if p.split == "train"]
    if not fresh:
        raise FlywheelError(f"none of {len(prompts)} prompts is for training: more traffic is needed.")
    chosen = sorted(fresh, key=lambda p: p.id)
    random.Random(work.seed).shuffle(chosen)
    chosen = chosen[: config.prompts]
    sampling = Sampling(temperature=config.temperature, max_tokens=config.max_tokens)
    shares = [config.candidates // len(pool) + (i < config.candidates % len(pool)) for i in range(len(pool))]
    drawn: list[Drawn] = []
    for start in range(0, len(chosen), PROMPTS_A_CHUNK):
        chunk = chosen[start : start + PROMPTS_A_CHUNK]
        for (policy, model), n in zip(pool.items(), shares, strict=True):
            draw = partial(_draw, model, policy, chunk, n, sampling, work.seed)
            drawn += work.resumed(f"{policy}-{start:06d}", Drawn, draw)
        on_progress(start + len(chunk), len(chosen))
    by_prompt = {p.id: [d.candidate for d in drawn if d.candidate.prompt_id == p.id] for p in chosen}
    texts = [[c.text for c in by_prompt[p.id]] for p in chosen]
    judged = judge.judge([p.messages for p in chosen], texts, safety)
    if not all(math.isfinite(one.score) for several in judged for one in several):
        raise FlywheelError(
            "the reward models gave a score that is not finite: look at their training before going on."
        )
    parts = {c.id: one for p, several in zip(chosen, judged, strict=True)
             for c, one in zip(by_prompt[p.id], several, strict=True)}  # fmt: skip
    scored = {
        p: [c.model_copy(update={"score": parts[c.id].score}) for c in several] for p, several in by_prompt.items()
    }
    dropped: list[Dropped] = []
    ranked = {p.id: _rank(scored[p.id], parts, dropped) for p in chosen}
    best = sorted((rows[0].score or 0.0 for rows in ranked.values() if rows), reverse=True)
    threshold = best[min(len(best), max(1, round(config.accept_share * len(chosen)))) - 1] if best else 0.0
    accepted: list[tuple[Prompt, Candidate]] = []
    for prompt in chosen:
        top = ranked[prompt.id][: config.accept_per_prompt]
        accepted += [(prompt, c) for c in top if c.score is not None and c.score >= threshold]
    ids = {c.id for _, c in accepted}
    rejected = [c for p in chosen for c in scored[p.id] if c.id not in ids]
    tables.write(work.folder / "accepted.parquet", Candidate, [c for _, c in accepted])
    tables.write(work.folder / "rejected.parquet", Candidate, rejected)
    told = [_told(c, parts[c.id], c.id in ids) for p in chosen for c in scored[p.id]]
    tables.write(work.folder / "scores.parquet", CandidateScore, told)
    tables.write(work.folder / "examples.parquet", Example, [_example(p, c) for p, c in accepted])
    tables.write(work.folder / "dropped.parquet", Dropped, dropped)
    every = [c.score or 0.0 for rows in scored.values() for c in rows]
    return RejectionSummary(
        prompts=len(chosen),
        candidates=len(every),
        accepted=len(accepted),
        accepted_by_policy=dict(sorted(Counter(c.policy for _, c in accepted).items())),
        threshold=threshold,
        mean_score=sum(every) / len(every),
        accepted_mean_score=sum(c.score or 0.0 for _, c in accepted) / max(1, len(accepted)),
        sampled_tokens=sum(d.tokens for d in drawn),
        reasons=dict(sorted(Counter(d.reason for d in dropped).items())),
    )


def _draw(
    model: ChatModel, policy: str, prompts: Sequence[Prompt], n: int, sampling: Sampling, seed: int
) -> list[Drawn]:
    seeds = [derive_seed(seed, policy, p.id) for p in prompts]
    replies = model.complete([p.messages for p in prompts], n=n, sampling=sampling, seeds=seeds)
    return [
        Drawn(
            candidate=Candidate(
                id=derive_id(seed, policy, prompt.id, number, at=prompt.created_at), prompt_id=prompt.id,
                policy=policy, text=reply.text, finish_reason=reply.finish_reason,
            ),
            tokens=len(reply.token_ids),
        )
        for prompt, several in zip(prompts, replies, strict=True)
        for number, reply in enumerate(several)
    ]  # fmt: skip


def _rank(candidates: Sequence[Candidate], parts: Mapping[str, Scored], dropped: list[Dropped]) -> list[Candidate]:
    """Acceptable candidates, best first; why the others are not goes into `dropped`."""
    kept: list[Candidate] = []
    seen: set[str] = set()
    for candidate in sorted(candidates, key=lambda c: (-(c.score or 0.0), c.id)):
        reason, detail = None, ""
        if not candidate.text:
            reason = "empty"
        elif candidate.finish_reason == "length":
            reason = "cut_off"
        elif candidate.text in seen:
            reason = "repeated"
        elif parts[candidate.id].vetoed is not None:
            reason, detail = "unsafe", parts[candidate.id].vetoed or ""
        if reason:
            dropped.append(
                Dropped(
                    id=candidate.id, stage="rejection_sampling", reason=reason, detail=detail,
                    prompt_id=candidate.prompt_id,
                )
            )  # fmt: skip
        else:
            seen.add(candidate.text)
            kept.append(candidate)
    return kept


def _told(candidate: Candidate, one: Scored, accepted: bool) -> CandidateScore:
    return CandidateScore(
        id=candidate.id, prompt_id=candidate.prompt_id, policy=candidate.policy, score=one.score,
        preference=one.preference, signals=one.signals, vetoed=one.vetoed, accepted=accepted,
    )  # fmt: skip


def _example(prompt: Prompt, candidate: Candidate) -> Example:
    return Example(
        id=derive_id("example", candidate.id, at=prompt.created_at), prompt_id=prompt.id, user_id=prompt.user_id,
        character_id=prompt.character_id, source=prompt.source, score=candidate.score,
        messages=(*prompt.messages, ChatMessage(role="assistant", content=candidate.text)),
    )  # fmt: skip
