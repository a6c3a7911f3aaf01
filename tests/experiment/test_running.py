"""Experiments in service: what may start, that ramping moves nobody, and that stopping is final."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from characterflywheel.errors import FlywheelError
from characterflywheel.experiment.assignment import assign
from characterflywheel.experiment.running import Arm, ramp, start, stop
from characterflywheel.service_records import Experiment
from characterflywheel.store import EventStore

AT = datetime(2026, 1, 5, tzinfo=UTC)
LATER = AT + timedelta(days=1)
TENTHS = {"control": Arm("base", 0.1), "treatment": Arm("gen1", 0.1)}
MODELS = {"base", "gen1"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EventStore]:
    with EventStore.open(tmp_path / "flywheel.db") as opened:
        yield opened


class Book:
    """Experiments in memory, for properties that need no disk."""

    def __init__(self) -> None:
        self.rows: dict[str, Experiment] = {}

    def experiments(self) -> dict[str, Experiment]:
        return {row.name: row for row in self.rows.values()}

    def save_experiment(self, experiment: Experiment) -> None:
        self.rows.setdefault(experiment.id, experiment)


def test_an_experiment_is_started_ramped_and_stopped(store: EventStore) -> None:
    started = start(store, "gen1", TENTHS, AT, MODELS)
    assert started.shares == {"control": 0.1, "treatment": 0.1}
    assert started.models == {"control": "base", "treatment": "gen1"}
    assert (started.state, started.salt, started.started_at) == ("running", "gen1", AT)
    ramped = ramp(store, "gen1", {"treatment": 0.4}, LATER)
    assert ramped.shares == {"control": 0.1, "treatment": 0.4}
    assert (ramped.salt, ramped.started_at, ramped.created_at) == ("gen1", AT, LATER)
    assert ramp(store, "gen1", {"treatment": 0.4}, LATER + timedelta(days=1)) == ramped
    stopped = stop(store, "gen1", LATER)
    assert (stopped.state, stopped.shares) == ("stopped", ramped.shares)
    assert stop(store, "gen1", LATER + timedelta(days=1)) == stopped
    assert store.experiments() == {"gen1": stopped}


def test_what_was_stopped_stays_stopped(store: EventStore) -> None:
    start(store, "gen1", TENTHS, AT, MODELS)
    stop(store, "gen1", LATER)
    with pytest.raises(FlywheelError, match="'gen1' is stopped, and a name is used once"):
        start(store, "gen1", TENTHS, LATER, MODELS)
    with pytest.raises(FlywheelError, match="was stopped at"):
        ramp(store, "gen1", {"treatment": 0.2}, LATER)
    with pytest.raises(FlywheelError, match="no experiment 'gen2'; there are gen1"):
        stop(store, "gen2", LATER)


@pytest.mark.parametrize(
    ("name", "arms", "message"),
    [
        ("x", {"control": Arm("base", 0.1)}, "arms control, must be control and treatment"),
        ("x", {}, "arms none"),
        ("x", {**TENTHS, "third": Arm("base", 0.1)}, "arms control, third, treatment"),
        ("x", {**TENTHS, "treatment": Arm("gen9", 0.1)}, "models gen9 are not in service; there are base, gen1"),
        ("x", {**TENTHS, "treatment": Arm("gen1", 0.95)}, "sum to 1.05"),
        ("x", {**TENTHS, "treatment": Arm("gen1", -0.1)}, r"must be in \[0, 1\]"),
        ("x", {**TENTHS, "treatment": Arm("gen1", float("nan"))}, r"must be in \[0, 1\]"),
        ("x", {"control": Arm("base", 0), "treatment": Arm("gen1", 0)}, "shares of all arms are 0"),
        ("../x", TENTHS, "begins with a letter or a digit"),
        ("", TENTHS, "begins with a letter or a digit"),
    ],
)
def test_an_experiment_that_makes_no_sense_does_not_start(
    store: EventStore, name: str, arms: dict[str, Arm], message: str
) -> None:
    with pytest.raises(FlywheelError, match=message):
        start(store, name, arms, AT, MODELS)
    assert store.experiments() == {}


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"treatment": 0.05}, "must be at least its 0.1"),
        ({"treatment": 0.95}, "sum to 1.05"),
        ({"other": 0.2}, "no arm other; it has control, treatment"),
        ({"treatment": float("nan")}, r"must be in \[0, 1\]"),
    ],
)
def test_a_ramp_that_would_move_users_is_refused(store: EventStore, shares: dict[str, float], message: str) -> None:
    started = start(store, "gen1", TENTHS, AT, MODELS)
    with pytest.raises(FlywheelError, match=message):
        ramp(store, "gen1", shares, LATER)
    assert store.experiments()["gen1"] == started


@given(st.lists(st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)), min_size=2, max_size=5))
def test_ramping_never_moves_anybody(steps: list[tuple[float, float]]) -> None:
    book = Book()
    climbing = list(zip(*map(sorted, zip(*steps, strict=True)), strict=True))
    first = {"control": Arm("base", climbing[0][0]), "treatment": Arm("gen1", max(climbing[0][1], 0.01))}
    one = start(book, "gen1", first, AT)
    users = [f"user-{n}" for n in range(200)]
    met = {user: assign(user, one.salt, one.shares) for user in users}
    for control, treatment in climbing:
        one = ramp(book, "gen1", {"control": control, "treatment": max(treatment, 0.01)}, LATER)
        now = {user: assign(user, one.salt, one.shares) for user in users}
        assert all(now[user] == arm for user, arm in met.items() if arm)
        met = now


def test_of_two_changes_at_once_one_is_refused() -> None:
    class Hasty(Book):
        """Another process changes the experiment between this one's look and its change."""

        def save_experiment(self, experiment: Experiment) -> None:
            if len(self.rows) == 1:
                super().save_experiment(experiment.model_copy(update={"shares": {"control": 0.1, "treatment": 0.9}}))
            super().save_experiment(experiment)

    book = Hasty()
    start(book, "gen1", TENTHS, AT)
    with pytest.raises(FlywheelError, match="changed by somebody else"):
        ramp(book, "gen1", {"treatment": 0.2}, LATER)
    assert book.experiments()["gen1"].shares["treatment"] == 0.9
