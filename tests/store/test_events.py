"""The event store: durable, append-only, idempotent, in order."""

import multiprocessing
import sqlite3
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from characterflywheel.characters import bundled_characters
from characterflywheel.errors import FlywheelError
from characterflywheel.records import Conversation, Exposure, Message, Signal, User
from characterflywheel.store import EventStore, Position

AT = datetime(2026, 1, 5, tzinfo=UTC)
PIRATE = bundled_characters()["pirate"]


def user(name: str, consent: bool = True) -> User:
    return User(id=name, population="user", consent=consent, created_at=AT)


def talk(name: str, by: str) -> Conversation:
    return Conversation(
        id=name, user_id=by, character_id="pirate", character_version=1, source="user", created_at=AT
    )  # fmt: skip


def message(number: int, by: str = "ann", conversation: str = "c1", **more: object) -> Message:
    values = {"role": "user", "content": f"message {number}", "created_at": AT + timedelta(seconds=number)} | more
    return Message.model_validate({"id": f"m{number}", "conversation_id": conversation, "user_id": by} | values)


def prepare(store: EventStore) -> None:
    store.add_characters([PIRATE])
    store.add_users([user("ann"), user("ben", consent=False)])
    store.add_conversations([talk("c1", "ann"), talk("c2", "ben")])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EventStore]:
    with EventStore.open(tmp_path / "flywheel.db") as opened:
        prepare(opened)
        yield opened


def ids(store: EventStore, table: str) -> list[str]:
    with sqlite3.connect(store.path) as connection:
        rows = connection.execute(f"SELECT id FROM {table} ORDER BY seq").fetchall()
    connection.close()
    return [row[0] for row in rows]


def test_events_are_numbered_in_order_and_repeats_are_left_alone(store: EventStore) -> None:
    signal = Signal(id="s1", message_id="m1", user_id="ann", kind="love", created_at=AT)
    exposure = Exposure(id="e1", experiment="x", arm="new", user_id="ann", created_at=AT)
    store.append([message(1), message(0)], [signal], [exposure])
    store.append([message(1, content="changed"), message(2)], [signal], [exposure])
    assert ids(store, "messages") == ["m1", "m0", "m2"]
    assert store.position() == Position(messages=3, signals=1, exposures=1)
    with store.read() as connection:
        assert connection.exec_driver_sql("SELECT content FROM messages WHERE id = 'm1'").scalar() == "message 1"


@settings(max_examples=8, deadline=None, derandomize=True)
@given(killed_after=st.integers(0, 6), batch=st.integers(1, 3))
def test_a_killed_run_that_repeats_ends_where_an_undisturbed_one_does(
    tmp_path_factory: pytest.TempPathFactory, killed_after: int, batch: int
) -> None:
    rows = [message(number) for number in (3, 1, 4, 0, 5, 2)]
    with EventStore.open(tmp_path_factory.mktemp("store") / "flywheel.db") as store:
        prepare(store)
        store.append(rows[:killed_after])
        for start in range(0, len(rows), batch):
            store.append(rows[start : start + batch])
        assert ids(store, "messages") == ["m3", "m1", "m4", "m0", "m5", "m2"]
        assert store.position().messages == 6


def test_columns_take_numpy_and_fill_what_is_left_out(store: EventStore) -> None:
    seconds = np.arange(4).astype("timedelta64[s]")
    columns = {
        "id": [f"m{i}" for i in range(4)], "conversation_id": ["c1"] * 4, "user_id": ["ann"] * 4, "role": ["user"] * 4,
        "content": np.array(["a", "b", "c", "d"]), "created_at": np.datetime64("2026-01-05") + seconds,
    }  # fmt: skip
    store.append_columns("messages", columns)
    store.append_columns("messages", columns)
    by_records = message(9, created_at=AT + timedelta(seconds=3))
    store.append([by_records])
    with store.read() as connection:
        times = connection.exec_driver_sql("SELECT created_at, fallback FROM messages ORDER BY seq").all()
    assert len(times) == 5
    assert tuple(times[3]) == tuple(times[4])


