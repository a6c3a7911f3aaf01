"""One generation of the flywheel, top to bottom, in the paper's order and words: read this file first.

    data consolidation   window, traffic -> curate -> annotate
    pre-herding          reward -> rejection_sampling
    herding              sft -> dpo -> rl
    evaluation           overoptimisation, offline, style -> gate -> release -> live -> experiment -> verdict

`compose` declares the stages and what each takes; `phases` does the work of each, with the functions of the stage's
own package. Stages never import one another; only this file puts them together.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from . import bookkeeping, ledger
from .annotation.stage import AnnotateSummary
from .config import FlywheelConfig, Section
from .curation.stage import CurateSummary
from .errors import FlywheelError
from .evaluation.stage import OfflineSummary
from .experiment.stage import BankSummary, ExperimentSummary
from .ledger import LedgerRow, Truth
from .people import Bank, People
from .phases import consolidation, evaluation, herding, online, preherding
from .phases.consolidation import TrafficSummary, WindowSummary
from .phases.online import LiveSummary
from .pipeline import Artifact, Stage, Work
from .progress import announce
from .records import Record
from .release import registry
from .release.gate import GateDecision
from .reward.judge import RewardSummary
from .reward.overoptimisation.stage import OveroptimisationSummary
from .store import EventStore
from .style.stage import StyleSummary
from .training.dpo import DPOSummary
from .training.rejection_sampling import RejectionSummary
from .training.rl import RLSummary
from .training.sft import TrainingSummary
from .training.sizes import check_sizes
from .workshop import WEEK, Workshop
from .workspace import Workspace

S = TypeVar("S", bound=Record)
Inputs = Mapping[str, Stage[Any]]
VERSIONS = {"annotate": 2, "reward": 2, "rejection_sampling": 3, "sft": 3, "dpo": 3, "rl": 3}
"""A stage whose code changes what it makes gets a new version here, so that old artifacts are not served."""

Oracle = Callable[[Bank], Truth]
"""What the embedded world knows and the pipeline never reads; noted in the ledger after the verdict."""


def compose(config: FlywheelConfig, number: int, shop: Workshop) -> tuple[Stage[Any], ...]:
    """The stages of generation `number`, in the order they run. Nothing is run or loaded here."""
    models = {"parent": shop.parent.identity, "characters": shop.characters_identity, "models": shop.models_identity}
    opening = {**models, "generation": str(number), "after": shop.previous}
    nothing = Section()

    def stage(
        name: str, settings: Section, summary: type[S], run: Callable[[Workshop, Work], S], inputs: Inputs,
        external: dict[str, str] = models,
    ) -> Stage[S]:  # fmt: skip
        return Stage(name, VERSIONS.get(name, 1), settings, summary, partial(run, shop), config.seed, inputs, external)

    # Data consolidation: people talk, traffic is curated into prompts, annotators compare replies.
    window = stage("window", config.world or nothing, WindowSummary, consolidation.open_window, {}, opening)
    reading = nothing if config.world else config.traffic  # the crowd says of each reply whether it goes on
    traffic = stage("traffic", reading, TrafficSummary, consolidation.export_traffic, {"window": window})
    curate = stage("curate", config.curate, CurateSummary, consolidation.curate, {"traffic": traffic})
    annotate = stage("annotate", config.annotate, AnnotateSummary, consolidation.annotate, {"prompts": curate})

    # Pre-herding: reward models interpolate what people preferred; the best of n replies become examples.
    learned: Inputs = {"pairs": annotate, "traffic": traffic, "prompts": curate}
    compared = {f"generation {past.generation}": f"{past.rewards.name} {past.pairs.name}" for past in shop.past}
    reward = stage("reward", shop.reward_settings, RewardSummary, preherding.train_rewards, learned, models | compared)
    fresh: Inputs = {"prompts": curate, "judge": reward}
    asks = models | shop.scored_by
    rejection = stage("rejection_sampling", shop.rejection_settings, RejectionSummary, preherding.reject, fresh, asks)

    # Herding: a careful step uphill.
    examples: Inputs = {"selected": rejection, "rewrites": annotate, **fresh}
    sft = stage("sft", shop.sft_settings, TrainingSummary, herding.train_sft, examples)
    preferred: Inputs = {"model": sft, "pairs": annotate, "judge": reward}
    dpo = stage("dpo", config.dpo, DPOSummary, herding.train_dpo, preferred)
    rl = stage("rl", config.rl, RLSummary, herding.train_rl, {"model": dpo, "scored": rejection, **fresh}, asks)

    # Evaluation: how far the reward could be trusted, offline, then the gate, then people.
    climbed: Inputs = {"scored": rejection, "start": dpo, "policy": rl, **fresh}
    overoptimisation = stage(
        "overoptimisation", config.overoptimisation, OveroptimisationSummary, evaluation.watch_optimisation, climbed,
        asks,
    )  # fmt: skip
    answering: Inputs = {"model": rl, **fresh}
    offline = stage("offline", config.offline, OfflineSummary, evaluation.evaluate_offline, answering, asks)
    watched: Inputs = {
        "pairs": annotate,
        "selected": rejection,
        "sft": sft,
        "dpo": dpo,
        "rl": rl,
        "replies": offline,
        "prompts": curate,
    }
    style = stage("style", config.style, StyleSummary, evaluation.watch_style, watched)
    judged: Inputs = {"offline": offline, "style": style, "reward": reward}
    evidence: Inputs = {**judged, "climbed": overoptimisation, "policy": rl}
    gate = stage("gate", config.gate, GateDecision, evaluation.decide, evidence)
    allowed: Inputs = {"model": rl, "prompts": curate, "gate": gate, "window": window}
    release = stage("release", config.experiment, BankSummary, online.release, allowed)
    met: Inputs = {"bank": release} if config.world else {"bank": release, "model": rl}
    live = stage("live", config.world or nothing, LiveSummary, online.live, met)
    lived: Inputs = {"live": live, "bank": release}
    experiment = stage("experiment", config.experiment, ExperimentSummary, online.analyse, lived)
    return (window, traffic, curate, annotate, reward, rejection, sft, dpo, rl, overoptimisation, offline, style,
            gate, release, live, experiment)  # fmt: skip


def turn(
    workspace: Workspace,
    config: FlywheelConfig,
    store: EventStore,
    people: People,
    number: int,
    *,
    until: str | None = None,
    oracle: Oracle | None = None,
) -> LedgerRow | None:
    """Turn the flywheel once: run what is not done yet, write the ledger's row, promote or roll back.

    With `until`, stop after that stage and return None. A model that the gate stopped meets no users: its row has no
    experiment. Raises `Waiting` where people have to act first, and can then be called again.
    """
    shop = Workshop(workspace, config, store, people, number)
    stages = compose(config, number, shop)
    if until is not None and until not in (names := [stage.name for stage in stages]):
        raise FlywheelError(f"there is no stage {until!r}; stages are {', '.join(names)}.")
    check_sizes(config, shop.parent_folder)
    done: dict[str, Artifact[Any]] = {}
    for stage in stages:
        done[stage.name] = shop.runner.run(stage)
        if stage.name == until:
            return None
        if stage.name == "gate" and not may_meet_users(config, done["gate"].summary.decision):
            break
    bank = shop.bank(done["release"]) if "experiment" in done else None
    truth = oracle(bank) if bank and oracle else None
    row = bookkeeping.row(number, shop, done, truth)
    if row.verdict == "promote":  # before the ledger, whose row ends the generation: a kill between repeats this
        moment = done["window"].summary.starts + 2 * WEEK if config.world else datetime.now(UTC)
        registry.promote(workspace.registry, release_of(workspace, row), row.verdict_reason, moment)
    ledger.append(workspace.ledger, row)
    announce("verdict", f"{row.verdict or 'no experiment'}: {row.verdict_reason}")
    return row


def may_meet_users(config: FlywheelConfig, decision: str) -> bool:
    """A model that ships does; one that is held does where `gate.held` says that users decide; a rejected one never."""
    users_decide = config.gate.held == "experiment" or (config.gate.held == "simulated" and config.world is not None)
    return decision == "ship" or (decision == "hold" and users_decide)


def plan(workspace: Workspace, config: FlywheelConfig, number: int) -> tuple[Stage[Any], ...]:
    """The stages of generation `number` with their identities; nothing is loaded or run."""
    return compose(config, number, Workshop(workspace, config, None, None, number))


def release_of(workspace: Workspace, row: LedgerRow) -> registry.Release:
    """The model that a generation made, as the registry names it."""
    folder = workspace.artifacts / row.stages["rl"] / "model"
    return registry.Release(
        generation=row.generation, model=row.model, folder=folder.relative_to(workspace.root).as_posix()
    )
