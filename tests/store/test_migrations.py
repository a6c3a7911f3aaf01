"""Stores of an older version: brought forward whole, in one step, or left as they were."""

import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from characterflywheel import tables
from characterflywheel.characters import bundled_characters
from characterflywheel.errors import FlywheelError
from characterflywheel.records import Message, Signal
from characterflywheel.store import EventStore, Position, migrations, schema

# As version 0.1.0 made it.
VERSION_1 = """
CREATE TABLE characters (id TEXT NOT NULL, version INTEGER NOT NULL, name TEXT NOT NULL, record TEXT NOT NULL,
  PRIMARY KEY (id, version));
CREATE TABLE imports (id TEXT NOT NULL, file TEXT NOT NULL, format TEXT NOT NULL, conversations INTEGER NOT NULL,
  messages INTEGER NOT NULL, rejected INTEGER NOT NULL, PRIMARY KEY (id));
CREATE TABLE users (seq INTEGER NOT NULL, id TEXT NOT NULL, population TEXT NOT NULL, consent BOOLEAN NOT NULL,
  created_at BIGINT NOT NULL, PRIMARY KEY (seq), CONSTRAINT known_population CHECK (population IN ('internal', 'user')),
  UNIQUE (id));
CREATE TABLE conversations (seq INTEGER NOT NULL, id TEXT NOT NULL, user_id TEXT NOT NULL, character_id TEXT NOT NULL,
  character_version INTEGER NOT NULL, source TEXT NOT NULL, created_at BIGINT NOT NULL, PRIMARY KEY (seq),
  FOREIGN KEY(character_id, character_version) REFERENCES characters (id, version),
  CONSTRAINT known_source CHECK (source IN ('internal', 'user')), UNIQUE (id),
  FOREIGN KEY(user_id) REFERENCES users (id));
CREATE TABLE exposures (seq INTEGER NOT NULL, id TEXT NOT NULL, experiment TEXT NOT NULL, arm TEXT NOT NULL,
  user_id TEXT NOT NULL, created_at BIGINT NOT NULL, PRIMARY KEY (seq), UNIQUE (id),
  FOREIGN KEY(user_id) REFERENCES users (id));
CREATE TABLE messages (seq INTEGER NOT NULL, id TEXT NOT NULL, conversation_id TEXT NOT NULL, user_id TEXT NOT NULL,
  role TEXT NOT NULL, content TEXT NOT NULL, model TEXT, experiment TEXT, arm TEXT, fallback BOOLEAN NOT NULL,
  created_at BIGINT NOT NULL, PRIMARY KEY (seq),
  CONSTRAINT known_role CHECK (role IN ('system', 'user', 'assistant')), UNIQUE (id),
  FOREIGN KEY(conversation_id) REFERENCES conversations (id), FOREIGN KEY(user_id) REFERENCES users (id));
CREATE TABLE signals (seq INTEGER NOT NULL, id TEXT NOT NULL, message_id TEXT NOT NULL, user_id TEXT NOT NULL,
  kind TEXT NOT NULL, value FLOAT NOT NULL, text TEXT, created_at BIGINT NOT NULL, PRIMARY KEY (seq),
  CONSTRAINT known_kind CHECK (kind IN ('continue', 'thumb_up', 'thumb_down', 'love', 'regenerate', 'rating',
  'feedback')), UNIQUE (id), FOREIGN KEY(message_id) REFERENCES messages (id),
  FOREIGN KEY(user_id) REFERENCES users (id));
"""
PIRATE = bundled_characters()["pirate"]
AT = datetime(2026, 1, 5, 1, 2, 3, 456789, tzinfo=UTC)
TIME = 1_767_574_923_456_789
TABLES = ("characters", "imports", "users", "conversations", "exposures", "messages", "signals")


