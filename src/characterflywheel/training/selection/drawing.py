"""Candidates from the pool, a chunk of prompts at a time, so that a killed run goes on where it was (PAPER 4)."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby

from ...config import RejectionConfig
from ...errors import FlywheelError
from ...ids import derive_id, derive_seed
from ...llm.base import ChatModel, Sampling
from ...pipeline import Work
from ...progress import Advance
from ...records import Candidate, Prompt, Record
from .shares import allot, totals

PROMPTS_A_CHUNK = 32


class Drawn(Record):
    """A candidate with its length in tokens, None from a server that does not count, as kept for the next run."""

    candidate: Candidate
    tokens: int | None


def draw(
    work: Work,
    config: RejectionConfig,
    prompts: Sequence[Prompt],
    pool: Mapping[str, ChatModel],
    on_progress: Advance = lambda done, total: None,
) -> list[Drawn]:
    """`config.candidates` replies to each prompt, each policy its share of them (see `shares.allot`).

    One policy after the other, so that the pool needs to hold one model at a time. A policy that `config` does not
    name has share 1. Chunks that a killed run left are not drawn again.

    Raises:
        FlywheelError: a policy failed. What was drawn is kept for the next run.
    """
    named = {policy.name: policy.share for policy in config.pool}
    shares = {name: named.get(name, 1.0) for name in pool}
    allotted = allot([p.id for p in prompts], shares, config.candidates, work.seed)
    expected, total = totals(allotted), config.candidates * len(prompts)
    sampling = Sampling(temperature=config.temperature, max_tokens=config.max_tokens)
    drawn: list[Drawn] = []
    for name, counts in allotted.items():
        if not expected[name]:
            continue
        before = len(drawn)
        asked = sorted((p for p in prompts if counts[p.id]), key=lambda p: -counts[p.id])  # stable: equal counts stay
        for n, group in groupby(asked, key=lambda p: counts[p.id]):
            theirs = list(group)
            for start in range(0, len(theirs), PROMPTS_A_CHUNK):
                chunk = theirs[start : start + PROMPTS_A_CHUNK]
                place = derive_id("chunk", work.seed, name, n, sampling, *(p.id for p in chunk))
                make = partial(_sample, pool, name, chunk, n, sampling, work.seed)
                try:
                    drawn += work.resumed(f"{name}-{place}", Drawn, make)
                except Exception as error:  # whatever a model or a server fails with, what is drawn stays
                    raise FlywheelError(
                        f"policy {name!r} of the pool failed after {len(drawn) - before} of its {expected[name]} "
                        f"candidates ({type(error).__name__}: {error}). All {len(drawn)} drawn so far are kept: "
                        "mend it and run again, or take it out of rejection_sampling.pool."
                    ) from error
                on_progress(len(drawn), total)
    return drawn


def _sample(
    pool: Mapping[str, ChatModel], policy: str, prompts: Sequence[Prompt], n: int, sampling: Sampling, seed: int
) -> list[Drawn]:
    seeds = [derive_seed(seed, policy, p.id) for p in prompts]
    replies = pool[policy].complete([p.messages for p in prompts], n=n, sampling=sampling, seeds=seeds)
    if [len(several) for several in replies] != [n] * len(prompts):
        raise FlywheelError(f"{len(prompts)} prompts with {n} replies each were asked, others came.")
    return [
        Drawn(
            candidate=Candidate(
                id=derive_id(seed, policy, prompt.id, number, at=prompt.created_at), prompt_id=prompt.id,
                policy=policy, text=reply.text, finish_reason=reply.finish_reason,
            ),
            tokens=len(reply.token_ids) if reply.token_ids or not reply.text else None,
        )
        for prompt, several in zip(prompts, replies, strict=True)
        for number, reply in enumerate(several)
    ]  # fmt: skip