@pytest.mark.parametrize(
    ("table", "columns", "problem"),
    [
        ("talks", {}, "does not exist"),
        ("users", {"id": ["a"], "population": ["user"]}, r"missing columns \['created_at'\]"),
        ("users", {"id": ["a"], "population": ["user"], "created_at": [0], "age": [3]}, r"unknown columns \['age'\]"),
        ("users", {"id": ["a", "b"], "population": ["user"], "created_at": [0]}, "different length"),
        ("users", {"id": ["a"], "population": ["martian"], "created_at": [0]}, "known_population"),
        ("users", {"id": ["a"], "population": ["user"], "created_at": [datetime(2026, 1, 1)]}, "no time zone"),
        ("users", {"id": [None], "population": ["user"], "created_at": [0]}, "NOT NULL"),
    ],
)
def test_bad_columns_are_refused(
    store: EventStore, table: str, columns: dict[str, list[object]], problem: str
) -> None:  # fmt: skip
    with pytest.raises(FlywheelError, match=problem):
        store.append_columns(table, columns)


def test_a_failed_append_leaves_nothing(store: EventStore) -> None:
    with pytest.raises(FlywheelError, match="FOREIGN KEY"):
        store.append([message(1), message(2, by="nobody")])
    with pytest.raises(FlywheelError, match="FOREIGN KEY"):
        store.append(signals=[Signal(id="s", message_id="m1", user_id="ann", kind="love", created_at=AT)])
    assert store.position() == Position()


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM messages",
        "UPDATE messages SET content = ''",
        "INSERT OR REPLACE INTO messages SELECT * FROM messages",
        "UPDATE exposures SET arm = 'other'",
    ],
)
def test_history_cannot_be_changed(store: EventStore, statement: str) -> None:
    store.append([message(1)], exposures=[Exposure(id="e", experiment="x", arm="a", user_id="ann", created_at=AT)])
    with pytest.raises(Exception, match="append-only"), store.read() as connection:
        connection.exec_driver_sql(statement)
    assert ids(store, "messages") == ["m1"]


def test_a_changed_character_needs_a_new_version(store: EventStore) -> None:
    store.add_characters([PIRATE])
    changed = PIRATE.model_copy(update={"greeting": "Arr"})
    with pytest.raises(FlywheelError, match="version = 2"):
        store.add_characters([changed])
    newer = changed.model_copy(update={"version": 2})
    store.add_characters([newer])
    assert store.characters() == {"pirate": newer}


def test_users(store: EventStore) -> None:
    store.add_users([User(id="tia", population="internal", created_at=AT)])
    assert store.populations(["ann", "tia", "who"]) == {"ann": "user", "tia": "internal"}
    with pytest.raises(FlywheelError, match="'who' is not in the store"):
        store.set_consent("who", True)


def test_threads_append_side_by_side(store: EventStore) -> None:
    def write(worker: int) -> None:
        for number in range(10):
            store.append([message(100 * worker + number)])

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.position().messages == 40


def _write_from_another_process(path: Path) -> None:
    with EventStore.open(path) as store:
        for number in range(20):
            store.append([message(1000 + number)])


def test_processes_append_side_by_side(store: EventStore) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_write_from_another_process, args=(store.path,))
    process.start()
    for number in range(20):
        store.append([message(number)])
    process.join(60)
    assert process.exitcode == 0
    assert store.position().messages == 40


def test_it_is_durable_and_what_is_no_store_is_said_so(store: EventStore, tmp_path: Path) -> None:
    with store.read() as connection:
        pragmas = [
            connection.exec_driver_sql(f"PRAGMA {p}").scalar() for p in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert pragmas == ["wal", 2, 1]
    with pytest.raises(FlywheelError, match="is missing"):
        EventStore.open(tmp_path / "no" / "flywheel.db")
    (tmp_path / "text.db").write_text("no database " * 1000)
    with pytest.raises(FlywheelError, match="not a usable event store"):
        EventStore.open(tmp_path / "text.db")
    newer = sqlite3.connect(tmp_path / "newer.db")
    newer.execute("PRAGMA user_version=99")
    newer.close()
    with pytest.raises(FlywheelError, match="schema version 99"):
        EventStore.open(tmp_path / "newer.db")
