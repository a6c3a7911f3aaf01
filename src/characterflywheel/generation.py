"""One generation of the flywheel, top to bottom, in the paper's order and words: read this file first.

    data consolidation   window, traffic -> curate -> annotate
    pre-herding          reward -> rejection_sampling
    herding              sft -> dpo -> rl
    evaluation           offline, style -> gate -> release -> live -> experiment -> verdict

`compose` declares the stages and what each takes; `Workshop` does the work of each, with the functions of the
stage's own package. Stages never import one another; only this file puts them together.
"""

from collections.abc import Callable
from typing import Any

from . import bookkeeping, ledger
from .annotation.stage import AnnotateSummary
from .config import FlywheelConfig, Section
from .curation.stage import CurateSummary
from .errors import FlywheelError
from .evaluation.stage import OfflineSummary
from .experiment.stage import BankSummary, ExperimentSummary
from .ledger import LedgerRow, Truth
from .people import Bank, People
from .pipeline import Artifact, Stage
from .progress import announce
from .release import registry
from .release.gate import GateDecision
from .reward.stage import RewardSummary
from .store import EventStore
from .style.stage import StyleSummary
from .training.dpo import DPOSummary
from .training.rejection_sampling import RejectionSummary
from .training.rl import RLSummary
from .training.sft import TrainingSummary
from .workshop import WEEK, LiveSummary, TrafficSummary, WindowSummary, Workshop
from .workspace import Workspace

Oracle = Callable[[Bank], Truth]
"""What the embedded world knows and the pipeline never reads; noted in the ledger after the verdict."""


def compose(config: FlywheelConfig, number: int, shop: Workshop) -> tuple[Stage[Any], ...]:
    """The stages of generation `number`, in the order they run. Nothing is run or loaded here."""
    seed = config.seed
    models = {"parent": shop.parent.identity, "characters": shop.characters_identity, "models": shop.models_identity}

    # Data consolidation: people talk, traffic is curated into prompts, annotators compare replies.
    window = Stage("window", 1, config.world or Section(), WindowSummary, shop.open_window, seed, {},
                   {**models, "generation": str(number), "after": shop.previous})
    traffic = Stage("traffic", 1, Section(), TrafficSummary, shop.export_traffic, seed, {"window": window})
    curate = Stage("curate", 1, config.curate, CurateSummary, shop.curate, seed, {"traffic": traffic},
                   models)
    annotate = Stage("annotate", 1, config.annotate, AnnotateSummary, shop.annotate, seed,
                     {"prompts": curate}, models)

    # Pre-herding: reward models interpolate what people preferred; the best of n replies become examples.
    reward = Stage("reward", 1, config.reward, RewardSummary, shop.train_rewards, seed,
                   {"pairs": annotate, "traffic": traffic}, models)
    rejection = Stage("rejection_sampling", 1, config.rejection_sampling, RejectionSummary, shop.reject, seed,
                      {"prompts": curate, "judge": reward}, models)

    # Herding: a careful step uphill.
    sft = Stage("sft", 1, config.sft, TrainingSummary, shop.train_sft, seed,
                {"selected": rejection, "rewrites": annotate}, models)
    dpo = Stage("dpo", 1, config.dpo, DPOSummary, shop.train_dpo, seed, {"model": sft, "pairs": annotate})
    rl = Stage("rl", 1, config.rl, RLSummary, shop.train_rl, seed,
               {"model": dpo, "prompts": curate, "scored": rejection, "judge": reward}, models)

    # Evaluation: offline, then the gate, then people.
    offline = Stage("offline", 1, config.offline, OfflineSummary, shop.evaluate_offline, seed,
                    {"model": rl, "prompts": curate, "judge": reward}, models)
    style = Stage("style", 1, config.style, StyleSummary, shop.watch_style, seed,
                  {"pairs": annotate, "selected": rejection, "sft": sft, "dpo": dpo, "replies": offline,
                   "prompts": curate}, models)
    gate = Stage("gate", 1, config.gate, GateDecision, shop.decide, seed,
                 {"offline": offline, "style": style, "reward": reward})
    release = Stage("release", 1, config.experiment, BankSummary, shop.release, seed,
                    {"model": rl, "prompts": curate, "gate": gate, "window": window}, models)
    live = Stage("live", 1, config.world or Section(), LiveSummary, shop.live, seed, {"bank": release})
    experiment = Stage("experiment", 1, config.experiment, ExperimentSummary, shop.analyse, seed,
                       {"live": live, "bank": release})
    return (window, traffic, curate, annotate, reward, rejection, sft, dpo, rl, offline, style, gate,
            release, live, experiment)  # fmt: skip


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
    ledger.append(workspace.ledger, row)
    if row.verdict == "promote":
        moment = done["window"].summary.starts + 2 * WEEK
        registry.promote(workspace.registry, release_of(workspace, row), row.verdict_reason, moment)
    announce("verdict", f"{row.verdict or 'no experiment'}: {row.verdict_reason}")
    return row


def may_meet_users(config: FlywheelConfig, decision: str) -> bool:
    """A model that ships does; one that is held does where `gate.held` says that users decide; a rejected one never."""
    return decision == "ship" or (decision == "hold" and config.gate.held == "experiment")


def plan(workspace: Workspace, config: FlywheelConfig, number: int) -> tuple[Stage[Any], ...]:
    """The stages of generation `number` with their identities; nothing is loaded or run."""
    return compose(config, number, Workshop(workspace, config, None, None, number))


def release_of(workspace: Workspace, row: LedgerRow) -> registry.Release:
    """The model that a generation made, as the registry names it."""
    folder = workspace.artifacts / row.stages["rl"] / "model"
    return registry.Release(
        generation=row.generation, model=row.model, folder=folder.relative_to(workspace.root).as_posix()
    )
