"""Append and look up: the event store on SQLite or PostgreSQL, through SQLAlchemy Core.

An append is one durable transaction: when it returns, the rows survive a power cut. Rows whose id exists are left
alone, so a killed simulation that runs again writes the same prefix again without effect and then the rest, and
every row keeps its number. Writers queue for one lock; readers see a consistent snapshot.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import Connection, func, select
from sqlalchemy.exc import DatabaseError, DataError, IntegrityError, InterfaceError

from ..errors import FlywheelError
from ..records import Character, Conversation, Exposure, Message, Record, Signal, Source, User
from ..service_records import ApiKey, Events, Experiment, Publication, Remembered, Tip
from . import database, lookups, schema
from .export import export as write_window
from .rows import Row, microseconds, rows, rows_of_columns

_IN_ORDER = tuple(name for name in schema.NUMBERED if name in Events.model_fields)  # parents before children
_AT_ONCE = 512  # rows of one statement on SQLite: each statement costs a hand-over between threads


class Position(Record):
    """A place in the store: the number of the last row of each append-only table (0 where it is empty)."""

    messages: int = 0
    signals: int = 0
    exposures: int = 0


class EventStore:
    """Users, characters, conversations, and what happened in them. Open with `EventStore.open(where)`.

    Raises `StoreUnavailable`, from any method, where the database is locked for longer than `patience_s`, full or gone.
    """

    def __init__(self, where: Path | str, *, patience_s: float = 60, folds_log: bool = True) -> None:
        self._engine = database.connect(where, patience_s, folds_log)
        self.dialect = database.dialect(self._engine)
        self.where = self._engine.url.render_as_string() if self.dialect == "postgresql" else str(where)
        self._lock = threading.Lock()
        try:
            with database.plain_errors(self.where):
                database.prepare(self._engine, patience_s)
        except DatabaseError as error:
            self.close()
            raise FlywheelError(
                f"{self.where} is not a usable event store ({database.reason(error)}); move it away or restore it."
            ) from error
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, where: Path | str, *, patience_s: float = 60, folds_log: bool = True) -> Self:
        """Open the store, creating or migrating it as needed. Use it as a context manager, or `close()` it.

        `where` is the path of a SQLite file, or the address of a PostgreSQL database, `postgresql://...`.
        `patience_s` is how long to wait, in seconds, while another process writes. With `folds_log` off no commit
        pays for folding SQLite's log into its file; call `fold_log` every few seconds instead.
        """
        return cls(where, patience_s=patience_s, folds_log=folds_log)

    @property
    def path(self) -> Path:
        """The SQLite file."""
        if self.dialect != "sqlite":
            raise FlywheelError(f"{self.where} is no file.")
        return Path(self.where)

    def fold_log(self) -> None:
        """Fold SQLite's log into its file; writers are not held up. On PostgreSQL there is nothing to do."""
        with database.plain_errors(self.where):
            database.fold_log(self._engine)

    def close(self) -> None:
        """Close all connections; SQLite then folds its log into the one file."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # Append

    def append_events(self, events: Events) -> None:
        """Make what one request did durable, in one transaction; rows whose id is known are left alone.

        Raises FlywheelError, and stores nothing, where a row is bad: it refers to what is not in the store, or a
        known version of a character differs.
        """
        self.append_all([events])

    def append_all(self, batch: Sequence[Events]) -> int:
        """`append_events` for many, in one transaction; returns how many rows were new."""
        prepared = {
            name: rows(name, chain.from_iterable(getattr(events, name) for events in batch)) for name in _IN_ORDER
        }
        return self._append(prepared, [character for events in batch for character in events.characters])

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
                "exposures": rows("exposures", exposures),
                "messages": rows("messages", messages),
                "signals": rows("signals", signals),
            }
        )

    def append_columns(self, table: str, columns: Mapping[str, Sequence[object]]) -> None:
        """Append many rows of one table, given as columns of equal length, in one durable transaction.

        `table` is users, conversations, messages, signals or exposures; columns are the fields of its record, and
        those with a default may be left out. Times are datetimes, NumPy datetime64 in UTC, or integers of
        microseconds since 1970.
        """
        if table not in schema.COLUMN_APPENDS:
            raise FlywheelError(f"table {table!r} does not exist; there are {', '.join(schema.COLUMN_APPENDS)}.")
        self._append({table: rows_of_columns(table, columns)})

    def add_characters(self, characters: Iterable[Character]) -> None:
        """Register characters. A changed character needs a new version: a version's content never changes."""
        self._append({}, list(characters))

    def add_users(self, users: Iterable[User]) -> None:
        """Register users; those known are left alone."""
        self._append({"users": rows("users", users)})

    def add_conversations(self, conversations: Iterable[Conversation]) -> None:
        """Register conversations of known users with known characters. Their messages are not looked at."""
        self._append({"conversations": rows("conversations", conversations)})

    def publish(self, publication: Publication) -> None:
        """Record a decision about a registered version of a character."""
        self._append({"publications": rows("publications", [publication])})

    def save_experiment(self, experiment: Experiment) -> None:
        """Record an experiment's start or change: the newest row of a name counts."""
        self._append({"experiments": rows("experiments", [experiment])})

    def add_key(self, key: ApiKey) -> None:
        """Record an API key."""
        self._append({"keys": rows("keys", [key])})

    def record_import(
        self, digest: str, *, file: str, format: str, conversations: int, messages: int, rejected: int
    ) -> None:
        """Remember that a file (by its SHA-256) was imported, and how it went the last time."""
        counts = {"conversations": conversations, "messages": messages, "rejected": rejected}
        with self.write() as connection:
            connection.execute(schema.imports.delete().where(schema.imports.c.id == digest))
            connection.execute(schema.imports.insert(), {"id": digest, "file": file, "format": format, **counts})

    # Change what may change

    def set_consent(self, user_id: str, consent: bool) -> None:
        """Say whether a user's messages may be used for training, from now on and for all they ever wrote."""
        with self.write() as connection:
            changed = connection.execute(
                schema.users.update().where(schema.users.c.id == user_id).values(consent=consent)
            )
            if changed.rowcount == 0:
                raise FlywheelError(f"user {user_id!r} is not in the store.")

    def revoke_key(self, id: str, at: datetime) -> None:
        """Revoke an API key; one that is revoked already keeps its time."""
        keys = schema.keys
        with self.write() as connection:
            found = connection.execute(select(keys.c.revoked_at).where(keys.c.id == id)).one_or_none()
            if found is None:
                raise FlywheelError(f"key {id!r} is not in the store.")
            if found.revoked_at is None:
                connection.execute(keys.update().where(keys.c.id == id).values(revoked_at=microseconds(at)))

    # Look up

    def characters(self) -> dict[str, Character]:
        """The newest version of every registered character by id, sorted by id."""
        with self._look() as connection:
            return lookups.newest_characters(connection)

    def character(self, id: str, version: int | None = None) -> Character | None:
        """A version of a character, the newest if None."""
        with self._look() as connection:
            return lookups.character(connection, id, version)

    def versions(self, id: str) -> list[Character]:
        """All versions of a character, oldest first."""
        with self._look() as connection:
            return lookups.versions(connection, id)

    def publications(self) -> dict[str, Publication]:
        """The newest decision about each character's newest version; absent where nobody decided about that one."""
        with self._look() as connection:
            return lookups.publications_in_force(connection)

    def publication_history(self, character_id: str) -> list[Publication]:
        """Every decision about a character, oldest first."""
        with self._look() as connection:
            return lookups.publication_history(connection, character_id)

    def experiments(self) -> dict[str, Experiment]:
        """The newest row of every experiment by name."""
        with self._look() as connection:
            return lookups.experiments_in_force(connection)

    def keys(self) -> list[ApiKey]:
        """All API keys, revoked and expired ones too, oldest first."""
        with self._look() as connection:
            return lookups.api_keys(connection)

    def user(self, id: str) -> User | None:
        """A user by id."""
        with self._look() as connection:
            return lookups.one(connection, schema.users, User, id)

    def populations(self, user_ids: Iterable[str]) -> dict[str, Source]:
        """The population of each known user of `user_ids`."""
        found: dict[str, Source] = {}
        wanted = sorted(set(user_ids))
        with self._look() as connection:
            for start in range(0, len(wanted), 500):  # SQLite bounds the number of variables
                found |= lookups.populations(connection, wanted[start : start + 500])
        return found

    def conversation(self, id: str) -> Conversation | None:
        """A conversation with its messages in order of arrival."""
        with self._look() as connection:
            return lookups.conversation(connection, id)

    def conversations_of(self, user_id: str, limit: int, before_id: str | None = None) -> list[Conversation]:
        """A user's conversations without messages, newest first; those older than `before_id` if it is given."""
        with self._look() as connection:
            return lookups.conversations_of(connection, user_id, limit, before_id)

    def signals_of(self, conversation_id: str) -> list[Signal]:
        """The signals on a conversation's messages, in order of arrival."""
        with self._look() as connection:
            return lookups.signals_of(connection, conversation_id)

    def cast(self) -> dict[str, Character]:
        """The characters in service by id: each at its newest approved version, unless it was retired."""
        with self._look() as connection:
            return lookups.cast(connection)

    def last_publication(self) -> int:
        """The number of the newest decision about any character: while it stays, so does `cast`."""
        with self.read() as connection:
            return lookups.last_publication(connection)

    def message(self, id: str) -> Message | None:
        """A message by id."""
        with self._look() as connection:
            return lookups.one(connection, schema.messages, Message, id)

    def tip(self, id: str) -> Tip | None:
        """The end of a conversation by its digest."""
        with self._look() as connection:
            return lookups.one(connection, schema.tips, Tip, id)

    def remembered(self, id: str) -> Remembered | None:
        """The answer once given to a request with an idempotency key."""
        with self._look() as connection:
            return lookups.one(connection, schema.remembered, Remembered, id)

    def position(self, at: datetime | None = None) -> Position:
        """Where the store ends now; with `at`, where it ended then: the last rows of that time or before."""
        with self.read() as connection:
            last = {}
            for name in schema.WINDOWED:
                table = schema.NUMBERED[name]
                newest = select(func.coalesce(func.max(table.c.seq), 0))
                last[name] = connection.scalar(
                    newest if at is None else newest.where(table.c.created_at <= microseconds(at))
                )
        return Position.model_validate(last)

    def export(
        self, folder: Path, after: Position, until: Position, *, consenting_only: bool = True, texts: bool = True
    ) -> None:
        """Write the rows after `after` up to `until` as Parquet; see `store.export`."""
        write_window(self, folder, after, until, consenting_only=consenting_only, texts=texts)

    # Transactions

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A read transaction: a consistent snapshot of the store."""
        with (
            database.plain_errors(self.where),
            database.reading(self._engine, snapshot=True) as connection,
            connection.begin(),
        ):
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A write transaction, durable when it ends; nobody else writes meanwhile."""
        with (
            database.plain_errors(self.where),
            self._lock,
            self._engine.connect().execution_options(writes=True) as connection,
            connection.begin(),
        ):
            yield connection

    @contextmanager
    def erasing(self) -> Iterator[Connection]:
        """A write transaction that may delete from the append-only tables. For erasure on request and retention."""
        with self.write() as connection:
            for statement in schema.allow_changes(self.dialect):
                connection.exec_driver_sql(statement)
            yield connection
            for statement in schema.forbid_changes(self.dialect):
                connection.exec_driver_sql(statement)

    @contextmanager
    def _look(self) -> Iterator[Connection]:
        """For single questions: each statement sees what is committed by then, and costs no transaction."""
        with database.plain_errors(self.where), database.reading(self._engine, snapshot=False) as connection:
            yield connection

    def _append(self, tables: Mapping[str, list[Row]], characters: Sequence[Character] = ()) -> int:
        """Append rows by table, characters first, in one transaction; returns how many were new."""
        wanted = {name: _first_by_id(given) for name, given in tables.items() if given}
        if not wanted and not characters:
            return 0
        try:
            with self.write() as connection:
                added = sum([_register(connection, character) for character in characters])
                return added + sum([self._insert(connection, name, given) for name, given in wanted.items()])
        except (IntegrityError, DataError, InterfaceError) as error:
            raise FlywheelError(
                f"cannot append to {', '.join(wanted)}: {database.reason(error)}; "
                "register users, characters and conversations first, and messages before their signals."
            ) from None  # the database's own error may quote the row
        except (UnicodeEncodeError, OverflowError) as error:
            raise FlywheelError(
                f"cannot append to {', '.join(wanted)}: {error}; give text and 64-bit numbers."
            ) from error

    def _insert(self, connection: Connection, name: str, given: list[Row]) -> int:
        table = schema.NUMBERED[name]
        if self.dialect == "postgresql":
            columns = tuple(map(list, zip(*given, strict=True)))
            return connection.exec_driver_sql(schema.insert(table, "postgresql", 1), columns).rowcount
        added = start = 0
        size = _AT_ONCE
        while start < len(given):
            while size > len(given) - start:
                size //= 2  # so a table has ten statements, each prepared once
            some = tuple(chain.from_iterable(given[start : start + size]))
            added += connection.exec_driver_sql(schema.insert(table, "sqlite", size), some).rowcount
            start += size
        return added


def _first_by_id(given: list[Row]) -> list[Row]:
    """The rows without repeats: the first of an id counts, as it does between appends."""
    known: dict[object, Row] = {}
    for row in given:
        known.setdefault(row[0], row)
    return list(known.values())


def _register(connection: Connection, character: Character) -> bool:
    """Register a version of a character unless it is known; a known version that differs is an error."""
    known = lookups.character(connection, character.id, character.version)
    if known is None:
        row = {
            "id": character.id, "version": character.version, "name": character.name,
            "record": character.model_dump_json(),
        }  # fmt: skip
        connection.execute(schema.characters.insert(), row)
    elif known != character:
        raise FlywheelError(
            f"character {character.id!r} version {character.version} differs from the one in the store; "
            f"a changed character needs a higher version, e.g. version = {character.version + 1}."
        )
    return known is None
