"""Which model is in service, and how it came there: `registry.json` in the workspace (PAPER section 8, DESIGN 10).

The history of promotions and rollbacks is the truth; the model in service follows from it. A model that was offered may
meet users in an experiment's arm, and serves nobody else. Writing is atomic, and a promotion that a killed run repeats
changes nothing.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from ..errors import FlywheelError
from ..pipeline import write_atomically
from ..records import Record


class Release(Record):
    """A model that can serve: the generation that made it, its name, its folder relative to the workspace."""

    generation: int
    model: str
    folder: str


class Step(Record):
    """One change of what may serve. `release` serves after it, None being the base model; an offer changes nothing."""

    action: Literal["promote", "rollback", "offer"]
    release: Release | None
    reason: str
    at: datetime


class Registry(Record):
    """The steps so far, oldest first."""

    history: tuple[Step, ...] = ()

    @property
    def serving(self) -> tuple[Release, ...]:
        """The models that a rollback would find, oldest first; the last one is in service."""
        stack: list[Release] = []
        for step in self.history:
            if step.action == "rollback":
                stack.pop()
            elif step.action == "promote" and step.release is not None:
                stack.append(step.release)
        return tuple(stack)

    @property
    def in_service(self) -> Release | None:
        """The model in service; None where it is the base model."""
        return self.serving[-1] if self.serving else None


def read(path: Path) -> Registry:
    """Read `registry.json`; an absent file is an empty registry.

    Raises:
        FlywheelError: the file is not a registry, or its history is impossible.
    """
    if not path.exists():
        return Registry()
    try:
        registry = Registry(history=json.loads(path.read_text(encoding="utf-8"))["history"])
        registry.serving  # noqa: B018 - replays the history, which a hand edit may have broken
    except (ValueError, KeyError, IndexError, TypeError, ValidationError) as error:
        raise FlywheelError(f"{path} is no registry of models ({error}): restore it, or delete it.") from error
    return registry


def promote(path: Path, release: Release, reason: str, at: datetime) -> Registry:
    """Put a model in service. Promoting the one that is in service already changes nothing."""
    registry = read(path)
    if registry.in_service == release:
        return registry
    return _write(path, registry, Step(action="promote", release=release, reason=reason, at=at))


def offer(path: Path, release: Release, reason: str, at: datetime) -> Registry:
    """Let the chat service find a model that an experiment's arm names. What is in service stays; twice is once."""
    registry = read(path)
    if any(step.release == release for step in registry.history):
        return registry
    return _write(path, registry, Step(action="offer", release=release, reason=reason, at=at))


def rollback(path: Path, reason: str, at: datetime) -> Registry:
    """Put the model back in service that served before the present one, the base model before the first.

    Raises:
        FlywheelError: the base model is in service.
    """
    registry = read(path)
    if not registry.serving:
        raise FlywheelError("cannot roll back: the base model is in service, and nothing served before it.")
    before = registry.serving[-2] if len(registry.serving) > 1 else None
    return _write(path, registry, Step(action="rollback", release=before, reason=reason, at=at))


def _write(path: Path, registry: Registry, step: Step) -> Registry:
    after = Registry(history=(*registry.history, step))
    current = after.in_service
    content = {
        "in_service": current.model_dump(mode="json") if current else None,
        **after.model_dump(mode="json"),
    }
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    return after
