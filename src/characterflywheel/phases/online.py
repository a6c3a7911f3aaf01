"""Online evaluation: the new model in an arm beside the old one, seven days, what came of it (PAPER section 7)."""

from datetime import UTC, datetime

from ..experiment import stage as experiment
from ..experiment.stage import BankSummary, ExperimentSummary
from ..pipeline import Work
from ..progress import progress
from ..records import Record
from ..release import registry
from ..store import Position
from ..workshop import WEEK, Workshop
from .consolidation import WindowSummary


class LiveSummary(Record):
    """Where the event store stood when the experiment's days were over."""

    until: Position

    def line(self) -> str:
        return f"{self.until.messages} messages, {self.until.exposures} exposures in the store"


def release(shop: Workshop, work: Work) -> BankSummary:
    """Put the new model into an arm beside the model in service."""
    window: WindowSummary = work.inputs["window"].summary
    name = f"{shop.model_name}-against-{shop.parent.name}"
    if shop.config.world is None:  # real users meet the models themselves
        return experiment.name_arms(
            work, shop.config.experiment, name, shop.parent.name, shop.model_name, window.starts
        )
    new = shop.model(work.inputs["model"] / "model", shop.model_name)
    with progress("release") as advance:
        return experiment.make_bank(
            work, shop.config.experiment, name, shop.split(work, "experiment"), shop.parent_model, new,
            shop.known_characters, window.starts + WEEK, advance,
        )  # fmt: skip


def live(shop: Workshop, work: Work) -> LiveSummary:
    shop.claim(work)
    if shop.config.world is None:  # the chat service finds the new model through the registry
        folder = (work.inputs["model"] / "model").relative_to(shop.workspace.root).as_posix()
        release = registry.Release(generation=shop.number, model=shop.model_name, folder=folder)
        registry.offer(shop.workspace.registry, release, "for its experiment", datetime.now(UTC))
    ended = shop.people.live(shop.bank(work.inputs["bank"]))
    return LiveSummary(until=shop.store.position(ended))


def analyse(shop: Workshop, work: Work) -> ExperimentSummary:
    live: LiveSummary = work.inputs["live"].summary
    bank: BankSummary = work.inputs["bank"].summary
    export = work.partial / "export"
    nothing = Position(messages=0, signals=0, exposures=0)
    shop.store.export(export, nothing, live.until, consenting_only=False, texts=False)
    return experiment.analyse(work, shop.config.experiment, bank.experiment, export)
