"""Experiments in service: started, ramped up, stopped (PAPER section 7, DESIGN section 8).

Each change is a new row of the store; the newest of a name counts. A user who has met an arm stays in it: the salt is
fixed at the start, shares only grow, and what was stopped does not start again under its name. A row's id follows from
the row it changes, so of two changes made at once one is refused.
"""

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import NamedTuple, Protocol

from pydantic import ValidationError
from sqlalchemy import func, select

from ..errors import FlywheelError
from ..ids import derive_id
from ..service_records import Experiment
from ..store import EventStore, schema
from .assignment import CONTROL, TREATMENT, territories


class ExperimentStore(Protocol):
    """What is needed of `store.EventStore`."""

    def experiments(self) -> dict[str, Experiment]: ...

    def save_experiment(self, experiment: Experiment) -> None: ...


class Arm(NamedTuple):
    """The model that serves an arm, and the arm's share of all users."""

    model: str
    share: float


def start(
    store: ExperimentStore, name: str, arms: Mapping[str, Arm], at: datetime, models: Collection[str] | None = None
) -> Experiment:
    """Start an experiment; it takes users within seconds. Its name is its salt.

    Args:
        arms: `control` and `treatment`, which the analysis compares.
        at: now.
        models: the names of the models that can be served; None where nobody can list them.

    Raises:
        FlywheelError: the name is taken, now or before, or is no name; arms or shares are not what an experiment
            needs; a model cannot be served.
    """
    if (before := store.experiments().get(name)) is not None:
        raise FlywheelError(f"experiment {name!r} is {before.state}, and a name is used once: choose another.")
    if set(arms) != {CONTROL, TREATMENT}:
        raise FlywheelError(
            f"experiment {name!r}: arms {', '.join(sorted(arms)) or 'none'}, must be {CONTROL} and {TREATMENT}."
        )
    if models is not None and (unknown := sorted({arm.model for arm in arms.values()} - set(models))):
        raise FlywheelError(f"models {', '.join(unknown)} are not in service; there are {', '.join(sorted(models))}.")
    shares = _checked({label: arm.share for label, arm in arms.items()})
    try:
        started = Experiment(
            id=derive_id("experiment", name), name=name, salt=name, shares=shares, state="running", started_at=at,
            models={label: arm.model for label, arm in sorted(arms.items())}, created_at=at,
        )  # fmt: skip
    except ValidationError:
        raise FlywheelError(
            f"experiment {name!r}: a name has up to 101 letters, digits, dots, dashes and underscores, "
            "and begins with a letter or a digit."
        ) from None
    return _save(store, started)


def ramp(store: ExperimentStore, name: str, shares: Mapping[str, float], at: datetime) -> Experiment:
    """Raise the shares of a running experiment; arms that are not named keep theirs. Nobody changes arms.

    Raises:
        FlywheelError: there is no such experiment, it was stopped, or a share would shrink or does not fit.
    """
    before = running(store, name)
    if unknown := sorted(set(shares) - set(before.shares)):
        raise FlywheelError(f"experiment {name!r} has no arm {', '.join(unknown)}; it has {', '.join(before.shares)}.")
    for label, share in shares.items():
        if share < before.shares[label]:
            raise FlywheelError(
                f"share of arm {label!r} = {share:g}, must be at least its {before.shares[label]:g}: "
                "a lower one would move users out of their arm. To end the experiment, stop it."
            )
    after = _checked({**before.shares, **shares})
    return before if after == before.shares else _save(store, _next(before, at, shares=after))


def stop(store: ExperimentStore, name: str, at: datetime) -> Experiment:
    """Stop an experiment: within seconds everybody meets the model in service. One that was stopped stays as it is."""
    before = find(store, name)
    return before if before.state == "stopped" else _save(store, _next(before, at, state="stopped"))


def find(store: ExperimentStore, name: str) -> Experiment:
    """The newest row of an experiment; FlywheelError where there is none."""
    known = store.experiments()
    if name not in known:
        raise FlywheelError(f"there is no experiment {name!r}; there are {', '.join(sorted(known)) or 'none'}.")
    return known[name]


def running(store: ExperimentStore, name: str) -> Experiment:
    """A running experiment; FlywheelError where there is none of that name, or it was stopped."""
    found = find(store, name)
    if found.state != "running":
        raise FlywheelError(f"experiment {name!r} was stopped at {found.created_at}: start another under a new name.")
    return found


def exposed(store: EventStore, name: str) -> int:
    """How many users have met an experiment so far."""
    exposures = schema.exposures
    with store.read() as connection:
        found = connection.scalar(select(func.count()).select_from(exposures).where(exposures.c.experiment == name))
    return int(found or 0)


def _checked(shares: Mapping[str, float]) -> dict[str, float]:
    """Shares that fit (`assignment.territories`) and take somebody."""
    territories(shares)
    if not sum(shares.values()) > 0:
        raise FlywheelError("the shares of all arms are 0: give at least one a share of users, e.g. 0.1.")
    return dict(sorted(shares.items()))


def _next(before: Experiment, at: datetime, **changes: object) -> Experiment:
    return before.model_copy(update={**changes, "id": derive_id("experiment", before.id), "created_at": at})


def _save(store: ExperimentStore, changed: Experiment) -> Experiment:
    """Store a row; another row with its id is somebody else's change of the same predecessor."""
    store.save_experiment(changed)
    stored = find(store, changed.name)
    if stored != changed:
        raise FlywheelError(f"experiment {changed.name!r} was changed by somebody else meanwhile: look, and try again.")
    return stored
