"""SillyTavern's chats: alternatives and their signals kept, times in all its ways, a grown file adds what is new."""

import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from characterflywheel.errors import FlywheelError
from characterflywheel.importers import import_file
from characterflywheel.records import Character, Message, Signal
from characterflywheel.sillytavern import NotAChatError, chat_of, is_readable
from characterflywheel.store import EventStore, Position
from characterflywheel.store.export import conversations_from_export
from characterflywheel.tables import read

HEADER = {
    "user_name": "Ann", "character_name": "Mira", "create_date": "2024-7-12 @09h 08m 07s 6ms", "chat_metadata": {},
}  # fmt: skip
GREETING = {"name": "Mira", "is_user": False, "mes": "Come in!", "swipes": ["Come in!", "Ahoy!"], "swipe_id": 0}
HELLO = {"name": "Ann", "is_user": True, "mes": "Hello", "send_date": "July 12, 2024 9:10am"}
REPLY = {
    "name": "Mira", "is_user": False, "mes": "Tea?", "swipes": ["No.", "Tea?", "Go away."], "swipe_id": 1,
    "send_date": "2024-07-12T09:11:00.000Z", "extra": {"model": "llama", "api": "x"},
}  # fmt: skip
THANKS = {"name": "Ann", "is_user": True, "mes": "Please", "send_date": 1720775520000}
NOTE = {"name": "System", "is_user": False, "is_system": True, "mes": "Welcome to the program"}
CHAT = (HEADER, NOTE, GREETING, HELLO, REPLY, THANKS)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EventStore]:
    mira = Character(id="mira", name="Mira", category="", traits=(), greeting="", card={"name": "Mira"})
    with EventStore.open(tmp_path / "flywheel.db") as opened:
        opened.add_characters([mira])
        yield opened


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


def exported(store: EventStore, folder: Path) -> Path:
    store.export(folder, Position(), store.position())
    return folder


def test_the_path_that_was_taken_is_the_conversation_and_the_rest_are_alternatives(
    store: EventStore, tmp_path: Path
) -> None:
    found = import_file(store, write(tmp_path / "chat.jsonl", *CHAT), "sillytavern", tmp_path / "bad")
    assert (found.conversations, found.messages, found.rejected) == (1, 6, 0)
    folder = exported(store, tmp_path / "out")
    (conversation,) = conversations_from_export(folder)
    assert conversation.character_id == "mira"
    assert [(one.role, one.content) for one in conversation.messages] == [
        ("assistant", "Come in!"), ("user", "Hello"), ("assistant", "Tea?"), ("user", "Please"),
    ]  # fmt: skip
    messages = {one.content: one for one in read(folder / "messages.parquet", Message)}
    assert {messages[text].parent_id for text in ("No.", "Tea?", "Go away.")} == {messages["Hello"].id}
    assert messages["Tea?"].model == "llama"
    assert "Ahoy!" not in messages, "a greeting nobody chose is no reply"
    signals = {(one.message_id, one.kind) for one in read(folder / "signals.parquet", Signal)}
    assert signals == {
        (messages["No."].id, "regenerate"), (messages["Tea?"].id, "regenerate"), (messages["Tea?"].id, "pick"),
    }  # fmt: skip


def test_times_are_read_however_they_are_written() -> None:
    chat = chat_of(json.dumps(line).encode() for line in CHAT)
    assert chat.starts == datetime(2024, 7, 12, 9, 8, 7, 6000, tzinfo=UTC)
    assert [said.at for said in chat.said] == [
        None, datetime(2024, 7, 12, 9, 10, tzinfo=UTC), datetime(2024, 7, 12, 9, 11, tzinfo=UTC),
        datetime(2024, 7, 12, 9, 12, tzinfo=UTC),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("written", "hour"), [("June 1, 2023 12:05am", 0), ("June 1, 2023 12:05pm", 12), ("2023-6-1@03h05m00s", 3)]
)
def test_times_of_day(written: str, hour: int) -> None:
    at = chat_of([json.dumps(HELLO | {"send_date": written}).encode()]).said[0].at
    assert at is not None
    assert (at.date().isoformat(), at.hour, at.minute) == ("2023-06-01", hour, 5)


def test_a_file_twice_adds_nothing_and_a_grown_one_what_is_new(store: EventStore, tmp_path: Path) -> None:
    import_file(store, write(tmp_path / "chat.jsonl", *CHAT), "sillytavern", tmp_path / "bad")
    assert import_file(store, tmp_path / "chat.jsonl", "sillytavern", tmp_path / "bad").added == 0
    swiped = REPLY | {"swipes": [*REPLY["swipes"], "Cake?"], "swipe_id": 3, "mes": "Cake?"}  # type: ignore[misc]
    grown = write(
        tmp_path / "renamed.jsonl", HEADER, GREETING, HELLO, swiped, THANKS, GREETING | {"mes": "Here.", "swipes": []}
    )
    assert import_file(store, grown, "sillytavern", tmp_path / "bad").added == 2
    (conversation,) = conversations_from_export(exported(store, tmp_path / "out"))
    assert conversation.messages[-1].content == "Here."


def test_bad_lines_are_kept_aside_and_the_rest_comes_in(store: EventStore, tmp_path: Path) -> None:
    path = write(tmp_path / "chat.jsonl", HEADER, HELLO, '{"mes": 3}', "{", REPLY)
    found = import_file(store, path, "sillytavern", tmp_path / "bad")
    assert (found.conversations, found.rejected) == (1, 2)
    assert [(bad.line, bad.reason.split(":")[0]) for bad in found.bad_lines] == [(3, "mes"), (4, "not JSON")]
    assert found.rejected_path is not None
    assert found.rejected_path.read_text() == '{"mes": 3}\n{\n'


def test_an_unknown_character_is_made_from_its_name(store: EventStore, tmp_path: Path) -> None:
    lines = [one | {"name": "Zed"} if one.get("name") == "Mira" else one for one in CHAT]
    import_file(store, write(tmp_path / "chat.jsonl", *lines), "sillytavern", tmp_path / "bad")
    assert "Zed" in {one.name for one in store.characters().values()}


def test_a_group_and_a_monologue_are_refused(store: EventStore, tmp_path: Path) -> None:
    for lines, why in (
        ((HEADER, HELLO, REPLY, REPLY | {"name": "Bo"}), "group of 2 characters"),
        ((HEADER, REPLY), "no message of a user"),
    ):
        with pytest.raises(FlywheelError, match=why):
            import_file(store, write(tmp_path / "chat.jsonl", *lines), "sillytavern", tmp_path / "bad")


@given(st.lists(st.binary(max_size=60) | st.sampled_from([json.dumps(one).encode() for one in CHAT]), max_size=8))
def test_any_lines_are_a_chat_or_refused(lines: list[bytes]) -> None:
    good = [line for line in lines if is_readable(line)]
    with contextlib.suppress(NotAChatError):
        assert chat_of(good).said


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys((*REPLY, *HEADER), json_values)))
def test_any_object_is_read_or_refused(line: dict[str, object]) -> None:
    raw = json.dumps(line).encode()
    assert is_readable(raw) in (True, False)
    with contextlib.suppress(NotAChatError):
        assert chat_of([raw]).said
