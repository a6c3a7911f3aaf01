"""An experiment on real people: started in the chat service's store, waited for, stopped, and judged."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from characterflywheel import workspace as workspaces
from characterflywheel.characters import bundled_characters
from characterflywheel.config import Section
from characterflywheel.errors import FlywheelError, Waiting
from characterflywheel.experiment import running
from characterflywheel.experiment.stage import BankSummary, ExperimentSummary
from characterflywheel.ids import derive_id
from characterflywheel.people import RealPeople
from characterflywheel.phases import online
from characterflywheel.phases.consolidation import WindowSummary
from characterflywheel.phases.online import LiveSummary
from characterflywheel.pipeline import Stage, Work
from characterflywheel.records import Conversation, Message, Record, User
from characterflywheel.release import registry
from characterflywheel.serving.assignment import Assigner
from characterflywheel.serving.backends import make_backends
from characterflywheel.store import EventStore, Position
from characterflywheel.workshop import Workshop

MONDAY = datetime(2026, 3, 2, 9, tzinfo=UTC)
DAY = timedelta(days=1)


class Nothing(Record):
    """The summary of a stage that only stands in for another."""


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.at = MONDAY

    def __call__(self) -> datetime:
        return self.at


@dataclass
class Product:
    """A workspace of real people, with the stages from release to experiment; `settings` are in its file."""

    root: Path
    store: EventStore
    clock: Clock

    def run(self) -> ExperimentSummary:
        """What `flywheel run` does from the release on."""
        workspace = workspaces.Workspace.open(self.root)
        config = workspace.config()
        people = RealPeople(workspace.annotation, self.store, self.clock)
        shop = Workshop(workspace, config, self.store, people, 1)

        def model(work: Work) -> Nothing:
            (work.folder / "model").mkdir()
            (work.folder / "model" / "config.json").write_text("{}")
            return Nothing()

        def stage(name: str, summary: Any, run: Any, inputs: dict[str, Stage[Any]], settings: Section) -> Stage[Any]:
            return Stage(name, 1, settings, summary, run, config.seed, inputs)

        nothing = Section()
        opened = WindowSummary(after=Position(), until=Position(), starts=MONDAY)
        window = stage("window", WindowSummary, lambda work: opened, {}, nothing)
        rl = stage("rl", Nothing, model, {}, config.rl)
        release = stage(
            "release", BankSummary, partial(online.release, shop), {"model": rl, "window": window}, config.experiment
        )
        live = stage("live", LiveSummary, partial(online.live, shop), {"bank": release, "model": rl}, nothing)
        lived = {"live": live, "bank": release}
        experiment = stage("experiment", ExperimentSummary, partial(online.analyse, shop), lived, config.experiment)
        for one in (window, rl, release, live):
            shop.runner.run(one)
        found: ExperimentSummary = shop.runner.run(experiment).summary
        return found

    def day(self, number: int, rng: random.Random) -> None:
        """A day of traffic: the treatment's users come back more often. Rows as the chat service writes them."""
        assigner, messages, exposures = Assigner(self.store), [], []
        for i in range(600):
            user = User(id=f"user-{i}", population="user", created_at=MONDAY)
            arm = assigner.arm_of(user)
            comes = 0.4 if arm and arm.arm == "treatment" else 0.1
            if number and rng.random() > comes:
                continue
            at = MONDAY + number * DAY + timedelta(seconds=60 + i)
            if arm and (exposure := assigner.exposure(user.id, arm, at)):
                exposures.append(exposure)
            said = Message(
                id=derive_id("m", i, number), conversation_id=f"c{i}", user_id=user.id, role="user", content="Hello",
                created_at=at,
            )  # fmt: skip
            served = (
                {"role": "assistant", "model": arm.model, "arm": arm.arm, "experiment": arm.experiment} if arm else {}
            )
            answer = said.model_copy(update={"id": derive_id("r", i, number), "role": "assistant", **served})
            messages += [said, answer]
        self.store.append(messages=messages, exposures=exposures)


