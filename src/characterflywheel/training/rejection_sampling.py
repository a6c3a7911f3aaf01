"""Rejection sampling: candidates from a pool for fresh prompts, the best kept when good enough (PAPER section 4).

The set is rebuilt for every model from the newest traffic. `selection` has the parts: who answers how often
(`shares`), drawing that resumes (`drawing`), and the rule of acceptance (`acceptance`).
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Literal, NamedTuple, Protocol

from .. import intervals, tables
from ..config import RejectionConfig
from ..errors import FlywheelError
from ..ids import derive_id, derive_seed
from ..llm.base import ChatModel
from ..pipeline import Work
from ..progress import Advance
from ..records import Candidate, ChatMessage, Dropped, Estimate, Example, Prompt, Record, Scored, SignalKind
from ..safety.policy import SafetyPolicy
from .selection.acceptance import UNACCEPTABLE, Reason, decide
from .selection.drawing import draw

DAY = timedelta(days=1)


class Judge(Protocol):
    """The composite score of reward models: preference first, reliable signals as auxiliaries, safety as a veto."""

    def judge(
        self, prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]], safety: SafetyPolicy
    ) -> list[list[Scored]]: ...


class Acceptance(Record):
    """How many candidates of a policy, a character or a source were drawn and accepted. `share` counts users once."""

    by: Literal["policy", "character", "source"]
    name: str
    drawn: int
    accepted: int
    share: Estimate


class RejectionSummary(Record):
    """How many candidates of which policy were kept, and what their scores were.

    `threshold` is the score that the rule asked for, None where nothing was acceptable; a place that a quota left may
    have gone to a lower one. `lift` is by how much an accepted reply beats the mean of its prompt's candidates.
    `stale` and `unused` are training prompts that were too old, and that were more than were asked for. `uncounted`
    candidates came from a server that does not tell their tokens.
    """

    prompts: int
    candidates: int
    accepted: int
    accepted_by_policy: dict[str, int]
    threshold: float | None
    mean_score: float
    accepted_mean_score: float | None
    sampled_tokens: int
    reasons: dict[str, int]
    lift: Estimate
    acceptance: tuple[Acceptance, ...]
    oldest: datetime
    newest: datetime
    stale: int = 0
    unused: int = 0
    uncounted: int = 0
    absent: tuple[str, ...] = ()

    def line(self) -> str:
        pool = ", ".join(f"{policy} {n}" for policy, n in self.accepted_by_policy.items())
        kept = "" if self.accepted_mean_score is None else f", of the accepted {self.accepted_mean_score:+.2f}"
        return (
            f"{self.accepted} of {self.candidates} replies to {self.prompts} prompts accepted ({pool}); "
            f"mean score {self.mean_score:+.2f}{kept}"
        )


class CandidateScore(Record):
    """Why a candidate was chosen or not: the parts of its score (see `Scored`) and what became of it.

    `reason` is why it was not accepted, None for the accepted.
    """

    id: str
    prompt_id: str
    policy: str
    score: float
    preference: float
    signals: dict[SignalKind, float]
    vetoed: str | None
    accepted: bool
    reason: Reason | None


class Fresh(NamedTuple):
    """The prompts that are used, freshest first, and how many were too old or more than asked for."""

    prompts: list[Prompt]
    stale: int
    unused: int


def reject(
    work: Work,
    config: RejectionConfig,
    prompts: Sequence[Prompt],
    pool: Mapping[str, ChatModel],
    judge: Judge,
    safety: SafetyPolicy,
    on_progress: Advance = lambda done, total: None,
) -> RejectionSummary:
    """Draw candidates for the freshest prompts, score them, and keep the best by the configured rule (`acceptance`).

    Writes `accepted.parquet`, `rejected.parquet` (Candidate with score), `scores.parquet` (CandidateScore: every
    candidate's parts, and why it was not accepted), `examples.parquet` (Example), `acceptance.parquet` (Acceptance by
    policy, character and source) and `dropped.parquet` (what can never be accepted: unsafe, empty, cut off, repeated).

    Raises:
        FlywheelError: no prompt is for training, a policy of the pool failed, or a score is not finite.
    """
    fresh = freshest(prompts, config, work.seed)
    chosen = fresh.prompts
    drawn = draw(work, config, chosen, pool, on_progress)
    by_prompt: dict[str, list[Candidate]] = {p.id: [] for p in chosen}
    for one in drawn:
        by_prompt[one.candidate.prompt_id].append(one.candidate)
    parts = _judged(judge, chosen, by_prompt, safety)
    characters = {p.id: p.character_id for p in chosen}
    verdicts = decide(by_prompt, parts, characters, config)
    scored = [c.model_copy(update={"score": parts[c.id].score}) for p in chosen for c in by_prompt[p.id]]
    # a prompt's accepted replies best first, as they are learnt from
    accepted = [c for c in scored if verdicts.reasons[c.id] is None]
    place = {p.id: number for number, p in enumerate(chosen)}
    accepted.sort(key=lambda c: (place[c.prompt_id], -parts[c.id].score, c.id))
    asked = {p.id: p for p in chosen}
    acceptance = _acceptance(scored, verdicts.reasons, asked)
    tables.write(work.folder / "accepted.parquet", Candidate, accepted)
    tables.write(work.folder / "rejected.parquet", Candidate, [c for c in scored if verdicts.reasons[c.id] is not None])
    told = [_told(c, parts[c.id], verdicts.reasons[c.id]) for c in scored]
    tables.write(work.folder / "scores.parquet", CandidateScore, told)
    tables.write(work.folder / "examples.parquet", Example, [_example(asked[c.prompt_id], c) for c in accepted])
    tables.write(work.folder / "acceptance.parquet", Acceptance, acceptance)
    tables.write(work.folder / "dropped.parquet", Dropped, _dropped(told))
    days = [p.created_at for p in chosen]
    every = [one.score for one in told]
    return RejectionSummary(
        prompts=len(chosen),
        candidates=len(every),
        accepted=len(accepted),
        accepted_by_policy=dict(sorted(Counter(c.policy for c in accepted).items())),
        threshold=verdicts.threshold,
        mean_score=sum(every) / len(every),
        accepted_mean_score=sum(parts[c.id].score for c in accepted) / len(accepted) if accepted else None,
        sampled_tokens=sum(d.tokens or 0 for d in drawn),
        reasons=dict(sorted(Counter(reason for reason in verdicts.reasons.values() if reason).items())),
        lift=_lift(accepted, by_prompt, parts, asked),
        acceptance=tuple(acceptance),
        oldest=min(days),
        newest=max(days),
        stale=fresh.stale,
        unused=fresh.unused,
        uncounted=sum(d.tokens is None for d in drawn),
        absent=tuple(getattr(pool, "absent", ())),
    )


def freshest(prompts: Sequence[Prompt], config: RejectionConfig, seed: int) -> Fresh:
    """At most `config.prompts` training prompts, those of the freshest days first, drawn by the seed within a day.

    Days are counted back from the newest prompt, so that the hour of a day gives no preference.

    Raises:
        FlywheelError: no prompt is for training.
    """
    training = [p for p in prompts if p.split == "train"]
    if not training:
        raise FlywheelError(f"none of {len(prompts)} prompts is for training: more traffic is needed.")
    newest = max(p.created_at for p in training)
    oldest = newest - config.fresh_days * DAY if config.fresh_days is not None else None
    fresh = [p for p in training if oldest is None or p.created_at >= oldest]
    fresh.sort(key=lambda p: ((newest - p.created_at) // DAY, derive_seed(seed, "fresh", p.id), p.id))
    return Fresh(fresh[: config.prompts], len(training) - len(fresh), max(0, len(fresh) - config.prompts))


def _judged(
    judge: Judge, prompts: Sequence[Prompt], by_prompt: Mapping[str, Sequence[Candidate]], safety: SafetyPolicy
) -> dict[str, Scored]:
    """Every candidate's score by its id; in one call, as how many are scored together may change the last bits."""
    texts = [[c.text for c in by_prompt[p.id]] for p in prompts]
    judged = judge.judge([p.messages for p in prompts], texts, safety)
    if not all(math.isfinite(one.score) for several in judged for one in several):
        raise FlywheelError(
            "the reward models gave a score that is not finite: look at their training before going on."
        )
    return {
        c.id: one
        for p, several in zip(prompts, judged, strict=True)
        for c, one in zip(by_prompt[p.id], several, strict=True)
    }


