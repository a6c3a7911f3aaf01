"""The two halves of an experiment that the pipeline does: the bank before, the analysis after (PAPER section 7).

Between them people live `days` days with the arms. In the embedded world they do so on a *bank*: contexts of
production users, with replies that both models really generated for them. Live products have no need of a bank.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Final

from .. import tables
from ..config import ExperimentConfig
from ..errors import FlywheelError
from ..ids import derive_id, derive_seed
from ..llm.base import ChatModel, Sampling
from ..people import Bank
from ..pipeline import Work, write_atomically
from ..records import Candidate, Character, Estimate, Prompt, Record
from . import analysis, metrics, power
from .assignment import CONTROL, TREATMENT
from .moments import Moments

ARMS: Final = (CONTROL, TREATMENT)
CONTEXTS_A_CHUNK: Final = 48


class BankHeader(Record):
    """`bank.json`: what a bank's tables belong to."""

    experiment: str
    models: dict[str, str]
    starts: datetime
    days: int
    arm_share: float


class BankSummary(Record):
    """How many replies were generated for how many contexts, and how they ended, by arm."""

    experiment: str
    contexts: int
    users: int
    replies_per_arm: int
    mean_words: dict[str, float]
    finished_share: dict[str, float]

    def line(self) -> str:
        """One line for the run's log."""
        if not self.contexts:
            return f"{self.experiment}: real users meet both models"
        arms = "; ".join(
            f"{arm} {self.mean_words[arm]:.0f} words, {self.finished_share[arm]:.0%} finished"
            for arm in self.mean_words
        )
        return f"{self.contexts} contexts, {self.replies_per_arm} replies an arm ({arms})"


class ArmRow(Record):
    """One arm's people and what they did in their windows; means over all exposed users but where said otherwise."""

    arm: str
    users: int
    engaged: int
    engaged_share: float | None
    messages: int
    messages_per_user: float | None
    messages_per_engaged_user: float | None
    active_days_per_user: float | None
    pre_messages_per_user: float | None
    fallback_share: float | None


class ExperimentSummary(Record):
    """What the experiment says. Lifts are relative (0.05 is +5%), of treatment over control, CUPED-adjusted.

    `balance` is the lift of messages *before* exposure, which should hold 0. `cap` is where a user's messages were
    capped; `crossed` counts users left out because they met both arms. `detectable` says what lift the experiment had
    power to see.
    """

    experiment: str
    days: int
    confidence: float
    users: int
    breadth_lift: Estimate
    depth_lift: Estimate
    depth_all: Estimate
    active_days: Estimate
    balance: Estimate
    srm_p: Estimate
    srm_daily_p: Estimate
    detectable: power.Plan
    arms: tuple[ArmRow, ...]
    cap: int
    crossed: int
    verdict: analysis.Decision
    reason: str

    def line(self) -> str:
        """One line for the run's log."""
        return f"{self.verdict.replace('_', ' ')}: {self.reason} ({self.users} users)"


