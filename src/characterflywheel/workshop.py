"""What the stages of one generation share: configuration, store, people, and the models loaded so far.

The work of each stage is in `phases`, by the paper's phases; `generation` puts the stages together. Models, encoder and
reward models are loaded when first needed and kept until a training stage needs the memory.
"""

import hashlib
import json
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import ledger, tables
from . import pool as policies
from .annotation.candidates import RewritePolicy
from .characters import load_characters, roster, system_prompt
from .config import FlywheelConfig, RejectionConfig, RewardConfig, SFTConfig
from .errors import FlywheelError
from .experiment.stage import BankSummary, load_bank
from .llm.base import ChatModel
from .llm.ct2 import CTranslate2Model
from .llm.encoder import Encoder, shared_encoder
from .llm.identity import identity
from .llm.models import base_model_folder, encoder_folder
from .llm.native import NativeModel
from .people import Bank, People
from .pipeline import Artifact, Runner, Work, write_atomically
from .progress import announce
from .records import Candidate, Character, Prompt, Record
from .release import registry
from .reward.composite import RewardModels, precision_of
from .reward.history import Past
from .safety import SafetyPolicy
from .store import EventStore
from .training import sources
from .workspace import Workspace

if TYPE_CHECKING:
    from .reward.remote import RemoteRewards

WORLD_BEGINS = datetime(2026, 1, 5, tzinfo=UTC)
WEEK = timedelta(days=7)
_TEMPLATE_TOKENS = 48  # the chat template around a system prompt, and the 16 tokens that a conversation needs
BACKENDS: dict[str, type[NativeModel | CTranslate2Model]] = {"native": NativeModel, "ctranslate2": CTranslate2Model}


class Parent(Record):
    """The model in service before this generation. `folder` is None for the base model, which config names."""

    generation: int
    name: str
    identity: str
    folder: str | None = None


def parent_of(workspace: Workspace, config: FlywheelConfig, number: int) -> Parent:
    """The model that serves when generation `number` begins: what verdicts and people have put into the registry.

    Raises:
        FlywheelError: the generation before has not been completed.
    """
    if number > 1 and number - 1 not in {row.generation for row in ledger.read(workspace.ledger)}:
        raise FlywheelError(f"generation {number} needs generation {number - 1} complete: run it first.")
    # a run killed after its own promotion does not become its own parent
    earlier = [release for release in registry.read(workspace.registry).serving if release.generation < number]
    if not earlier:
        return Parent(generation=0, name="base", identity=identity(config.models.base))
    last = earlier[-1]
    return Parent(
        generation=last.generation, name=last.model, identity=Path(last.folder).parent.name, folder=last.folder
    )


def open_rewards(
    config: FlywheelConfig, work: Work, encoder: Encoder, threads: int, device: str
) -> "RewardModels | RemoteRewards":
    """The reward models that are a stage's `judge`: loaded here, or the same on the server that config names.

    Who computes, and how exactly, is noted for the stage's `artifact.json`.
    """
    artifact, server = work.inputs["judge"], config.reward.server
    if server is not None and not server.startswith("vllm+"):
        from .reward.remote import connect  # noqa: PLC0415 - only where a server is asked
        from .reward.wire import content_of  # noqa: PLC0415

        remote = connect(server, artifact.folder.name, content_of(artifact.record.outputs))
        work.notes["scores"] = f"flywheel score, {remote.card.precision}"
        return remote
    models = RewardModels.load(artifact.folder, encoder, threads, device)
    work.notes["scores"] = f"here, {precision_of(models.pointwise)}"
    if server is not None:
        from .reward.vllm import served  # noqa: PLC0415

        models.pointwise = served(models.pointwise, server)
        work.notes["scores"] += "; pointwise: vLLM"
    return models


