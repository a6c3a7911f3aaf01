"""What running a product adds to the records: publications, moderation, experiments in service, keys, answers kept.

Same manners as `records`: frozen, strict, stored in the event store (DESIGN sections 5 and 8, PAPER sections 7 and 9).
"""

from datetime import datetime
from typing import Literal

from pydantic import Field

from .records import Character, Conversation, Exposure, Message, Record, Signal, User

PublicationState = Literal["approved", "review", "refused", "retired"]


class Publication(Record):
    """A decision about one version of a character. The newest decision about a character's newest version counts.

    `reviewer` is `safety` where a classifier decided, else the key or person who did.
    """

    id: str
    character_id: str
    version: int
    state: PublicationState
    reason: str
    reviewer: str
    created_at: datetime


class Moderation(Record):
    """What safety said of an utterance or a reply. `withheld` is the text that was not shown, where there is one."""

    id: str
    message_id: str
    conversation_id: str
    user_id: str
    subject: Literal["prompt", "reply"]
    allowed: bool
    categories: tuple[str, ...] = ()
    withheld: str | None = None
    created_at: datetime


class Experiment(Record):
    """An experiment that takes users: each arm's share of all users and the model that serves it (DESIGN section 8).

    A change (ramped, stopped) is a new row of the same name; the newest one counts. The salt is fixed at the start.
    """

    id: str
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,100}$")
    salt: str
    shares: dict[str, float]
    models: dict[str, str]
    state: Literal["running", "stopped"]
    started_at: datetime
    created_at: datetime


class ApiKey(Record):
    """A key as it is stored: only the SHA-256 of its secret. `user_id` binds it to one user, None to an application."""

    id: str
    name: str
    digest: str
    scopes: tuple[str, ...]
    user_id: str | None = None
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


class Remembered(Record):
    """The answer to a request with an idempotency key. `id` is a digest of principal and key, `body` of the request."""

    id: str
    user_id: str
    body: str
    status: int
    response: str
    created_at: datetime


class Tip(Record):
    """The end of a conversation, found by `id`: a digest of user, character and every message up to a reply.

    It recognises the conversation when a client that knows no conversation ids sends its whole history.
    """

    id: str
    conversation_id: str
    message_id: str
    user_id: str


class Events(Record):
    """What one request makes durable, in one transaction."""

    users: tuple[User, ...] = ()
    characters: tuple[Character, ...] = ()
    conversations: tuple[Conversation, ...] = ()
    exposures: tuple[Exposure, ...] = ()
    messages: tuple[Message, ...] = ()
    signals: tuple[Signal, ...] = ()
    moderations: tuple[Moderation, ...] = ()
    tips: tuple[Tip, ...] = ()
    remembered: tuple[Remembered, ...] = ()
