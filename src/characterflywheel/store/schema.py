"""The event store's tables: one schema for the chat service, the importers and the pipeline (DESIGN section 10).

Every row of what happens has a number `seq` in the order of arrival, which is what windows of traffic are cut by, and
an `id` that makes a repeated append harmless. Numbers are never used again, not even those of erased rows. What is in
`APPEND_ONLY` never changes: triggers refuse it. Times are microseconds since 1970 in UTC, exact and sortable in every
database; tuples and dictionaries are JSON text. `statements` is the same schema for SQLite and for PostgreSQL.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, get_args

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Table,
)
from sqlalchemy import Text as _Text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateIndex, CreateTable

from ..records import Finish, Role, SignalKind, Source
from ..service_records import PublicationState

Dialect = Literal["sqlite", "postgresql"]

VERSION = 2
WINDOWED = ("messages", "signals", "exposures")
APPEND_ONLY = (*WINDOWED, "moderations", "publications", "experiments")
METADATA = MetaData()
Text = _Text().with_variant(_Text(collation="C"), "postgresql")  # bytes in order, as SQLite has it
_Number = BigInteger().with_variant(Integer, "sqlite")


def _one_of(column: str, literal: Any) -> CheckConstraint:
    values: Sequence[str] = get_args(literal)
    return CheckConstraint(f"{column} IN ({', '.join(repr(value) for value in values)})", name=f"known_{column}")


def _events(name: str, *columns: Any) -> Table:
    """A table whose rows are numbered in the order of arrival."""
    return Table(
        name,
        METADATA,
        Column("seq", _Number, primary_key=True),
        Column("id", Text, nullable=False, unique=True),
        *columns,
        sqlite_autoincrement=True,
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
    Index("conversations_of_user", "user_id", "seq"),
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
    Column("parent_id", Text),
    Column("finish", Text),
    Column("created_at", BigInteger, nullable=False),
    _one_of("role", Role),
    _one_of("finish", Finish),
    Index("messages_of_conversation", "conversation_id"),
    Index("messages_of_user", "user_id"),
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
    Index("signals_of_message", "message_id"),
    Index("signals_of_user", "user_id"),
)
exposures = _events(
    "exposures",
    Column("experiment", Text, nullable=False),
    Column("arm", Text, nullable=False),
    Column("user_id", Text, ForeignKey("users.id"), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Index("exposures_of_user", "user_id"),
)
moderations = _events(
    "moderations",
    Column("message_id", Text, nullable=False),  # which may have been withheld, and then is nowhere
    Column("conversation_id", Text, nullable=False),
    Column("user_id", Text, ForeignKey("users.id"), nullable=False),
    Column("subject", Text, nullable=False),
    Column("allowed", Boolean, nullable=False),
    Column("categories", Text, nullable=False),
    Column("withheld", Text),
    Column("created_at", BigInteger, nullable=False),
    Index("moderations_of_user", "user_id"),
)
tips = _events(
    "tips",
    Column("conversation_id", Text, ForeignKey("conversations.id"), nullable=False),
    Column("message_id", Text, nullable=False),
    Column("user_id", Text, ForeignKey("users.id"), nullable=False),
    Index("tips_of_conversation", "conversation_id"),
    Index("tips_of_user", "user_id"),
)
remembered = _events(
    "remembered",
    Column("user_id", Text, nullable=False),  # or whoever asked: a reviewer, an application
    Column("body", Text, nullable=False),
    Column("status", Integer, nullable=False),
    Column("response", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Index("remembered_of_user", "user_id"),
    Index("remembered_by_time", "created_at"),
)
publications = _events(
    "publications",
    Column("character_id", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("reviewer", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    ForeignKeyConstraint(["character_id", "version"], ["characters.id", "characters.version"]),
    _one_of("state", PublicationState),
    Index("publications_of_character", "character_id"),
)
experiments = _events(
    "experiments",
    Column("name", Text, nullable=False),
    Column("salt", Text, nullable=False),
    Column("shares", Text, nullable=False),
    Column("models", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Index("experiments_by_name", "name"),
)
keys = _events(
    "keys",
    Column("name", Text, nullable=False),
    Column("digest", Text, nullable=False, unique=True),
    Column("scopes", Text, nullable=False),
    Column("user_id", Text),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
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

NUMBERED = {
    table.name: table
    for table in (
        users, conversations, exposures, messages, moderations, signals, tips, remembered,
        publications, experiments, keys,
    )
}  # fmt: skip
COLUMN_APPENDS = ("users", "conversations", "messages", "signals", "exposures")
TIMES = frozenset(("created_at", "started_at", "expires_at", "revoked_at"))
JSON = frozenset(("categories", "shares", "models", "scopes"))
DEFAULTS: dict[str, dict[str, object]] = {
    "users": {"consent": True},
    "messages": {
        "model": None, "experiment": None, "arm": None, "fallback": False, "parent_id": None, "finish": None,
    },
    "signals": {"value": 1.0, "text": None},
}  # fmt: skip

_DIALECTS = {"sqlite": sqlite.dialect, "postgresql": postgresql.dialect}
_ARRAYS = {"BIGINT": "bigint[]", "INTEGER": "bigint[]", "BOOLEAN": "boolean[]", "FLOAT": "float8[]"}


def statements(dialect: Dialect) -> list[str]:
    """What makes an empty database a store: tables, indices, triggers."""
    speak = _DIALECTS[dialect]()
    ddl: list[CreateTable | CreateIndex] = []
    for table in METADATA.sorted_tables:
        ddl += [CreateTable(table, if_not_exists=True)]
        ddl += [CreateIndex(index) for index in sorted(table.indexes, key=lambda index: str(index.name))]
    return [str(one.compile(dialect=speak)) for one in ddl] + triggers(dialect)


def triggers(dialect: Dialect) -> list[str]:
    """What makes the tables of `APPEND_ONLY` append-only."""
    if dialect == "sqlite":
        return [
            f"CREATE TRIGGER IF NOT EXISTS {table}_refuse_{action.lower()} BEFORE {action} ON {table} "
            f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            for table in APPEND_ONLY
            for action in ("UPDATE", "DELETE")
        ]
    return [
        "CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE EXCEPTION USING MESSAGE = TG_TABLE_NAME || ' is append-only', ERRCODE = '23000'; END $$",
        *(
            f"CREATE TRIGGER {table}_refuse_{name} BEFORE {action} ON {table} FOR EACH {each} "
            "EXECUTE FUNCTION refuse_change()"
            for table in APPEND_ONLY
            for name, action, each in (("change", "UPDATE OR DELETE", "ROW"), ("truncate", "TRUNCATE", "STATEMENT"))
        ),
    ]


def allow_changes(dialect: Dialect) -> list[str]:
    """What lifts the triggers, for an erasure in the same transaction; `forbid_changes` sets them again."""
    if dialect == "sqlite":
        return [f"DROP TRIGGER {table}_refuse_{action}" for table in APPEND_ONLY for action in ("update", "delete")]
    return [f"ALTER TABLE {table} DISABLE TRIGGER USER" for table in APPEND_ONLY]


def forbid_changes(dialect: Dialect) -> list[str]:
    """The inverse of `allow_changes`."""
    if dialect == "sqlite":
        return triggers(dialect)
    return [f"ALTER TABLE {table} ENABLE TRIGGER USER" for table in APPEND_ONLY]


def columns(table: Table) -> list[str]:
    """The names of a table's columns but for the number."""
    return [column.name for column in table.columns if column.name != "seq"]


@cache
def insert(table: Table, dialect: Dialect, rows: int) -> str:
    """An insert of `columns(table)` that leaves alone a row whose id exists, and wastes no number on it.

    SQLite takes the values of `rows` rows one after another, PostgreSQL one array a column, of any length. The ids of
    one statement must differ, and nobody else may write meanwhile.
    """
    names = columns(table)
    into = f"INSERT INTO {table.name} ({', '.join(names)})"
    if dialect == "sqlite":
        one = f"({', '.join('?' * len(names))})"
        return (
            f"{into} SELECT * FROM (VALUES {', '.join([one] * rows)}) "
            f"WHERE NOT EXISTS (SELECT 1 FROM {table.name} WHERE id = column1)"
        )
    arrays = ", ".join(f"%s::{_ARRAYS.get(str(table.c[name].type), 'text[]')}" for name in names)
    return (
        f"{into} SELECT {', '.join(f'given.{name}' for name in names)} "
        f"FROM unnest({arrays}) WITH ORDINALITY AS given({', '.join(names)}, nth) "
        f"WHERE NOT EXISTS (SELECT 1 FROM {table.name} AS known WHERE known.id = given.id) ORDER BY given.nth"
    )
