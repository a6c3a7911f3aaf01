"""Bring a SQLite store of an older version to the present schema, in one transaction.

Versions only ever add tables and columns and widen checks. So every older version is brought forward in the same way:
each of its tables is set aside, made anew as it is now, filled with the old rows under their old numbers, and dropped.

Version 2 added replies that are alternatives (`messages.parent_id`, `finish`), further kinds of signals, and what the
chat service keeps: moderations, tips, remembered answers, publications, experiments, keys.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

from ..errors import FlywheelError
from . import schema


def migrate_sqlite(path: Path, patience_s: float = 60) -> None:
    """Migrate the file at `path` to `schema.VERSION`; nothing happens where another process has done so.

    Raises FlywheelError, and leaves the file as it was, where its rows do not fit the schema.
    """
    with closing(sqlite3.connect(path, isolation_level=None, timeout=patience_s)) as connection:
        connection.execute("PRAGMA foreign_keys=OFF")  # rows are checked as a whole, below
        connection.execute("PRAGMA legacy_alter_table=ON")  # references keep naming the table that takes the place
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("BEGIN IMMEDIATE")
        try:
            if connection.execute("PRAGMA user_version").fetchone()[0] < schema.VERSION:
                _rebuild(connection, path)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def _rebuild(connection: sqlite3.Connection, path: Path) -> None:
    made = connection.execute("SELECT type, name FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    for kind, name in made:
        if kind in ("trigger", "index"):
            connection.execute(f"DROP {kind} {name}")
    old = [name for kind, name in made if kind == "table" and name in schema.METADATA.tables]
    for name in old:
        connection.execute(f"ALTER TABLE {name} RENAME TO old_{name}")
    for statement in schema.statements("sqlite"):
        connection.execute(statement)
    for name in old:
        columns = ", ".join(row[1] for row in connection.execute(f"PRAGMA table_info(old_{name})"))
        connection.execute(f"INSERT INTO {name} ({columns}) SELECT {columns} FROM old_{name} ORDER BY rowid")
        connection.execute(f"DROP TABLE old_{name}")
    lost = connection.execute("PRAGMA foreign_key_check").fetchall()
    if lost:
        raise FlywheelError(
            f"{path}: {len(lost)} rows refer to others that are missing, the first in {lost[0][0]}; "
            "restore the file from a backup before it is migrated."
        )
    connection.execute(f"PRAGMA user_version={schema.VERSION}")
