"""The one door through which rows leave the event store: a person's on request, old conversations by retention.

What a person left is found as in files (`lineage`): by the kind of id that a column holds, parents before children, so
a new table is covered without a word here. One transaction lifts the triggers that keep events as they are, deletes,
and sets them again; `compact` then takes the bytes out of the database's files.
"""

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Column, ColumnElement, Connection, MetaData, Select, Table, exists, false, func, or_, select
from sqlalchemy import Text as SqlText

from ..errors import FlywheelError
from ..ids import prompt_id
from ..lineage import Ids, Kind, kind_of
from ..records import Character
from ..scan import SHORTEST
from . import schema
from .events import EventStore
from .rows import microseconds
from .schema import characters, conversations, imports, messages, publications, remembered, signals

_AT_ONCE = 10_000
SAID = (schema.signals.c.text, schema.moderations.c.withheld)
"""Where people's words stand, beside messages."""
_erasing = Table("erasing", MetaData(), Column("kind", SqlText), Column("id", SqlText), prefixes=["TEMPORARY"])


class Found(NamedTuple):
    """What the store holds of those to be erased: ids of every kind, what they wrote, and rows by table.

    `ids.row` also has the ids that curation gives to prompts, which follow from their messages.
    """

    ids: Ids
    texts: set[str]
    rows: dict[str, int]


def erase(
    store: EventStore,
    ids: Ids,
    before: datetime | None = None,
    note: Callable[[Found], None] = lambda found: None,
) -> dict[str, int]:
    """Delete all there is of these users and conversations in one durable transaction; rows by table.

    A conversation in which a user spoke goes whole: its replies answer their words. With `before`, conversations that
    nobody has touched since go too, and answers older than that. `note` is told what was found before anything is
    deleted, and nothing is deleted where it raises.
    """
    with store.erasing() as connection:
        if before is not None:
            ids = ids._replace(conversation=ids.conversation | set(connection.scalars(untouched(before))))
        rows = _gather(connection, ids)
        brought = _brought_along(connection)
        note(Found(_ids(connection), _texts(connection) | _told(connection, brought), rows))
        _delete(connection, rows)
        for one in ids.user:
            _unname_files(connection, one)
        for one in brought:
            rows["characters"] += connection.execute(characters.delete().where(characters.c.id == one)).rowcount
        if before is not None:
            rows["remembered"] += _forget_answers(connection, before)
        return {name: count for name, count in rows.items() if count}


def retire(store: EventStore, before: datetime) -> dict[str, int]:
    """Delete conversations that nobody has touched since `before`, with all that hangs on them; rows by table.

    Touched: begun, written in, or a reply of it reacted to. Answers kept for repeated requests go by their own age.
    Users and their exposures stay, and so does what was derived from the conversations: see `erase.retain`.
    """
    return erase(store, Ids(set(), set(), set()), before)


def drop_answers(store: EventStore, before: datetime) -> int:
    """Delete the answers kept for repeated requests that are older than `before`; how many."""
    with store.write() as connection:
        return _forget_answers(connection, before)


def untouched(before: datetime) -> Select[tuple[str]]:
    """The ids of conversations in which nothing has happened since `before`."""
    moment = microseconds(before)
    said = exists().where(messages.c.conversation_id == conversations.c.id, messages.c.created_at >= moment)
    reacted = exists().where(
        messages.c.conversation_id == conversations.c.id, signals.c.message_id == messages.c.id,
        signals.c.created_at >= moment,
    )  # fmt: skip
    return select(conversations.c.id).where(conversations.c.created_at < moment, ~said, ~reacted)


def any_untouched(store: EventStore, before: datetime) -> bool:
    """Whether there are conversations in which nothing has happened since `before`."""
    with store.read() as connection:
        return connection.scalar(untouched(before).limit(1)) is not None


def remaining(store: EventStore, ids: Ids) -> dict[str, int]:
    """How many rows of each table still name one of `ids`; tables without any are left out."""
    with store.read() as connection:
        return {name: count for name, count in _gather(connection, ids).items() if count}


def texts(store: EventStore, columns: Iterable[Column[str]]) -> Iterator[tuple[str, bytes]]:
    """Every text in these columns of the store, many joined by line ends, each time with `table.column`."""
    with store.read() as connection:
        for column in columns:
            rows = connection.execution_options(yield_per=_AT_ONCE).scalars(select(column).where(column.is_not(None)))
            for some in rows.partitions():
                yield f"{column.table.name}.{column.name}", "\n".join(some).encode("utf-8", "surrogatepass")


def text_columns() -> list[Column[str]]:
    """Every column of the store that holds text."""
    tables = schema.METADATA.sorted_tables
    return [column for table in tables for column in table.columns if isinstance(column.type, SqlText)]