def make_bank(
    work: Work,
    config: ExperimentConfig,
    name: str,
    prompts: Sequence[Prompt],
    control: ChatModel,
    treatment: ChatModel,
    characters: Mapping[str, Character],
    starts: datetime,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> BankSummary:
    """Generate `config.replies` replies of each arm for up to `config.contexts` contexts of production users.

    Contexts are a seeded sample of `prompts`, one a user as far as they reach. Both arms draw with the same
    seeds, so two equal models give equal replies. Writes `bank.json`, `contexts.parquet` (Prompt) and
    `replies_ARM.parquet` (Candidate, `policy` the model's name). A killed run goes on after its last chunk.

    Raises:
        FlywheelError: no prompt of a production user, or one whose character is unknown.
    """
    contexts = _sample(prompts, config.contexts, work.seed)
    unknown = sorted({prompt.character_id for prompt in contexts} - set(characters))
    if not contexts:
        raise FlywheelError(f"experiment {name!r}: no production user's among {len(prompts)} prompts; collect more.")
    if unknown:
        raise FlywheelError(f"experiment {name!r}: no character {', '.join(unknown)} among those loaded: add them.")
    models = {CONTROL: control, TREATMENT: treatment}
    total = len(contexts) * config.replies * len(models)
    replies: dict[str, list[Candidate]] = {arm: [] for arm in models}
    for arm, model in models.items():
        for begin in range(0, len(contexts), CONTEXTS_A_CHUNK):
            chunk = contexts[begin : begin + CONTEXTS_A_CHUNK]
            draw = partial(_draw, model, arm, chunk, config, work.seed)
            replies[arm] += work.resumed(f"{arm}-{begin:05}", Candidate, draw)
            on_progress(sum(map(len, replies.values())), total)
    _write(work, config, name, {arm: model.name for arm, model in models.items()}, starts, contexts, replies)
    return BankSummary(
        experiment=name,
        contexts=len(contexts),
        users=len({prompt.user_id for prompt in contexts}),
        replies_per_arm=len(replies[CONTROL]),
        mean_words={arm: sum(len(r.text.split()) for r in rows) / len(rows) for arm, rows in replies.items()},
        finished_share={arm: sum(r.finish_reason == "stop" for r in rows) / len(rows) for arm, rows in replies.items()},
    )


def name_arms(
    work: Work, config: ExperimentConfig, name: str, control: str, treatment: str, starts: datetime
) -> BankSummary:
    """A bank without contexts, which says what is compared: real users meet the models themselves."""
    models = {CONTROL: control, TREATMENT: treatment}
    _write(work, config, name, models, starts, (), dict.fromkeys(models, ()))
    return BankSummary(experiment=name, contexts=0, users=0, replies_per_arm=0, mean_words={}, finished_share={})


def load_bank(folder: Path, characters: Mapping[str, Character]) -> Bank:
    """The bank that `make_bank` wrote, with the characters of its contexts."""
    header = BankHeader.model_validate_json((folder / "bank.json").read_text(encoding="utf-8"))
    contexts = tables.read(folder / "contexts.parquet", Prompt)
    replies = {}
    for arm in header.models:
        of_prompt: dict[str, list[Candidate]] = {prompt.id: [] for prompt in contexts}
        for candidate in tables.read(folder / f"replies_{arm}.parquet", Candidate):
            of_prompt[candidate.prompt_id].append(candidate)
        replies[arm] = tuple(tuple(of_prompt[prompt.id]) for prompt in contexts)
    return Bank(
        experiment=header.experiment,
        contexts=tuple(contexts),
        replies=replies,
        models=header.models,
        characters={name: characters[name] for name in sorted({prompt.character_id for prompt in contexts})},
        starts=header.starts,
        days=header.days,
        arm_share=header.arm_share,
    )


def analyse(work: Work, config: ExperimentConfig, name: str, store_export: Path) -> ExperimentSummary:
    """Analyse experiment `name` from exported events (see `metrics.observe` for what the export must hold).

    Writes `lifts.parquet` (analysis.Lift, one row a metric), `arms.parquet` (ArmRow) and `daily.parquet`
    (metrics.DayRow), and returns the lifts with the sample-ratio check and the verdict.
    """
    seen = metrics.observe(store_export, name, config)
    control, treatment = (seen.moments[arm] for arm in ARMS)
    ratio = analysis.sample_ratio(seen.days)
    lifts = {
        metric.name: analysis.lift(control, treatment, metric, config.confidence, config.min_users)
        for metric in analysis.METRICS
    }
    estimates = {metric: row.estimate() for metric, row in lifts.items()}
    arms = tuple(_arm_row(arm, seen.moments[arm]) for arm in ARMS)
    verdict = analysis.decide(estimates["breadth"], estimates["depth"], estimates["depth_all"], ratio)
    tables.write(work.folder / "lifts.parquet", analysis.Lift, lifts.values())
    tables.write(work.folder / "arms.parquet", ArmRow, arms)
    tables.write(work.folder / "daily.parquet", metrics.DayRow, seen.days)
    return ExperimentSummary(
        experiment=name,
        days=config.days,
        confidence=config.confidence,
        users=control.n + treatment.n,
        breadth_lift=estimates["breadth"],
        depth_lift=estimates["depth"],
        depth_all=estimates["depth_all"],
        active_days=estimates["active_days"],
        balance=estimates["balance"],
        srm_p=ratio.p,
        srm_daily_p=ratio.daily_p,
        detectable=power.plan(control + treatment, min(control.n, treatment.n), config),
        arms=arms,
        cap=seen.cap,
        crossed=seen.crossed,
        verdict=verdict.decision,
        reason=verdict.reason,
    )


def _write(
    work: Work,
    config: ExperimentConfig,
    name: str,
    models: Mapping[str, str],
    starts: datetime,
    contexts: Sequence[Prompt],
    replies: Mapping[str, Sequence[Candidate]],
) -> None:
    """The tables and, last, the header of a bank."""
    header = BankHeader(
        experiment=name, models=dict(models), starts=starts, days=config.days, arm_share=config.arm_share
    )
    tables.write(work.folder / "contexts.parquet", Prompt, contexts)
    for arm, drawn in replies.items():
        tables.write(work.folder / f"replies_{arm}.parquet", Candidate, drawn)
    write_atomically(work.folder / "bank.json", header.model_dump_json(indent=1) + "\n")


def _sample(prompts: Sequence[Prompt], size: int, seed: int) -> list[Prompt]:
    """A seeded sample of production users' prompts: every user's first before anyone's second."""
    eligible = sorted(
        (prompt for prompt in prompts if prompt.source == "user"), key=lambda prompt: derive_seed(seed, prompt.id)
    )
    taken: dict[str, int] = {}
    rounds = []
    for prompt in eligible:
        taken[prompt.user_id] = taken.get(prompt.user_id, 0) + 1
        rounds.append(taken[prompt.user_id])
    order = sorted(range(len(eligible)), key=lambda i: (rounds[i], i))
    return [eligible[i] for i in order[:size]]


def _draw(
    model: ChatModel, arm: str, prompts: Sequence[Prompt], config: ExperimentConfig, seed: int
) -> list[Candidate]:
    """Replies to each prompt, with seeds that do not depend on the arm."""
    sampling = Sampling(temperature=config.temperature, max_tokens=config.max_tokens)
    seeds = [derive_seed(seed, "reply", prompt.id) for prompt in prompts]
    completions = model.complete(
        [prompt.messages for prompt in prompts], n=config.replies, sampling=sampling, seeds=seeds
    )
    return [
        Candidate(
            id=derive_id(seed, arm, prompt.id, number),
            prompt_id=prompt.id,
            policy=model.name,
            text=completion.text,
            finish_reason=completion.finish_reason,
        )
        for prompt, drawn in zip(prompts, completions, strict=True)
        for number, completion in enumerate(drawn)
    ]


def _arm_row(arm: str, moments: Moments) -> ArmRow:
    users, sums = moments.n, {name: int(value) for name, value in moments.sums.items()}

    def per(column: str, below: int) -> float | None:
        return sums[column] / below if below else None

    return ArmRow(
        arm=arm,
        users=users,
        engaged=sums["engaged"],
        engaged_share=per("engaged", users),
        messages=sums["messages"],
        messages_per_user=per("messages", users),
        messages_per_engaged_user=per("engaged_messages", sums["engaged"]),
        active_days_per_user=per("active_days", users),
        pre_messages_per_user=per("pre_messages", users),
        fallback_share=per("fallbacks", sums["messages"]),
    )
