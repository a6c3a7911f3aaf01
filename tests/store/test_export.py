"""A window of the store as files: what is in it, who is in it, and the same bytes each time."""

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from characterflywheel import tables
from characterflywheel.characters import bundled_characters
from characterflywheel.records import Character, Conversation, Exposure, Message, Signal, User
from characterflywheel.store import EventStore, Position, paths
from characterflywheel.store.export import conversations_from_export

AT = datetime(2026, 1, 5, 1, 2, 3, 456789, tzinfo=UTC)


def filled(where: Path | str) -> EventStore:
    """Ann, who consents, talks with the pirate; Ben, who does not, with the baker; each says two things."""
    store = EventStore.open(where)
    store.add_characters(bundled_characters().values())
    store.add_users(
        User(id=name, population="user", consent=name != "ben", created_at=AT) for name in ("ann", "ben", "cat")
    )
    store.add_conversations(
        Conversation(
            id=f"talk-{name}", user_id=name, character_id=character, character_version=1, source="user", created_at=AT
        )
        for name, character in (("ann", "pirate"), ("ben", "baker"))
    )
    for number in range(4):
        name = ("ann", "ben")[number % 2]
        at = AT + timedelta(minutes=number)
        store.append(
            messages=[
                Message(
                    id=f"{role}-{number}", conversation_id=f"talk-{name}", user_id=name, role=role, content=f"{number}",
                    model="base" if role == "assistant" else None, fallback=number == 2, created_at=at,
                )
                for role in ("user", "assistant")
            ],
            signals=[
                Signal(id=f"s{number}", message_id=f"assistant-{number}", user_id=name, kind="love", created_at=at)
            ],
            exposures=[Exposure(id=f"e{number}", experiment="x", arm="a", user_id="cat", created_at=at)],
        )  # fmt: skip
    return store


def test_export_holds_the_window_and_what_it_refers_to(tmp_path: Path, where: Path | str) -> None:
    with filled(where) as store:
        store.export(tmp_path / "all", Position(), store.position(), consenting_only=False)
        store.export(tmp_path / "later", Position(messages=4, signals=3, exposures=4), store.position())
    messages = tables.read(tmp_path / "all" / "messages.parquet", Message)
    assert [message.id for message in messages][:3] == ["user-0", "assistant-0", "user-1"]
    assert messages[5].fallback
    assert messages[5].model == "base"
    assert messages[2].created_at == AT + timedelta(minutes=1)
    assert [user.id for user in tables.read(tmp_path / "all" / "users.parquet", User)] == ["ann", "ben", "cat"]
    later = {
        "messages": tables.read(tmp_path / "later" / "messages.parquet", Message),
        "signals": tables.read(tmp_path / "later" / "signals.parquet", Signal),
        "exposures": tables.read(tmp_path / "later" / "exposures.parquet", Exposure),
        "users": tables.read(tmp_path / "later" / "users.parquet", User),
        "conversations": tables.read(tmp_path / "later" / "conversations.parquet", Conversation),
    }
    assert {name: [row.id for row in rows] for name, rows in later.items()} == {
        "messages": ["user-2", "assistant-2"], "signals": [], "exposures": [], "users": ["ann"],
        "conversations": ["talk-ann"],
    }  # fmt: skip
    assert [c.id for c in tables.read_jsonl(tmp_path / "later" / "characters.jsonl", Character)] == ["pirate"]


def test_consent_keeps_people_out_of_every_file(tmp_path: Path, where: Path | str) -> None:
    with filled(where) as store:
        store.export(tmp_path / "x", Position(), store.position())
        store.set_consent("ben", True)
        store.export(tmp_path / "y", Position(), store.position())
    for name in ("messages", "signals", "users", "conversations"):
        assert b"ben" not in (tmp_path / "x" / f"{name}.parquet").read_bytes()
    assert len(tables.read(tmp_path / "x" / "messages.parquet", Message)) == 4
    assert len(tables.read(tmp_path / "x" / "exposures.parquet", Exposure)) == 4
    assert len(tables.read(tmp_path / "y" / "messages.parquet", Message)) == 8


