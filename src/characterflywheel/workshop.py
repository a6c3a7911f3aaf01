"""The work of each stage of a generation: reads its declared inputs, calls the stage's own package (see `generation`).

Models, encoder and reward models are loaded when first needed and kept until a training stage needs the memory.
"""

import hashlib
import json
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import ledger, tables
from .annotation.candidates import RewritePolicy
from .annotation.stage import AnnotateSummary, annotate
from .characters import load_characters, roster, system_prompt
from .config import FlywheelConfig, RewardConfig
from .curation.stage import CurateSummary, curate
from .errors import FlywheelError, Waiting
from .evaluation.stage import OfflineSummary, Reply, evaluate_offline
from .experiment.stage import BankSummary, ExperimentSummary, analyse, load_bank, make_bank, name_arms
from .llm.base import ChatModel, Sampling
from .llm.ct2 import CTranslate2Model
from .llm.encoder import Encoder, shared_encoder
from .llm.identity import identity
from .llm.models import base_model_folder, encoder_folder
from .llm.native import NativeModel
from .people import Bank, People
from .pipeline import Artifact, Runner, Work, write_atomically
from .progress import announce, progress
from .records import (
    Candidate,
    Character,
    Example,
    Message,
    Preference,
    Prompt,
    Record,
    Rollout,
    SetAside,
    Signal,
    User,
)
from .release import registry
from .release.gate import Change, Gained, GateDecision, GateEvidence, StyleChange, decide
from .reward.composite import RewardModels, precision_of
from .reward.history import Past
from .reward.judge import RewardSummary
from .reward.overoptimisation.stage import OveroptimisationSummary, measure_overoptimisation
from .reward.stage import train_rewards
from .safety import SafetyPolicy
from .serving.chat import ChatService
from .store import EventStore, Position
from .store.continued import continued
from .store.export import conversations_from_export
from .style.stage import StyleSummary, watch_style
from .training.dpo import DPOSummary, train_dpo
from .training.rejection_sampling import RejectionSummary, reject
from .training.rl import RLSummary, choose_prompts, train_rl
from .training.sft import TrainingSummary, train_sft
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


class WindowSummary(Record):
    """The stretch of the event store that is this generation's traffic: rows after `after` up to `until`."""

    after: Position
    until: Position
    starts: datetime

    def line(self) -> str:
        return (
            f"{self.until.messages - self.after.messages} messages, {self.until.signals - self.after.signals} signals"
        )


class TrafficSummary(Record):
    """What the window held, of users who consent to training."""

    conversations: int
    users: int
    messages: int
    signals: dict[str, int]

    def line(self) -> str:
        signals = ", ".join(f"{kind} {n}" for kind, n in self.signals.items())
        return f"{self.conversations} conversations of {self.users} users, {self.messages} messages; {signals}"