class Workshop:
    """What the stages of one generation share: configuration, store, people, and the models loaded so far."""

    def __init__(
        self, workspace: Workspace, config: FlywheelConfig, store: EventStore | None, people: People | None, number: int
    ) -> None:
        self.workspace, self.config, self.number = workspace, config, number
        self._store, self._people = store, people
        self.runner = Runner(workspace.artifacts, announce)
        self.parent = parent_of(workspace, config, number)
        self.model_name = f"gen{number}"
        self.threads, self.device = config.models.threads, config.models.device
        self.safety = SafetyPolicy()
        self._models: dict[Path, ChatModel] = {}

    @property
    def store(self) -> EventStore:
        assert self._store is not None, "planning opens no store"
        return self._store

    @property
    def people(self) -> People:
        assert self._people is not None, "planning meets no people"
        return self._people

    @cached_property
    def folder_characters(self) -> dict[str, Character]:
        return load_characters(self.workspace.characters)

    @cached_property
    def characters(self) -> dict[str, Character]:
        """Whom a simulated crowd may talk to. Real people choose in the chat service, which publishes at any time."""
        if self.config.world is None:
            return self.folder_characters
        if self._store is not None:
            return roster(self.folder_characters, self._store)
        events = self.workspace.events
        if isinstance(events, Path) and not events.is_file():
            return roster(self.folder_characters, None)
        with EventStore.open(events) as store:  # for a plan
            return roster(self.folder_characters, store)

    @cached_property
    def known_characters(self) -> dict[str, Character]:
        """Those that may be talked to, and every other that has been: retired, or brought along by an import."""
        known = self.store.characters() | roster(self.folder_characters, self.store)
        return {id: one for id, one in known.items() if self.fits(one)}

    def fits(self, character: Character) -> bool:
        """Whether prompts of every stage have room for a character's card; one person's long card stops no generation.

        The conversations of one that does not fit are left out like those of an unknown character.
        """
        if character.card is None:
            return True
        room = min(
            stage.max_prompt_tokens
            for stage in (self.config.models, self.config.reward, self.config.sft, self.config.dpo, self.config.rl)
        )
        tokens = len(self.tokenizer(system_prompt(character))["input_ids"]) + _TEMPLATE_TOKENS
        if tokens > room:
            announce(
                "characters",
                f"{character.id} is left out: its card has {tokens} tokens, the smallest max_prompt_tokens is {room}",
            )
        return tokens <= room

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer  # noqa: PLC0415

        return AutoTokenizer.from_pretrained(self.parent_folder)

    @cached_property
    def characters_identity(self) -> str:
        """A hash over every character, since each one's text is in the prompts."""
        text = json.dumps([c.model_dump(mode="json") for c in self.characters.values()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def models_identity(self) -> str:
        """A hash over how models are run and answer: what changes a sampled word but is no stage's own setting."""
        models = self.config.models.model_dump(exclude={"threads"})
        models |= {name: identity(models[name]) for name in ("base", "encoder")}
        text = json.dumps([models, self.config.serving.model_dump()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def reward_settings(self) -> RewardConfig:
        """The reward stage's settings as part of its identity: the backbone by its content, not by where it lies."""
        settings = self.config.reward
        return settings.model_copy(update={"backbone": settings.backbone and identity(settings.backbone)})

    @cached_property
    def rejection_settings(self) -> RejectionConfig:
        """Rejection sampling's settings as part of its identity: the pool's models by what they are."""
        return policies.settings(self.config.rejection_sampling, self.known_models)

    @cached_property
    def sft_settings(self) -> SFTConfig:
        """SFT's settings as part of its identity: files of examples by what is in them."""
        return sources.settings(self.config.sft)

    @cached_property
    def known_models(self) -> policies.Known:
        """The models that the pool may name beside the parent: the base, and what earlier generations made."""
        return policies.known_models(self.workspace, self.config.models.base, self.number)

    @property
    def scored_by(self) -> dict[str, str]:
        """What of who computes scores is part of an identity: `flywheel score` has this version's models and code,
        vLLM has its own."""
        server = self.config.reward.server
        return {"scores": "vllm"} if server is not None and server.startswith("vllm+") else {}

    @cached_property
    def previous(self) -> str:
        """The stage after which this generation's window begins: the experiment before, or nothing."""
        if self.number == 1:
            return "start"
        row = next(r for r in ledger.read(self.workspace.ledger) if r.generation == self.number - 1)
        # The crowd's seven days were spent on a bank of contexts, which is no fresh traffic; a live product's were.
        return row.stages["live" if self.config.world and "live" in row.stages else "window"]

    @cached_property
    def past(self) -> tuple[Past, ...]:
        """The generations before this one, whose reward models and held-out pairs are kept to compare with."""
        rows = [row for row in ledger.read(self.workspace.ledger) if row.generation < self.number]
        folder = self.workspace.artifacts
        return tuple(Past(r.generation, folder / r.stages["reward"], folder / r.stages["annotate"]) for r in rows)

    @cached_property
    def encoder(self) -> Encoder:
        return shared_encoder(encoder_folder(self.config.models.encoder), self.threads)

    @cached_property
    def parent_folder(self) -> Path:
        if self.parent.folder is None:
            return base_model_folder(self.config.models.base)
        return self.workspace.root / self.parent.folder

    def model(self, folder: Path, name: str) -> ChatModel:
        """The chat model in a folder, by the configured backend; kept loaded."""
        if folder not in self._models:
            self._models[folder] = self._load(folder, name)
        return self._models[folder]

    def _load(self, folder: Path, name: str) -> ChatModel:
        models = self.config.models
        return BACKENDS[models.backend].load(
            folder, name, device=self.device, max_prompt_tokens=models.max_prompt_tokens, threads=self.threads,
            batch_replies=models.batch_replies,
        )  # fmt: skip

    def unload(self, folder: Path | None = None) -> None:
        """Let go of a chat model, or of all: what is trained next needs the memory."""
        if folder is None:
            self._models.clear()
        else:
            self._models.pop(folder)

    @property
    def parent_model(self) -> ChatModel:
        return self.model(self.parent_folder, self.parent.name)

    def pool(self) -> dict[str, ChatModel]:
        """The policies that propose replies to annotators: the model in service, and the same told how to write."""
        return {"parent": self.parent_model, "coached": RewritePolicy(self.parent_model)}

    def selection_pool(self) -> policies.Pool:
        """The policies that propose replies to rejection sampling, as configured."""
        named = self.config.rejection_sampling.pool
        return policies.Pool(named, self.known_models, self.parent_folder, lambda: self.parent_model, self._load)

    def rewards(self, work: Work) -> "RewardModels | RemoteRewards":
        """The reward models that are a stage's `judge` (see `open_rewards`)."""
        return open_rewards(self.config, work, self.encoder, self.threads, self.device)

    def bank(self, artifact: Artifact[BankSummary]) -> Bank:
        return load_bank(artifact.folder, self.known_characters)

    def claim(self, work: Work) -> None:
        """Events cannot be taken back, so a week is lived under one configuration only.

        Raises:
            FlywheelError: this generation's week has begun under another one.
        """
        stage = work.folder.name.rpartition("-")[0]
        if self.config.world is None and stage == "window":  # what real people said is the same under any
            return
        file = self.workspace.artifacts / "weeks.json"
        weeks = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        begun = weeks.setdefault(f"{stage}-{self.number}", work.folder.name)
        if begun != work.folder.name:
            raise FlywheelError(
                f"the events of generation {self.number}'s {stage} were made under another configuration ({begun}), "
                "and events are never taken back: restore that configuration, or start in a new workspace."
            )
        write_atomically(file, json.dumps(weeks, indent=1) + "\n")

    def split(self, work: Work, split: str) -> list[Prompt]:
        return [p for p in tables.read(work.inputs["prompts"] / "prompts.parquet", Prompt) if p.split == split]


def candidates(work: Work) -> list[Candidate]:
    """All that rejection sampling drew."""
    scored = work.inputs["scored"]
    return [c for name in ("accepted", "rejected") for c in tables.read(scored / f"{name}.parquet", Candidate)]