def compact(store: EventStore, needed: Callable[[Path], bool], patience_s: float = 60) -> None:
    """Take deleted bytes out of the database's files, beside a service that goes on reading and writing.

    SQLite overwrites what is deleted and empties its log here; only where `needed` still finds something in the file,
    which pages keep when rows move between them, the file is written anew, and writers wait meanwhile. PostgreSQL
    marks the space as free to be used again; its own log and its backups are its keeper's.

    Raises FlywheelError where a reader keeps SQLite's log open for longer than `patience_s`.
    """
    if store.dialect == "postgresql":
        with closing(store._engine.raw_connection()) as pooled:
            vacuum: Any = pooled.driver_connection
            vacuum.autocommit = True  # VACUUM refuses to run in a transaction
            for table in schema.METADATA.sorted_tables:
                vacuum.execute(f"VACUUM {table.name}")
            vacuum.autocommit = False
        return
    with closing(sqlite3.connect(store.path, isolation_level=None, timeout=patience_s)) as connection:
        _empty_log(connection, store.path, patience_s)
        if needed(store.path):
            connection.execute("PRAGMA secure_delete=ON")
            connection.execute("VACUUM")
            _empty_log(connection, store.path, patience_s)


def _empty_log(connection: sqlite3.Connection, path: Path, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:  # a reader or a writer is in the log
        if time.monotonic() > deadline:
            raise FlywheelError(
                f"{path}-wal could not be emptied for {patience_s:g} s, because a process keeps reading the store: "
                "end it, and give the command again."
            )
        time.sleep(0.05)


def _gather(connection: Connection, ids: Ids) -> dict[str, int]:
    """Put `ids` and the ids of every row that came from them into the temporary table `erasing`; rows by table."""
    connection.exec_driver_sql("DROP TABLE IF EXISTS erasing")
    _erasing.create(connection)
    _add(connection, "user", ids.user)
    spoke = select(messages.c.conversation_id).where(messages.c.user_id.in_(_of("user")))
    _add(connection, "conversation", ids.conversation | set(connection.scalars(spoke)))
    _add(connection, "row", ids.row)
    rows = {}
    for table in schema.METADATA.sorted_tables:
        rows[table.name] = connection.scalar(select(func.count()).select_from(table).where(_theirs(table))) or 0
        kind = kind_of("id", table.name)
        if rows[table.name] and kind:
            new = set(connection.scalars(select(table.c.id).where(_theirs(table)))) - _known(connection, kind)
            _add(connection, kind, new)
    return rows


def _forget_answers(connection: Connection, before: datetime) -> int:
    return connection.execute(remembered.delete().where(remembered.c.created_at < microseconds(before))).rowcount


def _unname_files(connection: Connection, user_id: str) -> None:
    """Imported files are remembered by their name, which may be a person's."""
    if len(user_id) >= SHORTEST:
        named = imports.c.file.contains(user_id, autoescape=True)
        connection.execute(imports.update().where(named).values(file="(erased)"))


def _brought_along(connection: Connection) -> list[str]:
    """Characters that an import made from these conversations' own words, and that no other conversation is with."""
    going = conversations.c.id.in_(_of("conversation"))
    stays = select(conversations.c.character_id).where(~going)
    published = select(publications.c.character_id)
    wanted = select(conversations.c.character_id).distinct().where(
        going, conversations.c.character_id.startswith("imported-", autoescape=True),
        conversations.c.character_id.not_in(stays), conversations.c.character_id.not_in(published),
    )  # fmt: skip
    return list(connection.scalars(wanted))


def _told(connection: Connection, ids: list[str]) -> set[str]:
    """What those characters were told to be."""
    found = connection.scalars(select(characters.c.record).where(characters.c.id.in_(ids)))
    return {told.text for record in found for told in Character.model_validate_json(record).instructions}


def _delete(connection: Connection, rows: dict[str, int]) -> None:
    for table in reversed(schema.METADATA.sorted_tables):
        if rows[table.name]:
            rows[table.name] = connection.execute(table.delete().where(_theirs(table))).rowcount


def _theirs(table: Table) -> ColumnElement[bool]:
    """The rows of a table that name an id of the table `erasing`. A message's parent is of its own conversation."""
    named = [(column, kind_of(column.name, table.name)) for column in table.columns if column.name != "parent_id"]
    return or_(false(), *(column.in_(_of(kind)) for column, kind in named if kind))


def _of(kind: Kind) -> Select[tuple[str]]:
    return select(_erasing.c.id).where(_erasing.c.kind == kind)


def _known(connection: Connection, kind: Kind) -> set[str]:
    return set(connection.scalars(_of(kind)))


def _add(connection: Connection, kind: Kind, ids: Iterable[str]) -> None:
    rows = [{"kind": kind, "id": one} for one in sorted(ids)]
    if rows:
        connection.execute(_erasing.insert(), rows)


def _ids(connection: Connection) -> Ids:
    found = Ids(*(_known(connection, kind) for kind in ("user", "conversation", "row")))
    said = select(messages.c.id, messages.c.created_at).where(messages.c.role == "user", _theirs(messages))
    at = datetime(1970, 1, 1, tzinfo=UTC)
    found.row.update(prompt_id(one, at + timedelta(microseconds=moment)) for one, moment in connection.execute(said))
    return found


def _texts(connection: Connection) -> set[str]:
    """What people wrote in the rows of `erasing`: a reply counts where another person stands behind it."""
    wrote = select(messages.c.content).join(conversations).where(
        _theirs(messages), or_(messages.c.role == "user", messages.c.user_id != conversations.c.user_id)
    )  # fmt: skip
    found = set(connection.scalars(wrote))
    for column in SAID:
        found.update(connection.scalars(select(column).where(_theirs(column.table), column.is_not(None))))
    return found
