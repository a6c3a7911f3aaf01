"""The over-optimisation stage: how proxy and gold reward go with the distance that selection and RL went.

Best-of-n costs no sampling: its candidates are rejection sampling's, so the policy is its pool. RL's rollouts were kept
with the sampler's log-probabilities; here their start reads them once, and answers the same prompts to be compared
with. Nothing here drives anything, so that the gold model stays gold.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from ... import tables
from ...config import OveroptimisationConfig, RLConfig
from ...ids import derive_id, derive_seed
from ...ledger import OptimisationCurve
from ...llm.base import Sampling
from ...llm.native import NativeModel
from ...llm.shared_prefix import reply_logprobs
from ...pipeline import Work, write_atomically
from ...progress import Advance
from ...records import Candidate, ChatMessage, Prompt, Record, Rollout
from . import best_of_n
from .bootstrap import NO_GOLD, At, Numbers, resampled
from .curve import curve, nothing, said
from .rollouts import Divergence, Group, Start, divergence, measure

TOKENS_AT_ONCE = 1536
PARTS = 5


class Scorer(Protocol):
    """A pointwise reward model: the proxy, or the gold."""

    def score(
        self, prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]]
    ) -> list[list[float]]: ...


class OveroptimisationSummary(Record):
    """Both curves, as the ledger keeps them."""

    best_of_n: OptimisationCurve
    rl: OptimisationCurve

    def line(self) -> str:
        line = f"best of n: {said(self.best_of_n)} · RL: {said(self.rl)}"
        absent = self.best_of_n.gold.alpha.reason == NO_GOLD
        return f"{line} · {NO_GOLD}" if absent else line


class ScoredReply(Record):
    """One reply behind a curve. `step` and divergences (nats, from RL's start) of RL's replies only."""

    way: Literal["best_of_n", "rl", "start"]
    prompt_id: str
    step: int | None = None
    proxy: float
    gold: float | None
    kl: float | None = None
    kl_plain: float | None = None


def measure_overoptimisation(
    work: Work, config: OveroptimisationConfig, rl: RLConfig, prompts: Sequence[Prompt],
    candidates: Sequence[Candidate], rollouts: Sequence[Rollout], start: Path, proxy: Scorer, gold: Scorer | None, *,
    threads: int, batch_replies: int, device: str = "cpu", on_progress: Advance = lambda done, total: None,
) -> OveroptimisationSummary:  # fmt: skip
    """Measure both curves; writes `curves.json` and `scores.parquet` (ScoredReply).

    `candidates` are rejection sampling's, `start` is the folder that RL began from, `rl` how it sampled. Without a
    gold model the proxy's curves stand alone and say so.
    """
    asked = {p.id: p.messages for p in prompts}
    rows: list[ScoredReply] = []
    selection = _best_of_n(config, asked, candidates, proxy, gold, work.seed, rows)
    on_progress(1, PARTS)
    groups = _spread([r for r in rollouts if r.prompt_id in asked], config.rl_prompts)
    names = sorted({several[0].prompt_id for several in groups})
    model = NativeModel.load(
        start, "start", device=device, max_prompt_tokens=rl.max_prompt_tokens, threads=threads,
        batch_replies=batch_replies,
    )  # fmt: skip
    own = work.resumed("start", Candidate, lambda: _answers(model, rl, asked, names, config.start_replies, work.seed))
    on_progress(2, PARTS)
    moved = _divergences(model, rl.temperature, asked, groups, device)
    on_progress(3, PARTS)
    policy = _rl(config, asked, groups, moved, own, proxy, gold, work.seed, rows)
    on_progress(PARTS, PARTS)
    summary = OveroptimisationSummary(best_of_n=selection, rl=policy)
    tables.write(work.folder / "scores.parquet", ScoredReply, rows)
    write_atomically(work.folder / "curves.json", summary.model_dump_json(indent=1) + "\n")
    return summary


Asked = dict[str, tuple[ChatMessage, ...]]


def _best_of_n(
    config: OveroptimisationConfig, asked: Asked, candidates: Sequence[Candidate], proxy: Scorer,
    gold: Scorer | None, seed: int, rows: list[ScoredReply],
) -> OptimisationCurve:  # fmt: skip
    """Of the prompts with the usual number of candidates; those with another, if any, are left out."""
    by_prompt: dict[str, list[str]] = {}
    for candidate in sorted(candidates, key=lambda c: (c.prompt_id, c.id)):
        if candidate.prompt_id in asked:
            by_prompt.setdefault(candidate.prompt_id, []).append(candidate.text)
    sizes = Counter(len(texts) for texts in by_prompt.values())
    count = max(sizes, key=lambda size: (sizes[size], size), default=0)
    names = [name for name, texts in by_prompt.items() if len(texts) == count]
    if count < 2:
        return nothing("best_of_n", f"{len(candidates)} candidates, two to a prompt are needed")
    mine = _scores(proxy, asked, names, by_prompt)
    theirs = None if gold is None else _scores(gold, asked, names, by_prompt)
    for i, name in enumerate(names):
        rows += [
            ScoredReply(way="best_of_n", prompt_id=name, proxy=mine[i, j], gold=_at(theirs, i, j)) for j in range(count)
        ]
    weights = resampled(len(names), config.draws, derive_seed(seed, "best_of_n"))
    measured = best_of_n.measure(mine, theirs, weights)
    where = [At(len(names), n=n + 1) for n in range(count)]
    return curve(
        "best_of_n", where, measured, prompts=len(names), replies=mine.size, ties=best_of_n.ties(mine)
    )  # fmt: skip


def _rl(
    config: OveroptimisationConfig, asked: Asked, groups: Sequence[Sequence[Rollout]],
    moved: Sequence[Sequence[Divergence]], own: Sequence[Candidate], proxy: Scorer, gold: Scorer | None, seed: int,
    rows: list[ScoredReply],
) -> OptimisationCurve:  # fmt: skip
    if not groups:
        return nothing("rl", "no rollout is left")
    texts: dict[str, list[str]] = {}
    for candidate in own:
        texts.setdefault(candidate.prompt_id, []).append(candidate.text)
    names = sorted(texts)
    start = Start(
        _scores(proxy, asked, names, texts), None if gold is None else _scores(gold, asked, names, texts)
    )  # fmt: skip
    place, read = {name: i for i, name in enumerate(names)}, []
    said_to = [asked[g[0].prompt_id] for g in groups]
    judged = None if gold is None else gold.score(said_to, [[r.text for r in g] for g in groups])
    for i, (several, far) in enumerate(zip(groups, moved, strict=True)):
        golden = None if judged is None else np.array(judged[i])
        read.append(
            Group(
                several[0].step, place[several[0].prompt_id], np.array([d.low_variance for d in far]),
                np.array([d.plain for d in far]), np.array([r.score for r in several]), golden,
            )
        )  # fmt: skip
        rows += [
            ScoredReply(way="rl", prompt_id=r.prompt_id, step=r.step, proxy=r.score, kl=d.low_variance,
                        kl_plain=d.plain, gold=None if golden is None else golden[j])
            for j, (r, d) in enumerate(zip(several, far, strict=True))
        ]  # fmt: skip
    for i, name in enumerate(names):
        rows += [
            ScoredReply(way="start", prompt_id=name, proxy=value, gold=_at(start.gold, i, j))
            for j, value in enumerate(start.proxy[i])
        ]
    where, measured = measure(
        read, start, config.rl_points, resampled(len(names), config.draws, derive_seed(seed, "rl"))
    )
    return curve("rl", where, measured, prompts=len(names), replies=sum(map(len, groups)))


def _scores(scorer: Scorer, asked: Asked, names: Sequence[str], texts: dict[str, list[str]]) -> Numbers:
    """(prompts, replies), as many replies to each."""
    return np.array(scorer.score([asked[name] for name in names], [texts[name] for name in names]))


def _at(scores: Numbers | None, i: int, j: int) -> float | None:
    return None if scores is None else float(scores[i, j])


def _spread(rollouts: Sequence[Rollout], most: int) -> list[list[Rollout]]:
    """Rollouts by step and prompt, at most so many groups, evenly over the steps."""
    groups = [list(several) for _, several in groupby(rollouts, key=lambda r: (r.step, r.prompt_id))]
    if len(groups) <= most:
        return groups
    return [groups[i] for i in np.linspace(0, len(groups) - 1, most).round().astype(int)]


def _answers(
    model: NativeModel, rl: RLConfig, asked: Asked, names: Sequence[str], n: int, seed: int
) -> Iterator[Candidate]:
    """The start's own replies to RL's prompts, drawn as RL draws."""
    sampling = Sampling(temperature=rl.temperature, max_tokens=rl.max_tokens)
    seeds = [derive_seed(seed, "start", name) for name in names]
    replies = model.complete([asked[name] for name in names], n=n, sampling=sampling, seeds=seeds)
    for name, several in zip(names, replies, strict=True):
        for number, reply in enumerate(several):
            yield Candidate(
                id=derive_id(seed, name, number), prompt_id=name, policy="start", text=reply.text,
                finish_reason=reply.finish_reason,
            )  # fmt: skip


def _divergences(
    model: NativeModel, temperature: float, asked: Asked, groups: Sequence[Sequence[Rollout]], device: str
) -> list[list[Divergence]]:
    """How much likelier each rollout is under the policy that drew it; each prompt is read once for its replies."""
    paths = [[(*model.format.prompt(asked[g[0].prompt_id]), r.token_ids) for r in g] for g in groups]
    found: list[list[Divergence]] = []
    at = 0
    while at < len(groups):
        end, tokens = at, 0
        while end < len(groups) and (end == at or tokens <= TOKENS_AT_ONCE):
            tokens += sum(len(s) for s in {segment for path in paths[end] for segment in path})
            end += 1
        with torch.inference_mode():
            flat = [path for several in paths[at:end] for path in several]
            start = iter(reply_logprobs(model.model, flat, temperature=temperature, device=device).logprobs.tolist())
        for several in groups[at:end]:
            found.append([divergence(r.logprobs, [next(start) for _ in r.logprobs]) for r in several])
        at = end
    return found
