"""Offline evaluation: old and new model answer the same held-out prompts, and are compared (PAPER section 6).

Reward-model win rates on internal and user prompts, production metrics, steerability, and conversations to read.
Writes `replies.parquet` (one row a prompt and model, with score, metrics that hold and instructions broken) and
`samples.jsonl` (ten prompts answered by both, chosen by seed).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .. import intervals, tables
from ..config import OfflineConfig
from ..errors import FlywheelError
from ..ids import derive_seed
from ..instructions import violations
from ..ledger import Compared, JudgedWinRate, Sample, SampleReply, Steerability, WinRates
from ..llm.base import ChatModel, Sampling
from ..pipeline import Work
from ..records import Character, Estimate, Prompt, Record, Source
from ..safety import SafetyPolicy
from . import production
from .answers import Answer
from .side_by_side import Policy, choose
from .steerability import steerability
from .win_rate import Judges, length_controlled, win_rate, wins

BATCH = 48
SAMPLES = 10


class Reply(Record):
    """One model's reply to one prompt. `score` is the pointwise reward model's; `flags` the metrics that hold."""

    prompt_id: str
    user_id: str
    source: Source
    character_id: str
    policy: Policy
    model: str
    text: str
    tokens: int
    finish_reason: Literal["stop", "length"]
    score: float
    flags: tuple[str, ...]
    violates: tuple[int, ...]


class OfflineSummary(Record):
    """What offline evaluation found. `change` is new less old, paired by prompt, for every production metric and
    both steerability measures; `length_controlled` the win rates at equal length; `judges_agree` the share of prompts
    on which both reward models name the same winner."""

    prompts: int
    sampled_tokens: int
    win_rate: WinRates
    length_controlled: WinRates
    judges_agree: Estimate
    production: dict[str, Compared]
    steerability: Steerability
    instructions: dict[str, Compared]
    change: dict[str, Estimate]
    samples: str = "samples.jsonl"

    def line(self) -> str:
        """One line for the console."""
        rates = (
            f"{source} {_percent(judged.pointwise)}/{_percent(judged.pairwise)}"
            for source, judged in (("user", self.win_rate.user), ("internal", self.win_rate.internal))
        )
        following = self.steerability.instruction_following
        return (
            f"{self.prompts} prompts, win rate pointwise/pairwise {', '.join(rates)}, "
            f"instructions followed {_percent(following.before)} to {_percent(following)}"
        )


class _Drawn(Record):
    prompt_id: str
    text: str
    tokens: int
    finish_reason: Literal["stop", "length"]


def evaluate_offline(
    work: Work,
    config: OfflineConfig,
    prompts: Sequence[Prompt],
    old: ChatModel,
    new: ChatModel,
    rewards: Judges,
    characters: Mapping[str, Character],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    safety: production.Safety | None = None,
) -> OfflineSummary:
    """Compare `new` with `old` on at most `config.prompts` of `prompts`, the two sources in turns.

    Each model gives one reply a prompt, with the same seed. Raises FlywheelError without prompts, for a prompt that is
    not of the evaluation split, or whose character is unknown.
    """
    _check(prompts, characters)
    chosen = choose(prompts, config.prompts, work.seed)
    models: dict[Policy, ChatModel] = {"old": old, "new": new}
    answers = {
        policy: [
            Answer(prompt, characters[prompt.character_id], one.text, one.tokens, one.finish_reason)
            for prompt, one in zip(chosen, drawn, strict=True)
        ]
        for policy, drawn in _draw(work, config, models, chosen, on_progress).items()
    }
    flags = {policy: production.judge(answers[policy], safety or SafetyPolicy()) for policy in models}

    texts = {policy: [answer.text for answer in answers[policy]] for policy in models}
    messages = [prompt.messages for prompt in chosen]
    scored = rewards.pointwise.score(messages, list(zip(texts["old"], texts["new"], strict=True)))
    scores = {"old": [float(pair[0]) for pair in scored], "new": [float(pair[1]) for pair in scored]}
    preferred = rewards.pairwise.prefers(messages, texts["new"], texts["old"])
    same = np.array([a == b for a, b in zip(texts["old"], texts["new"], strict=True)])
    by_score = wins(np.where(same, 0.0, np.subtract(scores["new"], scores["old"])))
    by_pair = wins(np.where(same, 0.0, np.asarray(preferred) - 0.5))

    rates, controlled = _by_source(chosen, answers, by_score, by_pair)
    table = production.compare(answers["old"], answers["new"], flags["old"], flags["new"])
    steered = steerability(answers["old"], answers["new"])
    rows = [
        _row(policy, models[policy].name, answer, scores[policy][i], flags[policy][i])
        for policy in models
        for i, answer in enumerate(answers[policy])
    ]
    tables.write(work.folder / "replies.parquet", Reply, sorted(rows, key=lambda r: (r.prompt_id, r.policy)))
    tables.write_jsonl(work.folder / "samples.jsonl", _samples(work.seed, chosen, answers, scores))
    return OfflineSummary(
        prompts=len(chosen),
        sampled_tokens=sum(answer.tokens for both in answers.values() for answer in both),
        win_rate=rates,
        length_controlled=controlled,
        judges_agree=intervals.share((by_score == by_pair).astype(float), [p.user_id for p in chosen]),
        # one definition of violation: characters without a verifiable instruction do not count as obedient
        production={name: one.both for name, one in table.items()}
        | {"instruction_violation": steered.overall.instruction_violation},
        steerability=steered.overall,
        instructions=steered.by_rule,
        change={name: one.change for name, one in table.items()} | steered.change,
    )


def _check(prompts: Sequence[Prompt], characters: Mapping[str, Character]) -> None:
    if not prompts:
        raise FlywheelError("there are 0 prompts to evaluate on, must be at least 1: gather more traffic.")
    for prompt in prompts:
        if prompt.split != "evaluate":
            raise FlywheelError(
                f"prompt {prompt.id} is of split {prompt.split!r}, must be 'evaluate': keep splits apart."
            )
        if prompt.character_id not in characters:
            raise FlywheelError(f"prompt {prompt.id} has the unknown character {prompt.character_id!r}: add its file.")


def _draw(
    work: Work,
    config: OfflineConfig,
    models: Mapping[Policy, ChatModel],
    prompts: Sequence[Prompt],
    on_progress: Callable[[int, int], None],
) -> dict[Policy, list[_Drawn]]:
    """One reply a model and prompt, in fixed batches that a killed run finds again."""
    sampling = Sampling(temperature=config.temperature, max_tokens=config.max_tokens)
    drawn: dict[Policy, list[_Drawn]] = {policy: [] for policy in models}
    for policy, model in models.items():
        for start in range(0, len(prompts), BATCH):
            draw = partial(_complete, model, prompts[start : start + BATCH], sampling, work.seed)
            drawn[policy] += work.resumed(f"{policy}-{start:06d}", _Drawn, draw)
            on_progress(sum(map(len, drawn.values())), len(models) * len(prompts))
    return drawn


def _complete(model: ChatModel, prompts: Sequence[Prompt], sampling: Sampling, seed: int) -> list[_Drawn]:
    seeds = [derive_seed(seed, "reply", prompt.id) for prompt in prompts]
    completions = model.complete([prompt.messages for prompt in prompts], n=1, sampling=sampling, seeds=seeds)
    return [
        _Drawn(prompt_id=prompt.id, text=one.text, tokens=len(one.token_ids), finish_reason=one.finish_reason)
        for prompt, (one,) in zip(prompts, completions, strict=True)
    ]


def _by_source(
    prompts: Sequence[Prompt],
    answers: Mapping[Policy, Sequence[Answer]],
    by_score: NDArray[np.float64],
    by_pair: NDArray[np.float64],
) -> tuple[WinRates, WinRates]:
    """Win rates as they are, then at equal length."""
    longer = np.subtract([a.tokens for a in answers["new"]], [a.tokens for a in answers["old"]])
    plain, controlled = dict[Source, JudgedWinRate](), dict[Source, JudgedWinRate]()
    sources: tuple[Source, ...] = ("internal", "user")
    for source in sources:
        rows = [i for i, prompt in enumerate(prompts) if prompt.source == source]
        users = [prompts[i].user_id for i in rows]
        plain[source] = JudgedWinRate(
            pointwise=win_rate(by_score[rows], users), pairwise=win_rate(by_pair[rows], users)
        )
        controlled[source] = JudgedWinRate(
            pointwise=length_controlled(by_score[rows], longer[rows], users),
            pairwise=length_controlled(by_pair[rows], longer[rows], users),
        )
    as_it_is, at_equal_length = (WinRates(internal=r["internal"], user=r["user"]) for r in (plain, controlled))
    return as_it_is, at_equal_length


def _row(policy: Policy, model: str, answer: Answer, score: float, flags: frozenset[str]) -> Reply:
    prompt = answer.prompt
    return Reply(
        prompt_id=prompt.id,
        user_id=prompt.user_id,
        source=prompt.source,
        character_id=prompt.character_id,
        policy=policy,
        model=model,
        text=answer.text,
        tokens=answer.tokens,
        finish_reason=answer.finish_reason,
        score=score,
        flags=tuple(sorted(flags)),
        violates=violations(answer.character, answer.text),
    )


def _samples(
    seed: int,
    prompts: Sequence[Prompt],
    answers: Mapping[Policy, Sequence[Answer]],
    scores: Mapping[str, Sequence[float]],
) -> list[Sample]:
    place = {prompt.id: i for i, prompt in enumerate(prompts)}
    samples = []
    for prompt in choose(prompts, SAMPLES, derive_seed(seed, "samples")):
        i = place[prompt.id]
        samples.append(
            Sample(
                prompt_id=prompt.id,
                source=prompt.source,
                character=answers["old"][i].character.name,
                history=tuple(message for message in prompt.messages if message.role != "system"),
                old=SampleReply(text=answers["old"][i].text, score=scores["old"][i]),
                new=SampleReply(text=answers["new"][i].text, score=scores["new"][i]),
            )
        )
    return samples


def _percent(estimate: Estimate) -> str:
    return "not measured" if estimate.value is None else f"{estimate.value:.0%}"
