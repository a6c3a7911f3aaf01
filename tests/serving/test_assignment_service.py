"""The service assigns as the experiment does, production users only; exposures once, changes within seconds."""

import time
from datetime import UTC, datetime

from characterflywheel.experiment.assignment import assign
from characterflywheel.records import User
from characterflywheel.service_records import Experiment
from characterflywheel.serving.assignment import Assigned, Assigner

AT = datetime(2026, 1, 5, tzinfo=UTC)
USERS = [User(id=f"user-{n}", population="user", created_at=AT) for n in range(2_000)]


class Book:
    """Experiments in memory, newest row by name, as the store gives them."""

    def __init__(self, *experiments: Experiment) -> None:
        self.held = {one.name: one for one in experiments}
        self.read = 0

    def experiments(self) -> dict[str, Experiment]:
        self.read += 1
        return dict(self.held)


def experiment(name: str, share: float = 0.1, state: str = "running") -> Experiment:
    return Experiment.model_validate(
        {
            "id": name, "name": name, "salt": f"salt of {name}", "shares": {"control": share, "treatment": share},
            "models": {"control": "old", "treatment": "new"}, "state": state, "started_at": AT, "created_at": AT,
        }
    )  # fmt: skip


def test_the_first_experiment_by_name_that_takes_a_user_serves_them() -> None:
    first, second = experiment("a", 0.2), experiment("b", 0.3)
    assigner = Assigner(Book(second, first))
    for user in USERS:
        arms = {one.name: assign(user.id, one.salt, one.shares) for one in (first, second)}
        found = assigner.arm_of(user)
        taken = next(((name, arm) for name, arm in arms.items() if arm), None)
        assert (found and (found.experiment, found.arm)) == taken
        assert found is None or found.model == {"control": "old", "treatment": "new"}[found.arm]


def test_testers_and_stopped_experiments_take_nobody() -> None:
    everybody = experiment("all", 0.5)
    assert all(Assigner(Book(everybody)).arm_of(user) for user in USERS)
    tester = User(id="user-1", population="internal", created_at=AT)
    assert Assigner(Book(everybody)).arm_of(tester) is None
    stopped = Assigner(Book(experiment("all", 0.5, "stopped")))
    assert not any(stopped.arm_of(user) for user in USERS)


def test_a_change_takes_effect_after_the_reload_time_and_moves_nobody() -> None:
    book, now = Book(experiment("a", 0.1)), [0.0]
    assigner = Assigner(book, reload_seconds=2, clock=lambda: now[0])
    before = {user.id: assigner.arm_of(user) for user in USERS}
    book.held["a"] = experiment("a", 0.3)
    assert {user.id: assigner.arm_of(user) for user in USERS} == before
    assert book.read == 1
    now[0] = 2.0
    after = {user.id: assigner.arm_of(user) for user in USERS}
    assert all(after[user] == arm for user, arm in before.items() if arm)
    assert sum(arm is not None for arm in after.values()) > 2 * sum(arm is not None for arm in before.values())
    assert book.read == 2


def test_an_experiment_begun_elsewhere_arrives_through_the_thread() -> None:
    book = Book()
    with Assigner(book, reload_seconds=0.01) as assigner:
        assert assigner.arm_of(USERS[0]) is None
        book.held["a"] = experiment("a", 0.5)
        deadline = time.monotonic() + 5
        while assigner.arm_of(USERS[0]) is None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert assigner.arm_of(USERS[0]) is not None


def test_an_exposure_is_one_row_for_a_user_and_an_experiment() -> None:
    assigner, arm = Assigner(Book()), Assigned("a", "control", "old")
    first = assigner.exposure("ada", arm, AT)
    assert first is not None
    again = assigner.exposure("ada", arm, AT)  # not durable yet: another request must write it too
    assert again is not None
    assert again.id == first.id
    assigner.exposed(first)
    assert assigner.exposure("ada", arm, AT) is None
    assert assigner.exposure("ada", Assigned("b", "control", "old"), AT) is not None
    assert assigner.exposure("bob", arm, AT) is not None
    restarted = Assigner(Book()).exposure("ada", arm, datetime(2027, 1, 1, tzinfo=UTC))
    assert restarted is not None
    assert restarted.id == first.id


def test_the_memory_of_exposures_has_a_bound() -> None:
    assigner, arm = Assigner(Book(), most_exposed=100), Assigned("a", "control", "old")
    for n in range(1_000):
        exposure = assigner.exposure(f"user-{n}", arm, AT)
        assert exposure is not None
        assigner.exposed(exposure)
    remembered = [n for n in range(1_000) if assigner.exposure(f"user-{n}", arm, AT) is None]
    assert 50 <= len(remembered) <= 100
    assert remembered[-1] == 999
