"""From a generation's artifacts to its row in the ledger; nothing is computed here that a stage did not measure."""

from collections.abc import Mapping
from typing import Any

from .annotation.stage import AnnotateSummary
from .curation.stage import CurateSummary
from .evaluation.stage import OfflineSummary
from .experiment.metrics import DayRow
from .experiment.stage import ExperimentSummary
from .ledger import (
    Arm,
    Cost,
    Day,
    Experiment,
    Gate,
    GateCriterion,
    LedgerRow,
    Sieve,
    Training,
    Truth,
)  # fmt: skip
from .phases.consolidation import TrafficSummary
from .pipeline import Artifact, summary_line
from .release.gate import GateDecision
from .reward.judge import RewardSummary
from .reward.overoptimisation.stage import OveroptimisationSummary
from .style.stage import StyleSummary
from .tables import read
from .training.dpo import DPOSummary
from .training.rejection_sampling import RejectionSummary
from .training.rl import RLSummary
from .training.sft import TrainingSummary
from .workshop import Workshop


def row(number: int, shop: Workshop, done: Mapping[str, Artifact[Any]], truth: Truth | None) -> LedgerRow:
    """The ledger's row. `done` has every stage up to the gate, and the experiment's if the model met users."""
    offline: OfflineSummary = done["offline"].summary
    reward: RewardSummary = done["reward"].summary
    optimised: OveroptimisationSummary = done["overoptimisation"].summary
    style: StyleSummary = done["style"].summary
    decision: GateDecision = done["gate"].summary
    test: ExperimentSummary | None = done["experiment"].summary if "experiment" in done else None
    stages = {name: artifact.folder.name for name, artifact in done.items()}
    return LedgerRow(
        generation=number,
        model=shop.model_name,
        parent=shop.parent.name,
        seed=shop.config.seed,
        starts=done["window"].summary.starts,
        people="simulated" if shop.config.world else "real",
        stages=stages,
        lines={name: summary_line(artifact.summary) for name, artifact in done.items()},
        kept=_kept(done),
        reward=reward.quality(),
        training=_training(done),
        win_rate=offline.win_rate,
        production=offline.production,
        steerability=offline.steerability,
        style=style.drift,
        overoptimisation=(optimised.best_of_n, optimised.rl),
        gate=Gate(
            decision=decision.decision,
            criteria=tuple(GateCriterion(**criterion.model_dump()) for criterion in decision.criteria),
            reason=decision.reason,
        ),
        experiment=_experiment(shop, done, test) if test else None,
        verdict=test.verdict if test else None,
        verdict_reason=test.reason if test else "the gate let no user meet this model",
        truth=truth,
        samples=f"artifacts/{stages['offline']}/{offline.samples}",
        seconds={name: artifact.record.seconds for name, artifact in done.items()},
        cost=_cost(done),
    )


def _kept(done: Mapping[str, Artifact[Any]]) -> tuple[Sieve, ...]:
    traffic: TrafficSummary = done["traffic"].summary
    curated: CurateSummary = done["curate"].summary
    annotated: AnnotateSummary = done["annotate"].summary
    selected: RejectionSummary = done["rejection_sampling"].summary
    others = ("duplicate", "empty", "too_few_candidates")  # of candidates and prompts, not of pairs
    pair_reasons = {reason: n for reason, n in annotated.reasons.items() if reason not in others}
    return (
        Sieve(stage="traffic", what="conversations", taken=traffic.conversations, kept=traffic.conversations),
        Sieve(stage="curate", what="prompts", taken=curated.turns, kept=curated.kept, dropped=curated.reasons),
        Sieve(
            stage="annotate", what="pairs", taken=annotated.pairs + sum(pair_reasons.values()), kept=annotated.pairs,
            dropped=pair_reasons,
        ),
        Sieve(
            stage="rejection_sampling", what="replies", taken=selected.candidates, kept=selected.accepted,
            dropped={"not_best": selected.candidates - selected.accepted - sum(selected.reasons.values())}
            | selected.reasons,
        ),
    )  # fmt: skip


def _training(done: Mapping[str, Artifact[Any]]) -> dict[str, Training]:
    sft: TrainingSummary = done["sft"].summary
    dpo: DPOSummary = done["dpo"].summary
    rl: RLSummary = done["rl"].summary
    return {
        "sft": Training(examples=sft.examples, steps=sft.steps, first=sft.first_loss, last=sft.last_loss),
        "dpo": Training(examples=dpo.pairs, steps=dpo.steps, first=dpo.first_loss, last=dpo.last_loss),
        "rl": Training(
            examples=rl.rollouts,
            steps=rl.steps,
            measure="reward, each step its own prompts",
            first=rl.first_reward,
            last=rl.last_reward,
        ),
    }


def _experiment(shop: Workshop, done: Mapping[str, Artifact[Any]], test: ExperimentSummary) -> Experiment:
    bank = shop.bank(done["release"])
    days = read(done["experiment"] / "daily.parquet", DayRow)
    last = max((day.day for day in days if day.active_users), default=0)  # after it, windows are open but nobody comes
    return Experiment(
        name=test.experiment,
        control=bank.models["control"],
        treatment=bank.models["treatment"],
        days=test.days,
        confidence=test.confidence,
        breadth_lift=test.breadth_lift,
        depth_lift=test.depth_lift,
        secondary={"depth_all": test.depth_all, "active_days": test.active_days, "balance": test.balance},
        srm_p=test.srm_p.value,
        arms=tuple(
            Arm(
                name=arm.arm, model=bank.models[arm.arm], users=arm.users, engaged_share=arm.engaged_share,
                messages_per_user=arm.messages_per_user, messages_per_engaged_user=arm.messages_per_engaged_user,
                active_days_per_user=arm.active_days_per_user,
            )
            for arm in test.arms
        ),
        daily=tuple(
            Day(day=day.day, arm=day.arm, users=day.users, active_users=day.active_users, messages=day.messages)
            for day in days
            if day.day <= last
        ),
    )  # fmt: skip


def _cost(done: Mapping[str, Artifact[Any]]) -> Cost:
    sft, dpo, rl = (done[name].summary for name in ("sft", "dpo", "rl"))
    return Cost(
        peak_memory_mb=max(artifact.record.peak_memory_mb for artifact in done.values()),
        sampled_tokens=done["rejection_sampling"].summary.sampled_tokens
        + done["offline"].summary.sampled_tokens
        + rl.sampled_tokens,
        trained_tokens=sft.trained_tokens + dpo.trained_tokens + rl.trained_tokens,
        device=done["rl"].record.device,
    )
