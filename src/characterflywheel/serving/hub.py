"""What the routes of the chat service share: the store and its journal, the models, safety, who may do what."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from ..config import FlywheelConfig
from ..records import User
from ..safety.moderator import Moderator
from ..store import EventStore
from ..store.journal import Journal
from ..workspace import Workspace
from .assignment import Assigner
from .auth import Authenticator
from .backends import Backends
from .cast import Cast
from .limits import RateLimiter
from .metrics import Metrics
from .publication import Publisher


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Hub:
    """The parts of one running service.

    `being_written` holds the replies whose commit is awaited, by message id; `being_answered` the requests with an
    idempotency key; `users` those seen lately, with the time on the monotonic clock.
    """

    workspace: Workspace
    config: FlywheelConfig
    store: EventStore
    journal: Journal
    backends: Backends
    moderator: Moderator
    authenticator: Authenticator
    key_limits: RateLimiter
    user_limits: RateLimiter
    assigner: Assigner
    cast: Cast
    publisher: Publisher
    metrics: Metrics
    clock: Callable[[], datetime] = _now
    being_written: dict[str, asyncio.Future[None]] = field(default_factory=dict)
    being_answered: dict[str, asyncio.Future[None]] = field(default_factory=dict)
    users: dict[str, tuple[User, float]] = field(default_factory=dict)
    reading_keys: asyncio.Lock = field(default_factory=asyncio.Lock)