class LiveSummary(Record):
    """Where the event store stood when the experiment's days were over."""

    until: Position

    def line(self) -> str:
        return f"{self.until.messages} messages, {self.until.exposures} exposures in the store"


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
        return {id: one for id, one in known.items() if self._fits(one)}

    def _fits(self, character: Character) -> bool:
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
            models = self.config.models
            self._models[folder] = BACKENDS[models.backend].load(
                folder, name, device=self.device, max_prompt_tokens=models.max_prompt_tokens, threads=self.threads,
                batch_replies=models.batch_replies,
            )  # fmt: skip
        return self._models[folder]

    @property
    def parent_model(self) -> ChatModel:
        return self.model(self.parent_folder, self.parent.name)

    def pool(self) -> dict[str, ChatModel]:
        """The policies that propose replies: the model in service, and the same told how to write."""
        return {"parent": self.parent_model, "coached": RewritePolicy(self.parent_model)}

    def rewards(self, work: Work) -> "RewardModels | RemoteRewards":
        """The reward models that are a stage's `judge`: loaded here, or the same on the server that config names.

        Who computes, and how exactly, is noted for the stage's `artifact.json`.
        """
        artifact, server = work.inputs["judge"], self.config.reward.server
        if server is not None and not server.startswith("vllm+"):
            from .reward.remote import connect  # noqa: PLC0415 - only where a server is asked
            from .reward.wire import content_of  # noqa: PLC0415

            remote = connect(server, artifact.folder.name, content_of(artifact.record.outputs))
            work.notes["scores"] = f"flywheel score, {remote.card.precision}"
            return remote
        models = RewardModels.load(artifact.folder, self.encoder, self.threads, self.device)
        work.notes["scores"] = f"here, {precision_of(models.pointwise)}"
        if server is not None:
            from .reward.vllm import served  # noqa: PLC0415

            models.pointwise = served(models.pointwise, server)
            work.notes["scores"] += "; pointwise: vLLM"
        return models

    # Data consolidation

    def open_window(self, work: Work) -> WindowSummary:
        """Let people talk to the model in service, then close the window at what the store holds."""
        starts = WORLD_BEGINS + (self.number - 1) * 2 * WEEK if self.config.world else datetime.now(UTC)
        after = Position(messages=0, signals=0, exposures=0)
        if self.previous != "start":
            record = json.loads((self.workspace.artifacts / self.previous / "artifact.json").read_text("utf-8"))
            after = Position.model_validate(record["summary"]["until"])
        sampling = Sampling(temperature=self.config.serving.temperature, max_tokens=self.config.serving.max_tokens)
        self._claim(work)
        service = ChatService(
            self.store, {self.parent.name: self.parent_model}, self.parent.name, self.safety, sampling, work.seed
        )
        approved = [c for c in self.characters.values() if c.safety == "approved" and self._fits(c)]
        self.people.talk(service, approved, self.number, starts)
        until = self.store.position()
        if until.messages <= after.messages:  # less where the newest rows were erased
            raise Waiting("no message has come in since the last window: serve or import traffic, then run again.")
        return WindowSummary(after=after, until=until, starts=starts)

    def export_traffic(self, work: Work) -> TrafficSummary:
        window: WindowSummary = work.inputs["window"].summary
        self.store.export(work.folder, window.after, window.until)
        told = tables.read(work.folder / "signals.parquet", Signal)
        conversations = conversations_from_export(work.folder)
        if self.config.world is None:
            within = timedelta(hours=self.config.traffic.continue_hours)
            told += continued(conversations, told, window.starts, within)
            tables.write(work.folder / "signals.parquet", Signal, told)
        signals = sorted(signal.kind for signal in told)
        if not conversations:
            raise FlywheelError(
                f"the window holds no traffic of consenting users: serve or import some into {self.workspace.root}."
            )
        return TrafficSummary(
            conversations=len(conversations), users=len(tables.read(work.folder / "users.parquet", User)),
            messages=len(tables.read(work.folder / "messages.parquet", Message)),
            signals={kind: signals.count(kind) for kind in dict.fromkeys(signals)},
        )  # fmt: skip

    def curate(self, work: Work) -> CurateSummary:
        return curate(work, self.config.curate, work.inputs["traffic"].folder, self.encoder, self.known_characters)

    def annotate(self, work: Work) -> AnnotateSummary:
        """Alternatives from the pool, judged and ranked by annotators, become preference pairs and rewrites."""
        world, config = self.config.world, self.config.annotate
        reviewers = [f"annotator-{i + 1}" for i in range(world.annotators if world else config.reviewers)]
        prompts = tables.read(work.inputs["prompts"] / "prompts.parquet", Prompt)
        with progress("annotate") as advance:
            return annotate(work, config, prompts, self.pool(), self.known_characters, self.people, reviewers, advance)

    # Pre-herding

    def train_rewards(self, work: Work) -> RewardSummary:
        self._models.clear()
        traffic = work.inputs["traffic"].folder
        prompts = tables.read(work.inputs["prompts"] / "prompts.parquet", Prompt)
        judged_on = {p.user_id for p in prompts if p.split in ("evaluate", "experiment")}
        everything = conversations_from_export(traffic, alternatives=True)  # what was regenerated away was judged too
        conversations = [c for c in everything if c.user_id not in judged_on]
        with progress("reward") as advance:
            return train_rewards(
                work, self.config.reward, tables.read(work.inputs["pairs"] / "pairs.parquet", Preference),
                conversations, tables.read(traffic / "signals.parquet", Signal),
                self.parent_folder, self.encoder, generation=self.number, past=self.past, threads=self.threads,
                device=self.device, on_progress=advance,
            )  # fmt: skip

    def reject(self, work: Work) -> RejectionSummary:
        prompts = tables.read(work.inputs["prompts"] / "prompts.parquet", Prompt)
        judge = self.rewards(work)
        with progress("rejection_sampling") as advance:
            return reject(work, self.config.rejection_sampling, prompts, self.pool(), judge, self.safety, advance)

    # Herding

    def train_sft(self, work: Work) -> TrainingSummary:
        """On what rejection sampling accepted and what annotators rewrote, but for the gold model's users."""
        self._models.clear()
        examples = tables.read(work.inputs["selected"] / "examples.parquet", Example)
        aside = _set_aside(work)
        rewrites = tables.read(work.inputs["rewrites"] / "rewrites.parquet", Example)
        examples += [example for example in rewrites if example.user_id not in aside]
        with progress("sft") as advance:
            return train_sft(
                work, self.config.sft, self.parent_folder, examples, threads=self.threads, device=self.device,
                on_progress=advance,
            )  # fmt: skip

    def train_dpo(self, work: Work) -> DPOSummary:
        """On what annotators preferred, but for the gold model's users."""
        aside = _set_aside(work)
        pairs = tables.read(work.inputs["pairs"] / "pairs.parquet", Preference)
        pairs = [pair for pair in pairs if pair.user_id not in aside]
        with progress("dpo") as advance:
            return train_dpo(
                work, self.config.dpo, work.inputs["model"] / "model", pairs, threads=self.threads,
                device=self.device, on_progress=advance,
            )  # fmt: skip

    def train_rl(self, work: Work) -> RLSummary:
        """On prompts whose candidates' scores vary most, with the pointwise model as the reward."""
        config, candidates = self.config.rl, _candidates(work)
        prompts = tables.read(work.inputs["prompts"] / "prompts.parquet", Prompt)
        wanted = config.steps * config.prompts_per_step
        chosen = choose_prompts(prompts, candidates, wanted, config.ordinary_share, work.seed)
        with progress("rl") as advance:
            return train_rl(
                work, config, work.inputs["model"] / "model", chosen, self.rewards(work).pointwise,
                self.safety, threads=self.threads, batch_replies=self.config.models.batch_replies, device=self.device,
                on_progress=advance,
            )  # fmt: skip

    # Evaluation

    def watch_optimisation(self, work: Work) -> OveroptimisationSummary:
        """How far gold reward followed the reward that selection and RL climbed."""
        self._models.clear()
        prompts = tables.read(work.inputs["prompts"] / "prompts.parquet", Prompt)
        rollouts = tables.read(work.inputs["policy"] / "rollouts.parquet", Rollout)
        judge = self.rewards(work)
        judged: RewardSummary = work.inputs["judge"].summary
        with progress("overoptimisation") as advance:
            return measure_overoptimisation(
                work, self.config.overoptimisation, self.config.rl, prompts, _candidates(work), rollouts,
                work.inputs["start"] / "model", judge.pointwise, judge.gold,
                gold_accuracy=judged.gold.accuracy if judged.gold else None, threads=self.threads,
                batch_replies=self.config.models.batch_replies, device=self.device, on_progress=advance,
            )  # fmt: skip

    def evaluate_offline(self, work: Work) -> OfflineSummary:
        prompts = self._split(work, "evaluate")
        new = self.model(work.inputs["model"] / "model", self.model_name)
        with progress("offline") as advance:
            return evaluate_offline(
                work, self.config.offline, prompts, self.parent_model, new, self.rewards(work),
                self.known_characters, advance, self.safety,
            )  # fmt: skip

    def watch_style(self, work: Work) -> StyleSummary:
        """Chosen against rejected, accepted against rejected, and each checkpoint against the one before."""
        prompts = {p.id: p for p in tables.read(work.inputs["prompts"] / "prompts.parquet", Prompt)}
        replies = tables.read(work.inputs["replies"] / "replies.parquet", Reply)
        told = {policy: [(r.prompt_id, r.text) for r in replies if r.policy == policy] for policy in ("old", "new")}
        asked = [prompts[i] for i, _ in told["old"][: self.config.style.prompts]]
        checkpoints = {self.parent.name: told["old"]}
        for name in ("sft", "dpo"):
            folder = work.inputs[name] / "model"
            checkpoints[name] = self._answer(folder, name, asked, work.seed)
            self._models.pop(folder)
        checkpoints[self.model_name] = told["new"]
        selected = work.inputs["selected"]
        return watch_style(
            work, tables.read(work.inputs["pairs"] / "pairs.parquet", Preference),
            tables.read(selected / "accepted.parquet", Candidate),
            tables.read(selected / "rejected.parquet", Candidate), prompts, checkpoints, self.config.style.phrases,
        )  # fmt: skip

    def decide(self, work: Work) -> GateDecision:
        offline: OfflineSummary = work.inputs["offline"].summary
        reward: RewardSummary = work.inputs["reward"].summary
        style: StyleSummary = work.inputs["style"].summary
        climbed: OveroptimisationSummary = work.inputs["climbed"].summary
        steered = offline.steerability
        evidence = GateEvidence(
            win_rates={
                source: {"pointwise": rate.pointwise, "pairwise": rate.pairwise}
                for source, rate in (("user", offline.win_rate.user), ("internal", offline.win_rate.internal))
            },
            production={name: Change(old=m.before, new=m) for name, m in offline.production.items()},
            instruction_following=Change(old=steered.instruction_following.before, new=steered.instruction_following),
            instruction_violation=Change(old=steered.instruction_violation.before, new=steered.instruction_violation),
            style={
                shift.feature: StyleChange(old=shift.before, new=shift.after)
                for shift in style.drift
                if shift.before is not None and shift.after is not None
            },
            reward_accuracy={"pointwise": reward.pointwise_accuracy, "pairwise": reward.pairwise_accuracy},
            gained=Gained.of(climbed.rl, climbed.gold_accuracy) if self.config.reward.gold_share else None,
        )
        return decide(self.config.gate, evidence)

    def release(self, work: Work) -> BankSummary:
        """Put the new model into an arm beside the model in service."""
        window: WindowSummary = work.inputs["window"].summary
        name = f"{self.model_name}-against-{self.parent.name}"
        if self.config.world is None:  # real users meet the models themselves
            return name_arms(work, self.config.experiment, name, self.parent.name, self.model_name, window.starts)
        new = self.model(work.inputs["model"] / "model", self.model_name)
        with progress("release") as advance:
            return make_bank(
                work, self.config.experiment, name, self._split(work, "experiment"), self.parent_model, new,
                self.known_characters, window.starts + WEEK, advance,
            )  # fmt: skip

    def bank(self, artifact: Artifact[BankSummary]) -> Bank:
        return load_bank(artifact.folder, self.known_characters)

    def live(self, work: Work) -> LiveSummary:
        self._claim(work)
        if self.config.world is None:  # the chat service finds the new model through the registry
            folder = (work.inputs["model"] / "model").relative_to(self.workspace.root).as_posix()
            release = registry.Release(generation=self.number, model=self.model_name, folder=folder)
            registry.offer(self.workspace.registry, release, "for its experiment", datetime.now(UTC))
        ended = self.people.live(self.bank(work.inputs["bank"]))
        return LiveSummary(until=self.store.position(ended))

    def analyse(self, work: Work) -> ExperimentSummary:
        live: LiveSummary = work.inputs["live"].summary
        bank: BankSummary = work.inputs["bank"].summary
        export = work.partial / "export"
        nothing = Position(messages=0, signals=0, exposures=0)
        self.store.export(export, nothing, live.until, consenting_only=False, texts=False)
        return analyse(work, self.config.experiment, bank.experiment, export)

    def _claim(self, work: Work) -> None:
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

    def _split(self, work: Work, split: str) -> list[Prompt]:
        return [p for p in tables.read(work.inputs["prompts"] / "prompts.parquet", Prompt) if p.split == split]

    def _answer(self, folder: Path, name: str, prompts: list[Prompt], seed: int) -> list[tuple[str, str]]:
        """One reply to each prompt, sampled as offline evaluation samples."""
        config = self.config.offline
        sampling = Sampling(temperature=config.temperature, max_tokens=config.max_tokens)
        replies = self.model(folder, name).complete(
            [p.messages for p in prompts], sampling=sampling, seeds=[seed + i for i in range(len(prompts))]
        )
        return [(p.id, several[0].text) for p, several in zip(prompts, replies, strict=True)]


def _set_aside(work: Work) -> set[str]:
    """The users from whose comparisons only the gold model learns."""
    return {row.user_id for row in tables.read(work.inputs["judge"] / "gold.parquet", SetAside)}


def _candidates(work: Work) -> list[Candidate]:
    """All that rejection sampling drew."""
    scored = work.inputs["scored"]
    return [c for name in ("accepted", "rejected") for c in tables.read(scored / f"{name}.parquet", Candidate)]