def old_store(path: Path) -> Path:
    """A store of version 1: ten messages with gaps in their numbers, a signal, an exposure."""
    record = PIRATE.model_dump_json(exclude={"card"})  # a field that came later
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript("PRAGMA journal_mode=WAL;" + VERSION_1)
        for table in ("messages", "signals", "exposures"):
            for action in ("UPDATE", "DELETE"):
                connection.execute(
                    f"CREATE TRIGGER {table}_refuse_{action.lower()} BEFORE {action} ON {table} "
                    f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
                )
        connection.execute("INSERT INTO characters VALUES ('pirate', 1, ?, ?)", (PIRATE.name, record))
        connection.execute("INSERT INTO imports VALUES ('digest', 'file.jsonl', 'openai', 1, 10, 0)")
        connection.execute("INSERT INTO users VALUES (4, 'ann', 'user', 1, ?)", (TIME,))
        connection.execute("INSERT INTO conversations VALUES (2, 'c1', 'ann', 'pirate', 1, 'user', ?)", (TIME,))
        connection.execute("INSERT INTO exposures VALUES (3, 'e1', 'x', 'new', 'ann', ?)", (TIME,))
        for number in range(10):
            role = ("user", "assistant")[number % 2]
            row = (7 + 3 * number, f"m{9 - number}", "c1", "ann", role, f"\u2693 {number}", None, None, "new", 0, TIME)
            connection.execute(f"INSERT INTO messages VALUES ({', '.join('?' * len(row))})", row)
        connection.execute("INSERT INTO signals VALUES (1, 's1', 'm8', 'ann', 'rating', 4.5, 'good', ?)", (TIME,))
        connection.execute("PRAGMA user_version=1")
    return path


def contents(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every row of the tables and columns that version 1 had."""
    old = sqlite3.connect(":memory:")
    old.executescript(VERSION_1)
    columns = {name: ", ".join(row[1] for row in old.execute(f"PRAGMA table_info({name})")) for name in TABLES}
    old.close()
    with closing(sqlite3.connect(path)) as connection:
        return {name: connection.execute(f"SELECT {columns[name]} FROM {name}").fetchall() for name in TABLES}


def shape(path: Path) -> list[tuple[str, str, str]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY type, name").fetchall()


def test_every_row_of_an_old_store_is_kept_under_its_number(tmp_path: Path) -> None:
    path = old_store(tmp_path / "flywheel.db")
    before = contents(path)
    with EventStore.open(path) as store:
        assert store.position() == Position(messages=34, signals=1, exposures=3)
        store.add_characters([PIRATE])  # the same character, though its old record lacks a field
        said = store.conversation("c1")
        store.export(tmp_path / "x", Position(), store.position())
    assert contents(path) == before
    assert sum(map(len, before.values())) == 16
    assert said is not None
    assert said.messages[0].content == "\u2693 0"
    assert said.messages[0].created_at == AT
    assert {message.parent_id for message in said.messages} == {None}
    assert len(tables.read(tmp_path / "x" / "messages.parquet", Message)) == 10


def test_a_migrated_store_is_like_a_new_one(tmp_path: Path) -> None:
    path = old_store(tmp_path / "flywheel.db")
    EventStore.open(path).close()
    EventStore.open(tmp_path / "new.db").close()
    assert shape(path) == shape(tmp_path / "new.db")


def test_a_migrated_store_takes_new_events_and_refuses_changes(tmp_path: Path) -> None:
    path = old_store(tmp_path / "flywheel.db")
    with EventStore.open(path) as store:
        again = Message(id="m99", conversation_id="c1", user_id="ann", role="assistant", content="!", parent_id="m1", created_at=AT)  # fmt: skip # noqa: E501
        store.append([again], [Signal(id="s2", message_id="m99", user_id="ann", kind="report", created_at=AT)])
        assert store.message("m99") == again
        assert store.position() == Position(messages=35, signals=2, exposures=3)
        with pytest.raises(Exception, match="append-only"), store.write() as connection:
            connection.exec_driver_sql("UPDATE messages SET content = ''")
        with pytest.raises(FlywheelError, match="FOREIGN KEY"):
            store.append([again.model_copy(update={"id": "m100", "conversation_id": "c9"})])


def test_a_failed_migration_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = old_store(tmp_path / "flywheel.db")
    before, shape_before = contents(path), shape(path)
    made = schema.statements("sqlite")
    monkeypatch.setattr(schema, "statements", lambda dialect: [*made, "CREATE TABLE broken ("])
    with pytest.raises(sqlite3.OperationalError):
        migrations.migrate_sqlite(path)
    monkeypatch.undo()
    assert (contents(path), shape(path)) == (before, shape_before)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("INSERT INTO conversations VALUES (9, 'c9', 'nobody', 'pirate', 1, 'user', 0)")
        connection.commit()
    with pytest.raises(FlywheelError, match="1 rows refer to others that are missing"):
        EventStore.open(path)
    assert shape(path) == shape_before
