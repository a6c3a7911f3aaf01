"""The over-optimisation stage: how proxy and gold reward go with the distance that selection and RL went.

Best-of-n costs no sampling: its candidates are rejection sampling's, so the policy is its pool (stratified: see
`best_of_n`). The proxy is the pointwise model in both: what RL climbs, and what selection climbs where no signal
counts, before its filters and safety's veto. RL's rollouts were kept
with the policy's log-probabilities; here their start reads them once, and answers the same prompts to be compared
with. Nothing here drives anything, so that the gold model stays gold; where `rl.alarms.stop` has "gold", it chose
which of RL's weights were kept, and what it then says of RL's end is told as such.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch

from ... import tables
from ...config import OveroptimisationConfig, RLConfig
from ...ids import derive_seed
from ...ledger import OptimisationCurve
from ...llm.base import Sampling
from ...llm.chat_format import ChatFormat
from ...llm.native import NativeModel, fast_dtype, load_model
from ...llm.shared_prefix import Path as TokenPath
from ...llm.shared_prefix import reply_logprobs
from ...pipeline import Work, write_atomically
from ...progress import Advance
from ...records import Candidate, ChatMessage, Estimate, Prompt, Record, Rollout
from ...training.batching import plan
from ..summary import no_judge
from . import best_of_n
from .bootstrap import NO_GOLD, At, Numbers, resampled
from .curve import curve, nothing, said
from .rollouts import Divergence, Group, Scores, divergence, measure

PARTS = 4


class Scorer(Protocol):
    """A pointwise reward model: the proxy, or the gold."""

    def score(
        self, prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]]
    ) -> list[list[float]]: ...


class OveroptimisationSummary(Record):
    """Both curves, as the ledger keeps them, and the gold model's own held-out accuracy (None: there is no such model).

    `gold_stops`: a fall of gold was to stop RL, so that of RL's end gold is no independent judge. Of a gold model that
    is not shown to know better than chance the curves are kept, and nothing is concluded.
    """

    best_of_n: OptimisationCurve
    rl: OptimisationCurve
    gold_accuracy: Estimate | None = None
    gold_stops: bool = False

    def line(self) -> str:
        doubt = NO_GOLD if self.gold_accuracy is None else no_judge(self.gold_accuracy)
        line = " · ".join(
            f"{name}: {said(found, trusted=doubt is None)}"
            for name, found in (("best of n", self.best_of_n), ("RL", self.rl))
        )
        chose = "RL was to stop where gold fell, so gold flatters its end" if self.gold_stops else None
        return " · ".join(part for part in (line, chose, doubt) if part)


class ScoredReply(Record):
    """One reply behind a curve. `step` and divergences (nats, from RL's start) of RL's replies only."""

    way: Literal["best_of_n", "rl", "start"]
    prompt_id: str
    step: int | None = None
    proxy: float
    gold: float | None
    kl: float | None = None
    kl_plain: float | None = None


class Judges(NamedTuple):
    """Proxy and gold, the prompts by id that they are asked about, and whose these are."""

    asked: Mapping[str, tuple[ChatMessage, ...]]
    users: Mapping[str, str]
    proxy: Scorer
    gold: Scorer | None

    def score(self, names: Sequence[str], texts: Sequence[Sequence[str]]) -> Scores:
        """Both scores, (prompts, replies), of as many replies to each prompt."""
        prompts = [self.asked[name] for name in names]
        return Scores(np.array(self.proxy.score(prompts, texts)), self.only_gold(names, texts))

    def only_gold(self, names: Sequence[str], texts: Sequence[Sequence[str]]) -> Numbers | None:
        return None if self.gold is None else np.array(self.gold.score([self.asked[name] for name in names], texts))


def measure_overoptimisation(
    work: Work, config: OveroptimisationConfig, rl: RLConfig, prompts: Sequence[Prompt],
    candidates: Sequence[Candidate], rollouts: Sequence[Rollout], start: Path, proxy: Scorer, gold: Scorer | None, *,
    gold_accuracy: Estimate | None = None, threads: int, batch_replies: int, device: str = "cpu",
    on_progress: Advance = lambda done, total: None,
) -> OveroptimisationSummary:  # fmt: skip
    """Measure both curves; writes `curves.json` and `scores.parquet` (ScoredReply).

    `candidates` are rejection sampling's, `start` is the folder that RL began from, `rl` how it sampled. Without a
    gold model the proxy's curves stand alone and say so. `gold_accuracy` is the gold model's on held-out pairs: without
    one it is not trusted.
    """
    judges = Judges({p.id: p.messages for p in prompts}, {p.id: p.user_id for p in prompts}, proxy, gold)
    selection, rows = _best_of_n(config, judges, candidates, work.seed)
    on_progress(1, PARTS)
    groups = _spread([r for r in rollouts if r.prompt_id in judges.asked], config.rl_prompts)
    model, tokenizer = load_model(start, torch.float32, device)
    form = ChatFormat(tokenizer, rl.max_prompt_tokens)
    paths = [[(*form.prompt(judges.asked[g[0].prompt_id]), r.token_ids) for r in g] for g in groups]
    moved = _divergences(model, rl, paths, groups, device)
    on_progress(2, PARTS)
    sampler = NativeModel(
        model.to(fast_dtype(device)), tokenizer, "start", max_prompt_tokens=rl.max_prompt_tokens, threads=threads,
        batch_replies=batch_replies,
    )  # fmt: skip
    names = sorted({group[0].prompt_id for group in groups})
    draw = partial(_answers, sampler, rl, judges, names, config.start_replies, work.seed)
    own = work.resumed("start", Candidate, draw)
    on_progress(3, PARTS)
    policy, more = _rl(config, judges, groups, moved, own, work.seed)
    on_progress(PARTS, PARTS)
    judged = gold and (gold_accuracy or Estimate(value=None, n=0, reason="no held-out accuracy"))
    stops = bool(judged) and "gold" in rl.alarms.stop
    summary = OveroptimisationSummary(best_of_n=selection, rl=policy, gold_accuracy=judged, gold_stops=stops)
    tables.write(work.folder / "scores.parquet", ScoredReply, rows + more)
    write_atomically(work.folder / "curves.json", summary.model_dump_json(indent=1) + "\n")
    return summary


Read = tuple[OptimisationCurve, list[ScoredReply]]


def _best_of_n(config: OveroptimisationConfig, judges: Judges, candidates: Sequence[Candidate], seed: int) -> Read:
    """Of the prompts with the usual number of candidates; those with another, if any, are left out."""
    texts = _by_prompt([c for c in candidates if c.prompt_id in judges.asked])
    sizes = Counter(map(len, texts.values()))
    count = max(sizes, key=lambda size: (sizes[size], size), default=0)
    names = [name for name, several in texts.items() if len(several) == count]
    if count < 2:
        return nothing("best_of_n", f"{len(candidates)} candidates, two to a prompt are needed"), []
    scores = judges.score(names, [texts[name] for name in names])
    users = [judges.users[name] for name in names]
    people = len(set(users))
    found = curve(
        "best_of_n", [At(len(names), people, n=n + 1) for n in range(count)],
        best_of_n.measure(*scores, resampled(users, config.draws, derive_seed(seed, "best_of_n"))),
        prompts=len(names), users=people, replies=scores.proxy.size, ties=best_of_n.ties(scores.proxy),
    )  # fmt: skip
    return found, _rows("best_of_n", names, scores)


def _rl(
    config: OveroptimisationConfig, judges: Judges, groups: Sequence[Sequence[Rollout]],
    moved: Sequence[Sequence[Divergence]], own: Sequence[Candidate], seed: int,
) -> Read:  # fmt: skip
    """Every rollout against its start's own replies to the same prompt."""
    if not groups:
        return nothing("rl", "no rollout is left"), []
    texts = _by_prompt(own)
    names = list(texts)
    start = judges.score(names, list(texts.values()))
    gold = judges.only_gold([group[0].prompt_id for group in groups], [[r.text for r in g] for g in groups])
    read: list[Group] = []
    rows = _rows("start", names, start)
    for i, (group, far) in enumerate(zip(groups, moved, strict=True)):
        first, mine = group[0], None if gold is None else gold[i]
        kl, kl_plain = np.array([d.low_variance for d in far]), np.array([d.plain for d in far])
        scores = np.array([r.score for r in group])
        read.append(Group(first.step, names.index(first.prompt_id), kl, kl_plain, scores, mine))
        rows += [
            ScoredReply(way="rl", prompt_id=r.prompt_id, step=r.step, proxy=r.score, kl=kl[j], kl_plain=kl_plain[j],
                        gold=None if mine is None else mine[j])
            for j, r in enumerate(group)
        ]  # fmt: skip
    users = [judges.users[name] for name in names]
    weights = resampled(users, config.draws, derive_seed(seed, "rl"))
    where, measured = measure(read, start, config.rl_points, weights, users)
    found = curve("rl", where, measured, prompts=len(names), users=len(set(users)), replies=sum(map(len, groups)))
    return found, rows


def _by_prompt(candidates: Sequence[Candidate]) -> dict[str, list[str]]:
    """Texts by prompt, both in the order of their ids."""
    found: dict[str, list[str]] = {}
    for candidate in sorted(candidates, key=lambda c: (c.prompt_id, c.id)):
        found.setdefault(candidate.prompt_id, []).append(candidate.text)
    return found


def _rows(way: Literal["best_of_n", "start"], names: Sequence[str], scores: Scores) -> list[ScoredReply]:
    return [
        ScoredReply(way=way, prompt_id=name, proxy=value, gold=None if scores.gold is None else scores.gold[i, j])
        for i, name in enumerate(names)
        for j, value in enumerate(scores.proxy[i])
    ]


def _spread(rollouts: Sequence[Rollout], most: int) -> list[list[Rollout]]:
    """Rollouts by step and prompt: of whole steps, evenly spread, with about so many prompts together."""
    groups = [list(several) for _, several in groupby(rollouts, key=lambda r: (r.step, r.prompt_id))]
    steps = sorted({group[0].step for group in groups})
    if len(groups) > most:
        few = max(1, most * len(steps) // len(groups))
        steps = [steps[i] for i in np.linspace(0, len(steps) - 1, few).round().astype(int)]
    return [group for group in groups if group[0].step in steps]


def _answers(
    model: NativeModel, rl: RLConfig, judges: Judges, names: Sequence[str], n: int, seed: int
) -> Iterator[Candidate]:
    """The start's own replies to RL's prompts, drawn as RL draws."""
    sampling = Sampling(temperature=rl.temperature, max_tokens=rl.max_tokens)
    seeds = [derive_seed(seed, "start", name) for name in names]
    replies = model.complete([judges.asked[name] for name in names], n=n, sampling=sampling, seeds=seeds)
    for name, several in zip(names, replies, strict=True):
        for number, reply in enumerate(several):
            yield Candidate(
                id=f"{name}-{number:03}", prompt_id=name, policy="start", text=reply.text,
                finish_reason=reply.finish_reason,
            )  # fmt: skip


def _divergences(
    model: Any, rl: RLConfig, paths: Sequence[Sequence[TokenPath]], groups: Sequence[Sequence[Rollout]], device: str
) -> list[list[Divergence]]:  # fmt: skip
    """How much likelier each rollout is under the policy that drew it than under its start, `model` in float32.

    Both are read by the same products in the same batches, so that bfloat16's rounding cancels: the first step is its
    start. Rounding otherwise differs by 0.05 nats a reply (SmolLM2-135M, 48 tokens), more than a careful step of RL.
    """
    found: list[list[Divergence]] = [[] for _ in groups]
    kind = fast_dtype(device)

    def read_with(i: int) -> tuple[int, bool, bool]:
        """What the learner read apart: each step's groups that teach, and those that do not."""
        first, *others = groups[i]
        return first.step, first.learner_logprobs is None, all(one.reward == first.reward for one in others)

    for _, step in groupby(sorted(range(len(groups)), key=read_with), key=read_with):
        members = list(step)
        for batch in plan([paths[i] for i in members], rl.micro_batch_tokens):
            together = [members[j] for j in batch]
            flat = [path for i in together for path in paths[i]]
            with torch.no_grad(), torch.autocast(device.partition(":")[0], dtype=kind, enabled=kind == torch.bfloat16):
                start = iter(reply_logprobs(model, flat, temperature=rl.temperature, device=device).logprobs.tolist())
            for i in together:
                policy = [r.learner_logprobs or r.logprobs for r in groups[i]]
                found[i] = [divergence(logs, [next(start) for _ in logs]) for logs in policy]
    return found