def _acceptance(
    scored: Sequence[Candidate], reasons: Mapping[str, Reason | None], prompts: Mapping[str, Prompt]
) -> list[Acceptance]:
    """Share accepted by policy, character and source, with Wilson's interval at the effective number of users."""
    names: dict[Literal["policy", "character", "source"], Callable[[Candidate], str]] = {
        "policy": lambda c: c.policy,
        "character": lambda c: prompts[c.prompt_id].character_id,
        "source": lambda c: prompts[c.prompt_id].source,
    }
    rows = []
    for by, name_of in names.items():
        groups: dict[str, list[Candidate]] = {}
        for candidate in scored:
            groups.setdefault(name_of(candidate), []).append(candidate)
        for name, theirs in sorted(groups.items()):
            taken = [float(reasons[c.id] is None) for c in theirs]
            share = intervals.share(taken, [prompts[c.prompt_id].user_id for c in theirs])
            rows.append(Acceptance(by=by, name=name, drawn=len(theirs), accepted=int(sum(taken)), share=share))
    return rows


def _lift(
    accepted: Sequence[Candidate], by_prompt: Mapping[str, Sequence[Candidate]], parts: Mapping[str, Scored],
    prompts: Mapping[str, Prompt],
) -> Estimate:  # fmt: skip
    """Mean of an accepted reply's score less that of its prompt's candidates; users are the clusters."""
    if not accepted:
        return Estimate(value=None, n=0, reason="no reply was accepted")
    typical = {p: sum(parts[c.id].score for c in several) / len(several) for p, several in by_prompt.items() if several}
    gains = [parts[c.id].score - typical[c.prompt_id] for c in accepted]
    return intervals.mean(gains, [prompts[c.prompt_id].user_id for c in accepted])


def _told(candidate: Candidate, one: Scored, reason: Reason | None) -> CandidateScore:
    return CandidateScore(
        id=candidate.id, prompt_id=candidate.prompt_id, policy=candidate.policy, score=one.score,
        preference=one.preference, signals=one.signals, vetoed=one.vetoed, accepted=reason is None, reason=reason,
    )  # fmt: skip


def _dropped(told: Sequence[CandidateScore]) -> list[Dropped]:
    return [
        Dropped(
            id=one.id, stage="rejection_sampling", reason=one.reason, prompt_id=one.prompt_id,
            detail=(one.vetoed or "") if one.reason == "unsafe" else "",
        )
        for one in told
        if one.reason in UNACCEPTABLE and one.reason is not None
    ]  # fmt: skip


def _example(prompt: Prompt, candidate: Candidate) -> Example:
    return Example(
        id=derive_id("example", candidate.id, at=prompt.created_at), prompt_id=prompt.id, user_id=prompt.user_id,
        character_id=prompt.character_id, source=prompt.source, score=candidate.score,
        messages=(*prompt.messages, ChatMessage(role="assistant", content=candidate.text)),
    )  # fmt: skip
