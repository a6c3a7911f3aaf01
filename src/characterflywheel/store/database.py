"""One schema on two databases: how each is opened, made durable, locked for a writer, and created or migrated.

SQLite keeps its log ahead of the file (WAL) and syncs it at every commit (synchronous FULL). PostgreSQL commits with
`synchronous_commit` on, and appends hold an advisory lock until they are committed, so that on both the numbers of
rows are in the order of commits: who has read up to a number has read all there ever will be up to it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError

from ..errors import FlywheelError
from . import schema
from .migrations import migrate_sqlite
from .schema import Dialect

_PRAGMAS = (
    "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "recursive_triggers=ON", "secure_delete=ON",
    "cache_size=-16384",
)  # fmt: skip
_APPENDS = 0x666C79776865656C  # "flywheel": the advisory lock of whoever appends
_log = logging.getLogger(__name__)


class StoreUnavailable(FlywheelError):  # noqa: N818 - a state, not a mistake
    """The database is locked, full or gone. What was being written may be written again: rows are known by their id."""


def connect(where: Path | str, patience_s: float, folds_log: bool = True) -> Engine:
    """An engine for a SQLite file or a `postgresql://` address; waits up to `patience_s` for the database's locks.

    `folds_log`: commits fold SQLite's log into its file now and then; else somebody must call `fold_log`.
    """
    if isinstance(where, str) and "://" in where:
        return _postgresql(where, patience_s)
    path = Path(where)
    if not path.parent.is_dir():
        raise FlywheelError(f"folder {path.parent} is missing: `flywheel init DIR` creates a workspace.")
    engine = create_engine(
        URL.create("sqlite", database=str(path)), connect_args={"timeout": patience_s}, hide_parameters=True
    )
    event.listen(engine, "connect", _set_up_sqlite)
    if not folds_log:
        event.listen(engine, "connect", lambda opened, _: opened.execute("PRAGMA wal_autocheckpoint=0"))
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def fold_log(engine: Engine) -> None:
    """Fold what is committed of SQLite's log into its file, while others read and write."""
    if engine.dialect.name == "sqlite":
        with reading(engine, snapshot=False) as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")


def dialect(engine: Engine) -> Dialect:
    """Which of the two it is."""
    return cast(Dialect, engine.dialect.name)


def prepare(engine: Engine, patience_s: float) -> None:
    """Create the store in an empty database, migrate one of an older version, refuse one of a newer."""
    where = engine.url.render_as_string(hide_password=True) if engine.url.password else engine.url.database
    with engine.connect() as connection, connection.begin():
        version = _version(connection)
    if version == 0:
        with engine.connect().execution_options(writes=True) as connection, connection.begin():
            version = _version(connection)  # another process may have been faster
            if version == 0:
                _create(connection)
                return
    if version > schema.VERSION:
        raise FlywheelError(
            f"{where} has schema version {version}, this program reads up to {schema.VERSION}; "
            "use the program that wrote it, or a newer one."
        )
    if version < schema.VERSION:
        engine.dispose()
        migrate_sqlite(Path(str(engine.url.database)), patience_s)


def reading(engine: Engine, *, snapshot: bool) -> Connection:
    """A connection for reading: all statements of a transaction see one snapshot, or each what is committed by then."""
    if engine.dialect.name == "sqlite":
        return engine.connect().execution_options(alone=not snapshot)
    return engine.connect().execution_options(isolation_level="REPEATABLE READ" if snapshot else "AUTOCOMMIT")


@contextmanager
def plain_errors(where: str) -> Iterator[None]:
    """Say of a database that does not answer that it is `StoreUnavailable`."""
    try:
        yield
    except DBAPIError as error:
        lost = isinstance(error, OperationalError) or error.connection_invalidated
        if lost or (isinstance(error, InterfaceError) and "binding" not in str(error.orig)):
            raise StoreUnavailable(
                f"{where} does not answer ({reason(error)}); free its disk or its lock, or start it, "
                "and do it again: what is stored already stays as it is."
            ) from error
        raise


def reason(error: DBAPIError) -> str:
    """What the database said, without the row it said it of: errors are logged, what people write is not."""
    diagnosis = getattr(error.orig, "diag", None)
    return str((diagnosis and diagnosis.message_primary) or error.orig).strip()


def _set_up_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions are begun below, not guessed by the driver
    for pragma in _PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    """A writer takes its lock at once, so that two processes queue instead of failing in the middle."""
    options = connection.get_execution_options()
    if not options.get("alone"):
        connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("writes") else "BEGIN")


def _postgresql(address: str, patience_s: float) -> Engine:
    try:
        url = make_url(address)
    except ArgumentError as error:
        raise FlywheelError(f"store url {address!r} is no address; write postgresql://USER@HOST/DATABASE.") from error
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise FlywheelError(
            f"store url begins with {url.drivername}://; a store is a SQLite file or postgresql://USER@HOST/DATABASE."
        )
    try:
        engine = create_engine(
            url.set(drivername="postgresql+psycopg"), pool_pre_ping=True, hide_parameters=True,
            connect_args={
                "connect_timeout": 10, "tcp_user_timeout": 10_000, "keepalives_idle": 10, "keepalives_interval": 5,
                "keepalives_count": 2,
            },
        )  # fmt: skip
    except ImportError as error:
        raise FlywheelError('PostgreSQL needs psycopg: pip install "psycopg[binary]".') from error

    def set_up(connection: Any, _record: object) -> None:
        connection.autocommit = True
        connection.execute("SET synchronous_commit = on")
        connection.execute(f"SET lock_timeout = {max(1, int(patience_s * 1000))}")
        if connection.execute("SHOW fsync").fetchone()[0] != "on":
            _log.warning("the PostgreSQL server runs with fsync = off: a power cut loses acknowledged events")
        connection.autocommit = False

    event.listen(engine, "connect", set_up)
    event.listen(engine, "begin", _begin_postgresql)
    return engine


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get("writes"):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_APPENDS})")


def _version(connection: Connection) -> int:
    """The schema's version; 0 where there is none."""
    if connection.dialect.name == "sqlite":
        return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
    if connection.exec_driver_sql("SELECT to_regclass('flywheel_schema')").scalar_one() is None:
        return 0
    return int(connection.exec_driver_sql("SELECT version FROM flywheel_schema").scalar_one())


def _create(connection: Connection) -> None:
    speak = cast(Dialect, connection.dialect.name)
    for statement in schema.statements(speak):
        connection.exec_driver_sql(statement)
    if speak == "sqlite":
        connection.exec_driver_sql(f"PRAGMA user_version={schema.VERSION}")
    else:
        connection.exec_driver_sql("CREATE TABLE flywheel_schema (version integer NOT NULL)")
        connection.exec_driver_sql(f"INSERT INTO flywheel_schema VALUES ({schema.VERSION})")
