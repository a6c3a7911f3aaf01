"""Importing: nothing lost, nothing twice, bad lines named and kept."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from characterflywheel.characters import bundled_characters
from characterflywheel.errors import FlywheelError
from characterflywheel.importers import import_file
from characterflywheel.records import Conversation, Signal
from characterflywheel.store import EventStore, Position
from characterflywheel.store.export import conversations_from_export
from characterflywheel.tables import read

HELLO = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Ahoy"}]}
FULL = HELLO | {
    "id": "t1",
    "user": "ann",
    "character": "pirate",
    "model": "m",
    "timestamp": "2026-01-05T10:00:00+02:00",
}
PARTS = {
    "messages": [
        {"role": "system", "content": "Be a cat."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EventStore]:
    with EventStore.open(tmp_path / "flywheel.db") as opened:
        opened.add_characters(bundled_characters().values())
        yield opened


def write(path: Path, *lines: object) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def exported(store: EventStore, folder: Path) -> list[Conversation]:
    store.export(folder, Position(), store.position())
    return conversations_from_export(folder)


def test_openai_lines(store: EventStore, tmp_path: Path) -> None:
    path = write(tmp_path / "talks.jsonl", FULL, b"", HELLO, PARTS, HELLO)
    summary = import_file(store, path, "openai", tmp_path / "rejected")
    assert (summary.conversations, summary.messages, summary.added, summary.rejected) == (4, 7, 7, 0)
    full, plain, parts, again = exported(store, tmp_path / "x")
    assert (full.id, full.user_id, full.character_id) == ("t1", "ann", "pirate")
    assert full.created_at.isoformat() == "2026-01-05T08:00:00+00:00"
    assert [(m.role, m.content, m.model) for m in full.messages] == [
        ("user", "Hello", None),
        ("assistant", "Ahoy", "m"),
    ]
    assert (full.messages[1].created_at - full.messages[0].created_at).total_seconds() == 1
    assert plain.id != again.id
    assert store.characters()[parts.character_id].instructions[0].text == "Be a cat."
    assert [m.content for m in parts.messages] == ["Hi"]


def test_twice_adds_nothing_and_a_grown_file_adds_what_is_new(store: EventStore, tmp_path: Path) -> None:
    path = write(tmp_path / "talks.jsonl", HELLO, FULL, HELLO)
    import_file(store, path, "openai", tmp_path / "rejected")
    assert import_file(store, path, "openai", tmp_path / "rejected").added == 0
    write(path, PARTS, HELLO, FULL, HELLO)
    assert import_file(store, path, "openai", tmp_path / "rejected").added == 1


def test_corrupt_lines_are_named_and_kept_and_the_rest_imported(store: EventStore, tmp_path: Path) -> None:
    bad = [
        b'{"messages": [',
        b"\xff\xfe not text",
        json.dumps({"messages": []}).encode(),
        json.dumps({"messages": [{"role": "robot", "content": "x"}]}).encode(),
        json.dumps(HELLO | {"character": "nobody"}).encode(),
        json.dumps({"messages": [HELLO["messages"][0], {"role": "system", "content": "x"}]}).encode(),
        json.dumps(FULL | {"user": "ben"}).encode(),
    ]
    path = write(tmp_path / "talks.jsonl", FULL, *bad, HELLO)
    summary = import_file(store, path, "openai", tmp_path / "rejected")
    assert (summary.conversations, summary.rejected) == (2, 7)
    assert [one.line for one in summary.bad_lines] == [2, 3, 4, 5, 6, 7, 8]
    assert summary.rejected_path is not None
    assert summary.rejected_path.read_bytes().splitlines() == bad
    reasons = summary.rejected_path.with_suffix(".errors.txt").read_text().splitlines()
    for reason, part in zip(
        reasons,
        ["line 2: Invalid JSON", "line 3: ", "messages", "role", "'nobody'", "system", "on line 1 already"],
        strict=True,
    ):
        assert part in reason
    assert "7 rejected" in summary.line()
    assert "line 2: Invalid JSON" in summary.line()


@pytest.mark.parametrize(
    ("name", "content", "format", "problem"),
    [
        ("empty.jsonl", b"", "openai", "the file is empty"),
        ("bad.jsonl", b"nonsense\n", "openai", "line 1: Invalid JSON"),
        ("dataset.json", b"{}", "chitchat", "the file is empty"),
        ("dataset.json", b"[]", "chitchat", "holds a list"),
        ("dataset.json", b"{", "chitchat", "is not JSON"),
        ("x.jsonl", b"", "csv", "does not exist; there are openai, sillytavern, chitchat"),
    ],
)
def test_a_useless_file_is_one_clear_error(
    store: EventStore, tmp_path: Path, name: str, content: bytes, format: str, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FlywheelError, match=problem):
        import_file(store, tmp_path / name, format, tmp_path / "rejected")  # type: ignore[arg-type]
    assert store.position() == Position()


def test_a_missing_file(store: EventStore, tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match="is missing"):
        import_file(store, tmp_path / "nowhere.jsonl", "openai", tmp_path / "rejected")


def test_chitchat_keeps_senders_times_and_ratings(store: EventStore, tmp_path: Path) -> None:
    def said(text: str, sender: str, second: int) -> dict[str, str]:
        return {"text": text, "sender": sender, "timestamp": f"2018-05-02T19:38:{second:02}Z"}

    talk = {
        "messages": [[said("Hello", "a", 1), said("You there?", "a", 2)], [said("Yes", "b", 9)]],
        "ratings": {"witty": 10, "upbeat": 1}, "prompt": "?", "start": "2018-05-02T19:38:00Z",
    }  # fmt: skip
    (tmp_path / "dataset.json").write_text(
        json.dumps({"t1": talk, "t2": {"messages": [[{"text": 3}]]}, "t3": {"messages": []}})
    )
    summary = import_file(store, tmp_path, "chitchat", tmp_path / "rejected")
    assert (summary.conversations, summary.messages, summary.rejected) == (1, 3, 2)
    assert [one.line for one in summary.bad_lines] == [2, 3]
    (kept,) = exported(store, tmp_path / "x")
    assert [(m.user_id, m.role, m.content) for m in kept.messages] == [
        ("a", "user", "Hello"), ("a", "user", "You there?"), ("b", "assistant", "Yes"),
    ]  # fmt: skip
    assert kept.messages[2].created_at.isoformat() == "2018-05-02T19:38:09+00:00"
    ratings = read(tmp_path / "x" / "signals.parquet", Signal)
    assert [(s.kind, s.value, s.text) for s in ratings] == [
        ("rating", 1.0, "upbeat: 1 of 10"),
        ("rating", 5.0, "witty: 10 of 10"),
    ]


def test_the_real_chitchat_data_set(store: EventStore, tmp_path: Path) -> None:
    package = pytest.importorskip("chitchat_dataset", reason="chitchat-dataset is not installed")
    entries = json.loads((Path(package.__file__).parent / "dataset.json").read_bytes())
    some = dict(list(entries.items())[:200])
    (tmp_path / "dataset.json").write_text(json.dumps(some))
    summary = import_file(store, tmp_path / "dataset.json", "chitchat", tmp_path / "rejected")
    assert summary.messages == sum(len(turn) for talk in some.values() for turn in talk["messages"])
    assert (summary.conversations, summary.rejected) == (200, 0)
    assert import_file(store, tmp_path / "dataset.json", "chitchat", tmp_path / "rejected").added == 0
