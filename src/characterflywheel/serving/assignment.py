"""Which experiment a user is in, and which model answers: sticky, salted, independent (PAPER 7, DESIGN section 8).

Only production users are assigned. Experiments are tried in the order in which they were started, so that a later one
gets who is left, and the first that takes a user serves them. Nothing is stored but the exposure, one row for each
user and experiment.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import NamedTuple, Protocol, Self

from ..errors import FlywheelError
from ..experiment.assignment import place, territories
from ..ids import derive_id
from ..records import Exposure, User
from ..service_records import Experiment
from .reloaded import Reloaded

_REMEMBER_SECONDS = 60.0


class Assigned(NamedTuple):
    """A user's arm and the model that answers them."""

    experiment: str
    arm: str
    model: str


class Running(NamedTuple):
    """An experiment that takes users, ready to look up: arms with their half-open intervals of places."""

    name: str
    salt: str
    arms: tuple[tuple[str, float, float], ...]
    models: Mapping[str, str]

    @classmethod
    def of(cls, name: str, salt: str, shares: Mapping[str, float], models: Mapping[str, str]) -> "Running":
        """From shares of all users.

        Raises:
            FlywheelError: the shares do not fit (`experiment.assignment.territories`), or an arm has no model.
        """
        if unserved := sorted(set(shares) - set(models)):
            raise FlywheelError(f"experiment {name!r}: arms {unserved} have no model; name one for each arm.")
        arms = tuple((arm, begin, end) for arm, (begin, end) in territories(shares).items())
        return cls(name, salt, arms, models)


class ExperimentStore(Protocol):
    """What is needed of `store.EventStore`."""

    def experiments(self) -> dict[str, Experiment]: ...


def first_arm(user_id: str, experiments: Iterable[Running]) -> Assigned | None:
    """The arm of the first experiment that takes the user; None where none does."""
    for one in experiments:
        where = place(user_id, one.salt)
        for arm, begin, end in one.arms:
            if begin <= where < end:
                return Assigned(one.name, arm, one.models[arm])
    return None


def exposure_of(user_id: str, assigned: Assigned, at: datetime) -> Exposure:
    """The exposure of a user: its id is that of user and experiment, so however often it is written, it is one row."""
    return Exposure(
        id=derive_id("exposure", assigned.experiment, user_id), experiment=assigned.experiment, arm=assigned.arm,
        user_id=user_id, created_at=at,
    )  # fmt: skip


class Assigner:
    """Assigns users to the experiments that run in a store, read again every `reload_seconds`.

    Use `start()` and `close()`, or as a context manager, to read them in a thread of their own.
    """

    def __init__(
        self, store: ExperimentStore, reload_seconds: float = 2.0, most_exposed: int = 400_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._running = Reloaded(lambda: _running(store.experiments()), reload_seconds, clock)
        self._half, self._clock = max(1, most_exposed // 2), clock
        self._young: set[tuple[str, str]] = set()
        self._old: set[tuple[str, str]] = set()
        self._turned = clock()

    def start(self) -> None:
        """Read experiments in a thread of its own from now on."""
        self._running.start()

    def close(self) -> None:
        """Stop that thread."""
        self._running.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def reload(self) -> None:
        """Read the experiments now."""
        self._running.reload()

    @property
    def running(self) -> tuple[Running, ...]:
        """The experiments that take users, in the order in which they are tried."""
        return self._running.get()

    def arm_of(self, user: User) -> Assigned | None:
        """The user's experiment, arm and model; None for testers and for users whom no experiment takes."""
        return first_arm(user.id, self._running.get()) if user.population == "user" else None

    def exposure(self, user_id: str, assigned: Assigned, at: datetime, anew: bool = False) -> Exposure | None:
        """The exposure to make durable before the reply; None where `exposed` has said that it is.

        `anew`: whatever was said, as where a conversation begins, which may be that of somebody who was erased.
        """
        self._forget_some()
        key = (user_id, assigned.experiment)
        known = not anew and (key in self._young or key in self._old)
        return None if known else exposure_of(user_id, assigned, at)

    def exposed(self, exposure: Exposure) -> None:
        """Say that an exposure is durable. After a minute or two it is written again, as its user may be erased."""
        self._forget_some()
        self._young.add((exposure.user_id, exposure.experiment))

    def _forget_some(self) -> None:
        if len(self._young) >= self._half or self._clock() - self._turned > _REMEMBER_SECONDS:
            self._old, self._young, self._turned = self._young, set(), self._clock()


def _running(experiments: Mapping[str, Experiment]) -> tuple[Running, ...]:
    return tuple(
        Running.of(name, one.salt, one.shares, one.models)
        for name, one in sorted(experiments.items(), key=lambda entry: (entry[1].started_at, entry[0]))
        if one.state == "running"
    )