def test_conversations_come_back_with_their_messages_in_order(tmp_path: Path, where: Path | str) -> None:
    with filled(where) as store:
        store.export(tmp_path / "x", Position(), store.position(), consenting_only=False)
    ann, ben = conversations_from_export(tmp_path / "x")
    assert ann.id == "talk-ann"
    assert [message.id for message in ann.messages] == ["user-0", "assistant-0", "user-2", "assistant-2"]
    assert [message.id for message in ben.messages] == ["user-1", "assistant-1", "user-3", "assistant-3"]


def said(id: str, role: str, parent: str | None = None) -> Message:
    values = {"id": id, "conversation_id": "c", "user_id": "ann", "role": role, "content": id, "created_at": AT}
    return Message.model_validate(values | {"parent_id": parent})


@pytest.mark.parametrize(
    ("messages", "path"),
    [
        ("g:a: q:u: r:a:", "g q r"),  # nothing has a parent
        ("g:a: q:u:g r1:a:q r2:a:q", "g q r2"),  # regenerated: the newest reply
        ("g:a: q:u:g r1:a:q r2:a:q q2:u:r1 s:a:q2", "g q r1 q2 s"),  # the user went on from the first one
        ("g:a: q:u:g r1:a:q r2:a:q q2:u: s:a:", "g q r2 q2 s"),  # a client that knows no parents goes on
        ("q2:u:r1 s1:a:q2 s2:a:q2", "q2 s2"),  # the window begins in the middle
        ("r2:a:q q2:u:r2", "r2 q2"),
        ("q:u:q", "q"),
        ("", ""),
    ],
)
def test_a_conversation_is_the_path_to_its_newest_tip(messages: str, path: str) -> None:
    roles = {"u": "user", "a": "assistant"}
    tree = [said(id, roles[role], parent or None) for id, role, parent in (one.split(":") for one in messages.split())]
    assert [message.id for message in paths.path(tree)] == path.split()


@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=12))
def test_a_path_ends_with_the_last_message_and_never_goes_back(tree: list[tuple[int, bool]]) -> None:
    messages = [said(f"m{i}", "user", f"m{parent}" if linked else None) for i, (parent, linked) in enumerate(tree)]
    path = paths.path(messages)
    assert [message.id for message in path[-1:]] == [message.id for message in messages[-1:]]
    places = [messages.index(message) for message in path]
    assert places == sorted(set(places))
    assert path == messages or any(linked for _, linked in tree)


def test_regenerated_replies_are_all_exported_and_one_is_in_the_conversation(tmp_path: Path, where: Path | str) -> None:
    with filled(where) as store:
        again = Message(
            id="again", conversation_id="talk-ann", user_id="ann", role="assistant", content="again",
            parent_id="user-2", finish="stop", created_at=AT + timedelta(minutes=9),
        )  # fmt: skip
        store.append([again])
        store.export(tmp_path / "x", Position(), store.position())
    assert tables.read(tmp_path / "x" / "messages.parquet", Message)[-1] == again
    (ann,) = conversations_from_export(tmp_path / "x")
    assert [message.id for message in ann.messages] == ["user-0", "assistant-0", "user-2", "again"]
    (whole,) = (c for c in conversations_from_export(tmp_path / "x", alternatives=True) if c.id == ann.id)
    assert [message.id for message in whole.messages][-2:] == ["assistant-2", "again"]


def test_the_same_window_gives_the_same_bytes_on_every_database(
    tmp_path: Path, new_where: Callable[[], Path | str]
) -> None:
    digests = []
    for name in (tmp_path / "one.db", tmp_path / "two.db", new_where()):
        with filled(name) as store:
            until = store.position()
            for number in range(2):
                folder = tmp_path / f"{len(digests)}-{number}"
                store.export(folder, Position(), until)
                digests.append([(f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in sorted(folder.iterdir())])
    assert len(digests[0]) == 6
    assert all(digest == digests[0] for digest in digests)


def test_an_empty_window_has_its_columns(tmp_path: Path, where: Path | str) -> None:
    with filled(where) as store:
        store.export(tmp_path / "x", store.position(), store.position())
    assert tables.read(tmp_path / "x" / "messages.parquet", Message) == []
    assert conversations_from_export(tmp_path / "x") == []
