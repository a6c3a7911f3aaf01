"""Alternatives for ranking: a pool of policies and prompts that rewrite (PAPER section 2).

Replies are drawn in chunks of fixed size, each kept in the stage's partial folder, so that a killed run goes on where
it was and draws the same text: how prompts are grouped can change a sampled token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from .. import ids
from ..config import AnnotateConfig
from ..errors import FlywheelError
from ..llm.base import ChatModel, Completion, Sampling
from ..pipeline import Work
from ..progress import Advance
from ..records import Candidate, ChatMessage, Dropped, Prompt

STAGE = "annotate"
CHUNK = 64
HINTS = (
    "Reply in one or two short sentences, then ask a question about what the user just said.",
    "Reply warmly and plainly, in at most 20 words, and react to a detail of the user's message.",
    "Reply with something surprising from your own life, in two short sentences.",
)


class RewritePolicy:
    """A policy of the pool: a model that is told, beyond the character, how to write, and that writes with more care.

    The hint is drawn by the conversation's seed and stands at the end of the system prompt; only the reply is used, so
    nothing downstream sees it. Sampling is cooled by the factor `cooling`. So the pool's alternatives differ in kind,
    not by chance alone.
    """

    def __init__(self, model: ChatModel, hints: Sequence[str] = HINTS, cooling: float = 0.6) -> None:
        if not hints:
            raise FlywheelError("hints is empty: a rewrite policy needs at least one.")
        if not 0 < cooling <= 1:
            raise FlywheelError(f"cooling == {cooling}, must be > 0 and <= 1.")
        self.model, self.hints, self.cooling = model, tuple(hints), cooling
        self.name = f"{model.name}+rewrite"

    def complete(
        self,
        conversations: Sequence[Sequence[ChatMessage]],
        *,
        n: int = 1,
        sampling: Sampling = Sampling(),
        seeds: Sequence[int],
    ) -> list[list[Completion]]:
        """As `ChatModel.complete`; log-probabilities are those of the cooled sampler under the prompt with its hint."""
        cooled = replace(sampling, temperature=self.cooling * sampling.temperature)
        hinted = [
            self._with_hint(conversation, self.hints[ids.derive_seed("hint", seed) % len(self.hints)])
            for conversation, seed in zip(conversations, seeds, strict=True)
        ]
        return self.model.complete(hinted, n=n, sampling=cooled, seeds=seeds)

    def _with_hint(self, conversation: Sequence[ChatMessage], hint: str) -> list[ChatMessage]:
        head = [m for m in conversation[:1] if m.role == "system"]
        before = f"{head[0].content}\n" if head else ""
        return [ChatMessage(role="system", content=before + hint), *conversation[len(head) :]]


class Drawn(NamedTuple):
    """Candidates of every prompt, by prompt and policy; what was dropped, and why."""

    kept: tuple[Candidate, ...]
    dropped: tuple[Dropped, ...]


class Share(NamedTuple):
    """The prompts that one policy answers with `n` replies each."""

    policy: str
    n: int
    prompts: tuple[Prompt, ...]


def draw(
    prompts: Sequence[Prompt],
    pool: Mapping[str, ChatModel],
    config: AnnotateConfig,
    work: Work,
    on_progress: Advance = lambda done, total: None,
) -> Drawn:
    """`config.candidates` replies to each prompt, spread evenly over the pool; empty and repeated ones are dropped.

    Raises FlywheelError for a pool of fewer than two policies: alternatives of one policy differ by chance only.
    """
    if len(pool) < 2:
        raise FlywheelError(
            f"the pool has {len(pool)} policies, must have at least 2; add a RewritePolicy of the model."
        )
    sampling = Sampling(temperature=config.temperature, max_tokens=config.max_tokens)
    total, done = len(prompts) * config.candidates, 0
    drawn: list[Candidate] = []
    for share in divide(prompts, sorted(pool), config.candidates):
        for number, start in enumerate(range(0, len(share.prompts), CHUNK)):
            chunk = Share(share.policy, share.n, share.prompts[start : start + CHUNK])
            place = ids.derive_id(
                "chunk", work.seed, share.policy, share.n, number, sampling, *(p.id for p in chunk.prompts)
            )
            sample = partial(_sample, chunk, pool[share.policy], sampling, work.seed)
            drawn += work.resumed(f"candidates-{place}", Candidate, sample)
            done += share.n * len(chunk.prompts)
            on_progress(done, total)
    return _distinct(drawn, [p.id for p in prompts])


def divide(prompts: Sequence[Prompt], policies: Sequence[str], candidates: int) -> list[Share]:
    """Who answers what: each policy an equal part of `candidates`, the remainder going round by prompt."""
    each, extra = divmod(candidates, len(policies))
    shares = []
    for place, policy in enumerate(policies):
        lucky = {i for i in range(len(prompts)) if (place - i) % len(policies) < extra}
        for n, chosen in ((each + 1, lucky), (each, set(range(len(prompts))) - lucky)):
            if n and chosen:
                shares.append(Share(policy, n, tuple(prompts[i] for i in sorted(chosen))))
    return shares


def _sample(share: Share, model: ChatModel, sampling: Sampling, seed: int) -> list[Candidate]:
    completions = model.complete(
        [prompt.messages for prompt in share.prompts],
        n=share.n,
        sampling=sampling,
        seeds=[ids.derive_seed(seed, "candidate", share.policy, prompt.id) for prompt in share.prompts],
    )
    return [
        Candidate(
            id=ids.derive_id("candidate", seed, share.policy, prompt.id, number, at=prompt.created_at),
            prompt_id=prompt.id, policy=share.policy, text=reply.text.strip(), finish_reason=reply.finish_reason,
        )
        for prompt, replies in zip(share.prompts, completions, strict=True)
        for number, reply in enumerate(replies)
    ]  # fmt: skip


def _distinct(drawn: Sequence[Candidate], prompt_ids: Sequence[str]) -> Drawn:
    by_prompt: dict[str, list[Candidate]] = {name: [] for name in prompt_ids}
    for candidate in drawn:
        by_prompt[candidate.prompt_id].append(candidate)
    kept: list[Candidate] = []
    dropped: list[Dropped] = []
    for candidates in by_prompt.values():
        seen: dict[str, str] = {}
        for candidate in candidates:
            key = " ".join(candidate.text.casefold().split())
            if not key:
                reason, detail = "empty", candidate.policy
            elif key in seen:
                reason, detail = "duplicate", f"of {seen[key]}"
            else:
                seen[key] = candidate.id
                kept.append(candidate)
                continue
            dropped.append(
                Dropped(id=candidate.id, stage=STAGE, reason=reason, detail=detail, prompt_id=candidate.prompt_id)
            )
    return Drawn(tuple(kept), tuple(dropped))
