"""Append and look up: the event store on SQLite (WAL, synchronous FULL), through SQLAlchemy Core.

An append is one durable transaction: when it returns, the rows survive a power cut. Rows whose id exists are left
alone, so a killed simulation that runs again writes the same prefix again without effect and then the rest, and
every row keeps its number. Writers queue for one lock; readers see a consistent snapshot.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from sqlalchemy import URL, Connection, create_engine, event, func, select
from sqlalchemy.exc import DatabaseError, IntegrityError

from ..errors import FlywheelError
from ..records import Character, Conversation, Exposure, Message, Record, Signal, Source, User
from . import schema
from .export import export as write_window

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "recursive_triggers=ON", "cache_size=-65536")


class Position(Record):
    """A place in the store: the number of the last row of each append-only table (0 where it is empty)."""

    messages: int = 0
    signals: int = 0
    exposures: int = 0


class EventStore:
    """Users, characters, conversations, and what happened in them. Open with `EventStore.open(path)`."""

    def __init__(self, path: Path) -> None:
        if not path.parent.is_dir():
            raise FlywheelError(f"folder {path.parent} is missing: `flywheel init DIR` creates a workspace.")
        self.path = path
        self._engine = create_engine(URL.create("sqlite", database=str(path)), connect_args={"timeout": 60})
        self._lock = threading.Lock()
        event.listen(self._engine, "connect", _set_up)
        event.listen(self._engine, "begin", _begin)
        try:
            with self.read() as connection:
                ready = _is_ready(connection, path)
            if not ready:
                with self._write() as connection:
                    _create(connection, path)
        except DatabaseError as error:
            self.close()
            raise FlywheelError(
                f"{path} is not a usable event store ({error.orig}); move it away or restore it."
            ) from error

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the store, creating it where there is none. Use it as a context manager, or `close()` it."""
        return cls(path)

    def close(self) -> None:
        """Close all connections; SQLite then folds its log into the one file."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def add_characters(self, characters: Iterable[Character]) -> None:
        """Register characters. A changed character needs a new version: a version's content never changes."""
        table = schema.characters
        with self._write() as connection:
            for one in characters:
                record = one.model_dump_json()
                known = connection.scalar(
                    select(table.c.record).where(table.c.id == one.id, table.c.version == one.version)
                )
                if known is None:
                    row = {"id": one.id, "version": one.version, "name": one.name, "record": record}
                    connection.execute(table.insert(), row)
                elif known != record:
                    raise FlywheelError(
                        f"character {one.id!r} version {one.version} differs from the one in the store; "
                        f"a changed character needs a higher version, e.g. version = {one.version + 1}."
                    )

    def characters(self) -> dict[str, Character]:
        """The newest version of every registered character by id, sorted by id."""
        table = schema.characters
        with self.read() as connection:
            rows = connection.execute(select(table.c.record).order_by(table.c.id, table.c.version)).scalars()
            found = map(Character.model_validate_json, rows.all())
            return {character.id: character for character in found}

    def add_users(self, users: Iterable[User]) -> None:
        """Register users; those known are left alone."""
        self._append({"users": _columns(User, users)})

    def add_conversations(self, conversations: Iterable[Conversation]) -> None:
        """Register conversations of known users with known characters. Their messages are not looked at."""
        self._append({"conversations": _columns(Conversation, conversations, without="messages")})

    def set_consent(self, user_id: str, consent: bool) -> None:
        """Say whether a user's messages may be used for training, from now on and for all they ever wrote."""
        with self._write() as connection:
            changed = connection.execute(
                schema.users.update().where(schema.users.c.id == user_id).values(consent=consent)
            )
            if changed.rowcount == 0:
                raise FlywheelError(f"user {user_id!r} is not in the store.")

    def populations(self, user_ids: Iterable[str]) -> dict[str, Source]:
        """The population of each known user of `user_ids`."""
        table = schema.users
        found: dict[str, Source] = {}
        wanted = sorted(set(user_ids))
        with self.read() as connection:
            for start in range(0, len(wanted), 500):  # SQLite bounds the number of variables
                some = table.c.id.in_(wanted[start : start + 500])
                found |= {row.id: row.population for row in connection.execute(select(table).where(some))}
        return found

    def append(
        self,
        messages: Sequence[Message] = (),
        signals: Sequence[Signal] = (),
        exposures: Sequence[Exposure] = (),
    ) -> None:
        """Append what happened in one durable transaction: exposures, then messages, then signals.

        Raises FlywheelError where a row refers to a user, conversation or message that is not in the store.
        """
        self._append(
            {
                "exposures": _columns(Exposure, exposures),
                "messages": _columns(Message, messages),
                "signals": _columns(Signal, signals),
            }
        )

    def append_columns(self, table: str, columns: Mapping[str, Sequence[object]]) -> None:
        """Append many rows of one table, given as columns of equal length, in one durable transaction.

        `table` is users, conversations, messages, signals or exposures; columns are the fields of its record, and
        those with a default may be left out. Times are datetimes, NumPy datetime64 in UTC, or integers of
        microseconds since 1970.
        """
        if table not in schema.EVENTS:
            raise FlywheelError(f"table {table!r} does not exist; there are {', '.join(schema.EVENTS)}.")
        self._append({table: columns})

    def record_import(
        self, digest: str, *, file: str, format: str, conversations: int, messages: int, rejected: int
    ) -> None:
        """Remember that a file (by its SHA-256) was imported, and how it went the last time."""
        counts = {"conversations": conversations, "messages": messages, "rejected": rejected}
        with self._write() as connection:
            connection.execute(schema.imports.delete().where(schema.imports.c.id == digest))
            connection.execute(schema.imports.insert(), {"id": digest, "file": file, "format": format, **counts})

    def position(self) -> Position:
        """Where the store ends now."""
        with self.read() as connection:
            last = {
                name: connection.scalar(select(func.coalesce(func.max(schema.EVENTS[name].c.seq), 0)))
                for name in schema.APPEND_ONLY
            }
        return Position.model_validate(last)

    def export(self, folder: Path, after: Position, until: Position, *, consenting_only: bool = True) -> None:
        """Write the rows after `after` up to `until` as Parquet; see `store.export`."""
        write_window(self, folder, after, until, consenting_only=consenting_only)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A read transaction: a consistent snapshot of the store."""
        with self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with self._lock, self._engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection

    def _append(self, tables: Mapping[str, Mapping[str, Sequence[object]]]) -> None:
        prepared = [(name, _rows(name, columns)) for name, columns in tables.items()]
        if not any(rows for _, (_, rows) in prepared):
            return
        try:
            with self._write() as connection:
                for name, (names, rows) in prepared:
                    if rows:
                        connection.exec_driver_sql(schema.insert(schema.EVENTS[name], names), rows)
        except IntegrityError as error:
            raise FlywheelError(
                f"cannot append to {', '.join(name for name, (_, rows) in prepared if rows)}: {error.orig}; "
                "register users, characters and conversations first, and messages before their signals."
            ) from error


def microseconds(moment: datetime) -> int:
    """Microseconds since 1970 in UTC, exactly. A time without a zone is refused: it would depend on the machine."""
    if moment.tzinfo is None:
        raise FlywheelError(f"time {moment.isoformat()} has no time zone; give it one, e.g. +00:00.")
    return (moment - _EPOCH) // _MICROSECOND


def _columns(record: type[Record], rows: Iterable[Record], without: str = "") -> dict[str, list[object]]:
    rows = list(rows)
    return {name: [getattr(row, name) for row in rows] for name in record.model_fields if name != without}


def _rows(table: str, columns: Mapping[str, Sequence[object]]) -> tuple[list[str], list[tuple[object, ...]]]:
    """Column names and rows for the database, missing columns filled from their defaults, times as integers."""
    known = [column.name for column in schema.EVENTS[table].columns if column.name != "seq"]
    defaults = schema.DEFAULTS.get(table, {})
    missing = [name for name in known if name not in columns and name not in defaults]
    unknown = [name for name in columns if name not in known]
    if missing or unknown:
        raise FlywheelError(f"table {table!r}: missing columns {missing}, unknown columns {unknown}; it has {known}.")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise FlywheelError(f"table {table!r}: columns of different length {lengths}; give each row a value in each.")
    length = next(iter(lengths.values()))
    plain = [_plain(name, columns[name]) if name in columns else [defaults[name]] * length for name in known]
    return known, list(zip(*plain, strict=True))


def _plain(name: str, column: Sequence[object]) -> Sequence[object]:
    """A column as Python values that SQLite stores; NumPy's are converted at once."""
    if isinstance(column, np.ndarray):
        if column.dtype.kind == "M":
            column = column.astype("datetime64[us]").astype(np.int64)
        column = column.tolist()
    if name == "created_at":
        return [microseconds(value) if isinstance(value, datetime) else value for value in column]
    return column


def _set_up(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions are begun below, not guessed by the driver
    for pragma in _PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    """A writer takes its lock at once, so that two processes queue instead of failing in the middle."""
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")


def _is_ready(connection: Connection, path: Path) -> bool:
    """Whether the file holds this program's schema; a file that holds another is an error."""
    version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    if version not in (0, schema.VERSION):
        raise FlywheelError(
            f"{path} has schema version {version}, this program reads {schema.VERSION}; use the program that wrote it."
        )
    return bool(version)


def _create(connection: Connection, path: Path) -> None:
    if _is_ready(connection, path):  # another process was faster
        return
    schema.METADATA.create_all(connection)
    for statement in schema.triggers():
        connection.exec_driver_sql(statement)
    connection.exec_driver_sql(f"PRAGMA user_version={schema.VERSION}")
