"""The event store's tables: one schema for the chat service, the importers and the pipeline (DESIGN section 10).

`messages`, `signals` and `exposures` are append-only: every row has a number `seq` in the order of arrival, which is
what windows of traffic are cut by, and an `id` that makes a repeated append harmless. Triggers refuse any change to
them. Times are microseconds since 1970 in UTC, exact and sortable in every database.
"""

from collections.abc import Sequence
from typing import Any, get_args

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    Table,
    Text,
)

from ..records import Role, SignalKind, Source

VERSION = 1
APPEND_ONLY = ("messages", "signals", "exposures")
METADATA = MetaData()


def _one_of(column: str, literal: Any) -> CheckConstraint:
    values: Sequence[str] = get_args(literal)
    return CheckConstraint(f"{column} IN ({', '.join(repr(value) for value in values)})", name=f"known_{column}")


def _events(name: str, *columns: Any) -> Table:
    """A table whose rows are numbered in the order of arrival."""
    return Table(
        name,
        METADATA,
        Column("seq", Integer, primary_key=True),
        Column("id", Text, nullable=False, unique=True),
        *columns,
    )


characters = Table(
    "characters",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("name", Text, nullable=False),
    Column("record", Text, nullable=False),  # the whole Character as JSON
)
users = _events(
    "users",
    Column("population", Text, nullable=False),
    Column("consent", Boolean, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    _one_of("population", Source),
)
conversations = _events(
    "conversations",
    Column("user_id", Text, ForeignKey("users.id"), nullable=False),
    Column("character_id", Text, nullable=False),
    Column("character_version", Integer, nullable=False),
    Column("source", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    ForeignKeyConstraint(["character_id", "character_version"], ["characters.id", "characters.version"]),
    _one_of("source", Source),
)
messages = _events(
    "messages",
    Column("conversation_id", Text, ForeignKey("conversations.id"), nullable=False),
    Column("user_id", Text, ForeignKey("users.id"), nullable=False),
    Column("role", Text, nullable=False),
    Column("content", Text, nullable=False),
    Column("model", Text),
    Column("experiment", Text),
    Column("arm", Text),
    Column("fallback", Boolean, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    _one_of("role", Role),
)
signals = _events(
    "signals",
    Column("message_id", Text, ForeignKey("messages.id"), nullable=False),
    Column("user_id", Text, ForeignKey("users.id"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("value", Float, nullable=False),
    Column("text", Text),
    Column("created_at", BigInteger, nullable=False),
    _one_of("kind", SignalKind),
)
exposures = _events(
    "exposures",
    Column("experiment", Text, nullable=False),
    Column("arm", Text, nullable=False),
    Column("user_id", Text, ForeignKey("users.id"), nullable=False),
    Column("created_at", BigInteger, nullable=False),
)
imports = Table(
    "imports",
    METADATA,
    Column("id", Text, primary_key=True),  # SHA-256 of the file
    Column("file", Text, nullable=False),
    Column("format", Text, nullable=False),
    Column("conversations", Integer, nullable=False),
    Column("messages", Integer, nullable=False),
    Column("rejected", Integer, nullable=False),
)

EVENTS = {table.name: table for table in (users, conversations, messages, signals, exposures)}
DEFAULTS: dict[str, dict[str, object]] = {
    "users": {"consent": True},
    "messages": {"model": None, "experiment": None, "arm": None, "fallback": False},
    "signals": {"value": 1.0, "text": None},
}


def triggers() -> list[str]:
    """SQLite statements that make the event tables append-only."""
    return [
        f"CREATE TRIGGER IF NOT EXISTS {table}_refuse_{action.lower()} BEFORE {action} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        for table in APPEND_ONLY
        for action in ("UPDATE", "DELETE")
    ]


def insert(table: Table, columns: Sequence[str]) -> str:
    """An insert of `columns` that leaves a row alone whose id exists; the text is SQLite's and PostgreSQL's."""
    names, marks = ", ".join(columns), ", ".join("?" * len(columns))
    return f"INSERT INTO {table.name} ({names}) VALUES ({marks}) ON CONFLICT (id) DO NOTHING"