@pytest.fixture
def product(tmp_path: Path) -> Iterator[Product]:
    made = workspaces.init(tmp_path / "w", "tiny")
    text = made.config_file.read_text()
    made.config_file.write_text(
        text.replace("# world = false", "world = false") + "\n[experiment]\narm_share = 0.5\nmin_users = 200\n"
    )
    pirate = bundled_characters()["pirate"]
    with EventStore.open(made.database) as store:
        store.add_characters([pirate])
        store.add_users(User(id=f"user-{i}", population="user", created_at=MONDAY) for i in range(600))
        store.add_conversations(
            Conversation(
                id=f"c{i}", user_id=f"user-{i}", character_id="pirate", character_version=pirate.version, source="user",
                created_at=MONDAY,
            )
            for i in range(600)
        )  # fmt: skip
        yield Product(tmp_path / "w", store, Clock())


def test_a_run_waits_for_the_days_and_then_comes_to_a_verdict(product: Product) -> None:
    with pytest.raises(Waiting, match="began 2026-03-02 09:00 UTC and lasts until 2026-03-09 09:00 UTC; 0 users"):
        product.run()
    (started,) = product.store.experiments().values()
    assert (started.name, started.state, started.started_at) == ("gen1-against-base", "running", MONDAY)
    assert started.models == {"control": "base", "treatment": "gen1"}
    assert started.shares == {"control": 0.5, "treatment": 0.5}
    rng = random.Random(1)
    for number in range(7):
        product.day(number, rng)
    product.clock.at = MONDAY + 7 * DAY - timedelta(seconds=1)
    with pytest.raises(Waiting):
        product.run()
    product.clock.at = MONDAY + 7 * DAY
    found = product.run()
    assert product.store.experiments()["gen1-against-base"].state == "stopped"
    assert found.verdict == "promote"
    assert found.users == 600
    assert found.breadth_lift.value is not None
    assert found.breadth_lift.value == pytest.approx((1 - 0.6**6) / (1 - 0.9**6) - 1, abs=0.5)
    assert found.depth_all.value == pytest.approx((1 + 6 * 0.4) / (1 + 6 * 0.1) - 1, abs=0.2)
    product.clock.at += 30 * DAY
    assert product.run() == found


def test_an_experiment_that_nobody_met_goes_on(product: Product) -> None:
    with pytest.raises(Waiting, match="0 users have met it"):
        product.run()
    product.clock.at = MONDAY + 8 * DAY
    with pytest.raises(Waiting, match="0 users have met it"):
        product.run()
    assert product.store.experiments()["gen1-against-base"].state == "running"


def test_the_chat_service_finds_the_new_model_while_the_old_one_serves(product: Product) -> None:
    with pytest.raises(Waiting):
        product.run()
    workspace = workspaces.Workspace.open(product.root)
    assert registry.read(workspace.registry).in_service is None
    backends = make_backends(workspace, workspace.config())
    assert backends.default == "base"
    assert "gen1" in backends.names


def test_what_happens_after_a_hand_stopped_it_does_not_count(product: Product) -> None:
    rng = random.Random(2)
    with pytest.raises(Waiting):
        product.run()
    product.day(0, rng)
    product.day(1, rng)
    running.stop(product.store, "gen1-against-base", MONDAY + 2 * DAY)
    product.day(3, rng)  # everybody meets the model in service
    product.clock.at = MONDAY + 4 * DAY
    found = product.run()
    assert sum(arm.messages for arm in found.arms) == product.store.position(MONDAY + 2 * DAY).messages // 2
    assert product.store.position().messages > product.store.position(MONDAY + 2 * DAY).messages


def test_another_configuration_cannot_take_over_a_running_experiment(product: Product) -> None:
    with pytest.raises(Waiting):
        product.run()
    file = product.root / "flywheel.toml"
    file.write_text(file.read_text() + "\n[rl]\nsteps = 9\n")
    with pytest.raises(FlywheelError, match="restore that configuration"):
        product.run()


def test_an_experiment_that_a_hand_started_under_its_name_is_not_taken_for_it(product: Product) -> None:
    arms = {"control": running.Arm("gen7", 0.1), "treatment": running.Arm("gen1", 0.1)}
    running.start(product.store, "gen1-against-base", arms, MONDAY)
    with pytest.raises(FlywheelError, match="is not what this generation compares"):
        product.run()
