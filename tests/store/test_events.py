"""The event store: durable, append-only, idempotent, in order."""

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import DatabaseError

from characterflywheel.characters import bundled_characters
from characterflywheel.errors import FlywheelError
from characterflywheel.records import Conversation, Exposure, Message, Signal, User
from characterflywheel.service_records import Publication
from characterflywheel.store import EventStore, Position, StoreUnavailable

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


def publication(number: int, version: int = 1, state: str = "approved") -> Publication:
    values = {"id": f"p{number}", "character_id": "pirate", "version": version, "state": state, "created_at": AT}
    return Publication.model_validate(values | {"reason": "harmless", "reviewer": "safety"})


def prepare(store: EventStore) -> None:
    store.add_characters([PIRATE])
    store.add_users([user("ann"), user("ben", consent=False)])
    store.add_conversations([talk("c1", "ann"), talk("c2", "ben")])


@pytest.fixture
def store(where: Path | str) -> Iterator[EventStore]:
    with EventStore.open(where) as opened:
        prepare(opened)
        yield opened


def ids(store: EventStore, table: str) -> list[str]:
    with store.read() as connection:
        return list(connection.exec_driver_sql(f"SELECT id FROM {table} ORDER BY seq").scalars())


def test_events_are_numbered_in_order_and_repeats_are_left_alone(store: EventStore) -> None:
    signal = Signal(id="s1", message_id="m1", user_id="ann", kind="love", created_at=AT)
    exposure = Exposure(id="e1", experiment="x", arm="new", user_id="ann", created_at=AT)
    store.append([message(1), message(0)], [signal], [exposure])
    store.append([message(1, content="changed"), message(2)], [signal], [exposure])
    assert ids(store, "messages") == ["m1", "m0", "m2"]
    assert store.position() == Position(messages=3, signals=1, exposures=1)
    with store.read() as connection:
        assert connection.exec_driver_sql("SELECT content FROM messages WHERE id = 'm1'").scalar() == "message 1"


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(killed_after=st.integers(0, 6), batch=st.integers(1, 3))
def test_a_killed_run_that_repeats_ends_where_an_undisturbed_one_does(
    new_where: Callable[[], Path | str], killed_after: int, batch: int
) -> None:
    rows = [message(number) for number in (3, 1, 4, 0, 5, 2)]
    with EventStore.open(new_where()) as store:
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
        ("users", {"id": [None], "population": ["user"], "created_at": [0]}, "(?i)not.null"),
    ],
)
def test_bad_columns_are_refused(
    store: EventStore, table: str, columns: dict[str, list[object]], problem: str
) -> None:  # fmt: skip
    with pytest.raises(FlywheelError, match=problem):
        store.append_columns(table, columns)


def test_a_failed_append_leaves_nothing(store: EventStore) -> None:
    with pytest.raises(FlywheelError, match=r"(?i)foreign key"):
        store.append([message(1), message(2, by="nobody")])
    with pytest.raises(FlywheelError, match=r"(?i)foreign key"):
        store.append(signals=[Signal(id="s", message_id="m1", user_id="ann", kind="love", created_at=AT)])
    assert store.position() == Position()


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM messages",
        "UPDATE messages SET content = ''",
        "UPDATE exposures SET arm = 'other'",
        "DELETE FROM publications",
    ],
)
def test_history_cannot_be_changed(store: EventStore, statement: str) -> None:
    store.append([message(1)], exposures=[Exposure(id="e", experiment="x", arm="a", user_id="ann", created_at=AT)])
    store.publish(publication(1))
    with pytest.raises(DatabaseError, match="append-only"), store.write() as connection:
        connection.exec_driver_sql(statement)
    assert [ids(store, name) for name in ("messages", "exposures", "publications")] == [["m1"], ["e"], ["p1"]]


def test_not_even_by_roundabout_ways(store: EventStore) -> None:
    store.append([message(1)])
    way = {
        "sqlite": "INSERT OR REPLACE INTO messages SELECT * FROM messages",
        "postgresql": "TRUNCATE messages CASCADE",
    }
    with pytest.raises(DatabaseError, match="append-only"), store.write() as connection:
        connection.exec_driver_sql(way[store.dialect])
    assert ids(store, "messages") == ["m1"]


def interrupted_erasure(store: EventStore) -> None:
    with store.erasing() as connection:
        connection.exec_driver_sql("DELETE FROM messages")
        raise RuntimeError("interrupted")


def test_erasure_is_allowed_for_its_transaction_only_and_numbers_are_not_used_again(store: EventStore) -> None:
    store.append([message(number) for number in range(3)])
    with store.erasing() as connection:
        connection.exec_driver_sql("DELETE FROM messages WHERE id IN ('m1', 'm2')")
    store.append([message(number) for number in range(3, 5)])
    assert ids(store, "messages") == ["m0", "m3", "m4"]
    assert store.position().messages == 5
    with pytest.raises(DatabaseError, match="append-only"), store.write() as connection:
        connection.exec_driver_sql("DELETE FROM messages")
    with pytest.raises(RuntimeError):
        interrupted_erasure(store)
    with pytest.raises(DatabaseError, match="append-only"), store.write() as connection:
        connection.exec_driver_sql("DELETE FROM messages")
    assert ids(store, "messages") == ["m0", "m3", "m4"]


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


def _write_from_another_process(where: Path | str) -> None:
    with EventStore.open(where) as store:
        for number in range(20):
            store.append([message(1000 + number)])


def test_processes_append_side_by_side(store: EventStore, where: Path | str) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_write_from_another_process, args=(where,))
    process.start()
    for number in range(20):
        store.append([message(number)])
    process.join(60)
    assert process.exitcode == 0
    assert store.position().messages == 40


def test_it_is_durable(store: EventStore) -> None:
    asked = {
        "sqlite": ("PRAGMA journal_mode", "PRAGMA synchronous", "PRAGMA foreign_keys"),
        "postgresql": ("SHOW wal_level", "SHOW synchronous_commit", "SHOW fsync"),
    }[store.dialect]
    with store.read() as connection:
        answers = [connection.exec_driver_sql(one).scalar() for one in asked]
    assert answers in (["wal", 2, 1], ["replica", "on", "on"])


def test_the_store_opens_again_and_a_newer_one_is_refused(store: EventStore, where: Path | str) -> None:
    store.append([message(1)])
    with EventStore.open(where) as again:
        assert ids(again, "messages") == ["m1"]
    with store.write() as connection:
        newer = {"sqlite": "PRAGMA user_version=99", "postgresql": "UPDATE flywheel_schema SET version = 99"}
        connection.exec_driver_sql(newer[store.dialect])
    with pytest.raises(FlywheelError, match="schema version 99"):
        EventStore.open(where)


def test_what_is_no_store_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match="is missing"):
        EventStore.open(tmp_path / "no" / "flywheel.db")
    (tmp_path / "text.db").write_text("no database " * 1000)
    with pytest.raises(FlywheelError, match="not a usable event store"):
        EventStore.open(tmp_path / "text.db")
    with pytest.raises(FlywheelError, match="begins with mysql"):
        EventStore.open("mysql://localhost/x")
    with pytest.raises(StoreUnavailable, match="does not answer") as refused:
        EventStore.open(f"postgresql://me:hunter2@/x?host={tmp_path}")
    assert "hunter2" not in str(refused.value)
