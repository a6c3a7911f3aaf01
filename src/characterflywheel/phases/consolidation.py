"""Data consolidation: people talk, their traffic is curated, annotators compare replies (PAPER sections 1 and 2)."""

import json
from datetime import UTC, datetime, timedelta

from .. import tables
from ..annotation import stage as annotation
from ..curation import stage as curation
from ..errors import FlywheelError, Waiting
from ..llm.base import Sampling
from ..pipeline import Work
from ..progress import progress
from ..records import Message, Prompt, Record, Signal, User
from ..serving.chat import ChatService
from ..store import Position
from ..store.continued import continued
from ..store.export import conversations_from_export
from ..workshop import WEEK, WORLD_BEGINS, Workshop


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


def open_window(shop: Workshop, work: Work) -> WindowSummary:
    """Let people talk to the model in service, then close the window at what the store holds."""
    starts = WORLD_BEGINS + (shop.number - 1) * 2 * WEEK if shop.config.world else datetime.now(UTC)
    after = Position(messages=0, signals=0, exposures=0)
    if shop.previous != "start":
        record = json.loads((shop.workspace.artifacts / shop.previous / "artifact.json").read_text("utf-8"))
        after = Position.model_validate(record["summary"]["until"])
    sampling = Sampling(temperature=shop.config.serving.temperature, max_tokens=shop.config.serving.max_tokens)
    shop.claim(work)
    service = ChatService(
        shop.store, {shop.parent.name: shop.parent_model}, shop.parent.name, shop.safety, sampling, work.seed
    )
    approved = [c for c in shop.characters.values() if c.safety == "approved" and shop.fits(c)]
    shop.people.talk(service, approved, shop.number, starts)
    until = shop.store.position()
    if until.messages <= after.messages:  # less where the newest rows were erased
        raise Waiting("no message has come in since the last window: serve or import traffic, then run again.")
    return WindowSummary(after=after, until=until, starts=starts)


def export_traffic(shop: Workshop, work: Work) -> TrafficSummary:
    window: WindowSummary = work.inputs["window"].summary
    shop.store.export(work.folder, window.after, window.until)
    told = tables.read(work.folder / "signals.parquet", Signal)
    conversations = conversations_from_export(work.folder)
    if shop.config.world is None:
        within = timedelta(hours=shop.config.traffic.continue_hours)
        told += continued(conversations, told, window.starts, within)
        tables.write(work.folder / "signals.parquet", Signal, told)
    signals = sorted(signal.kind for signal in told)
    if not conversations:
        raise FlywheelError(
            f"the window holds no traffic of consenting users: serve or import some into {shop.workspace.root}."
        )
    return TrafficSummary(
        conversations=len(conversations), users=len(tables.read(work.folder / "users.parquet", User)),
        messages=len(tables.read(work.folder / "messages.parquet", Message)),
        signals={kind: signals.count(kind) for kind in dict.fromkeys(signals)},
    )  # fmt: skip


def curate(shop: Workshop, work: Work) -> curation.CurateSummary:
    traffic = work.inputs["traffic"].folder
    return curation.curate(work, shop.config.curate, traffic, shop.encoder, shop.known_characters)


def annotate(shop: Workshop, work: Work) -> annotation.AnnotateSummary:
    """Alternatives from the pool, judged and ranked by annotators, become preference pairs and rewrites."""
    world, config = shop.config.world, shop.config.annotate
    reviewers = [f"annotator-{i + 1}" for i in range(world.annotators if world else config.reviewers)]
    prompts = tables.read(work.inputs["prompts"] / "prompts.parquet", Prompt)
    with progress("annotate") as advance:
        return annotation.annotate(
            work, config, prompts, shop.pool(), shop.known_characters, shop.people, reviewers, advance
        )
