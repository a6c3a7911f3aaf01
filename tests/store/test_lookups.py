"""What the chat service asks of the store, on both databases: what goes in comes out, newest decisions count."""

import traceback
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from characterflywheel.characters import bundled_characters
from characterflywheel.errors import FlywheelError
from characterflywheel.records import Conversation, Exposure, Message, Signal, User
from characterflywheel.service_records import ApiKey, Events, Experiment, Moderation, Publication, Remembered, Tip
from characterflywheel.store import EventStore, Position, schema

AT = datetime(2026, 1, 5, 1, 2, 3, 456789, tzinfo=UTC)
PIRATE = bundled_characters()["pirate"]
ANN = User(id="ann", population="user", created_at=AT)


def talk(number: int, user: str = "ann") -> Conversation:
    return Conversation(
        id=f"c{number}", user_id=user, character_id="pirate", character_version=1, source="user", created_at=AT
    )


def turn(number: int, conversation: str = "c1") -> Events:
    """A whole request: question, reply and all that is kept beside them."""
    place = {"conversation_id": conversation, "user_id": "ann", "created_at": AT + timedelta(seconds=number)}
    asked = Message(id=f"q{number}", role="user", content="Ahoy \u2693 \x7f 'quoted' %s ?", **place)
    reply = Message(
        id=f"r{number}", role="assistant", content="Arr", model="base", experiment="x", arm="new", fallback=True,
        parent_id=asked.id, finish="length", **place,
    )  # fmt: skip
    return Events(
        users=(ANN,), characters=(PIRATE,), conversations=(talk(1),), messages=(asked, reply),
        exposures=(Exposure(id="e", experiment="x", arm="new", user_id="ann", created_at=AT),),
        signals=(
            Signal(id=f"s{number}", message_id=reply.id, user_id="ann", kind="reaction", text="\u2693", created_at=AT),
        ),
        moderations=(
            Moderation(id=f"mo{number}", message_id=reply.id, subject="reply", allowed=False, categories=("hate", "x"),
                       withheld="bad", **place),
        ),
        tips=(Tip(id=f"t{number}", conversation_id=conversation, message_id=reply.id, user_id="ann"),),
        remembered=(Remembered(id=f"k{number}", user_id="key-1", body="b", status=200, response="{}", created_at=AT),),
    )  # fmt: skip


@pytest.fixture
def store(where: Path | str) -> Iterator[EventStore]:
    with EventStore.open(where) as opened:
        yield opened


def count(store: EventStore, table: str) -> int:
    with store.read() as connection:
        return int(connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one())


def test_what_a_request_made_durable_comes_back(store: EventStore) -> None:
    events = turn(1)
    store.append_events(events)
    assert store.user("ann") == ANN
    assert store.message("r1") == events.messages[1]
    assert store.tip("t1") == events.tips[0]
    assert store.remembered("k1") == events.remembered[0]
    assert store.character("pirate") == PIRATE
    assert store.conversation("c1") == talk(1).model_copy(update={"messages": events.messages})
    for missing in (store.user, store.message, store.tip, store.remembered, store.character, store.conversation):
        assert missing("who") is None


def test_a_repeated_request_changes_nothing_and_costs_no_number(store: EventStore) -> None:
    assert store.append_all([turn(1)]) == 10
    assert store.append_all([turn(1), turn(2), turn(1), turn(2)]) == 6
    assert store.append_all([turn(1), turn(2)]) == 0
    assert store.position() == Position(messages=4, signals=2, exposures=1)
    assert {name: count(store, name) for name in ("users", "moderations", "tips", "remembered")} == {
        "users": 1, "moderations": 2, "tips": 2, "remembered": 2,
    }  # fmt: skip


def test_every_field_of_every_record_has_its_column() -> None:
    kinds = {
        "users": User, "conversations": Conversation, "exposures": Exposure, "messages": Message, "signals": Signal,
        "moderations": Moderation, "tips": Tip, "remembered": Remembered, "publications": Publication,
        "experiments": Experiment, "keys": ApiKey,
    }  # fmt: skip
    assert set(kinds) == set(schema.NUMBERED)
    for name, kind in kinds.items():
        assert set(schema.columns(schema.NUMBERED[name])) == set(kind.model_fields) - {"messages"}


@pytest.mark.parametrize("rows", [1, 2, 511, 512, 513, 1500])
def test_any_number_of_rows_arrives_once_and_in_order(store: EventStore, rows: int) -> None:
    store.append_events(turn(1))
    said = [turn(number).messages[0] for number in range(2, rows + 2)]
    store.append(said[::2])
    store.append(said + said[:3])
    everything = store.conversation("c1")
    assert everything is not None
    odd_after_even = [*said[::2], *said[1::2]]
    assert [message.id for message in everything.messages] == ["q1", "r1", *(message.id for message in odd_after_even)]
    assert store.position().messages == rows + 2


def test_a_bad_row_takes_the_whole_request_with_it(store: EventStore) -> None:
    store.append_events(turn(1))
    bad = turn(2).model_copy(update={"signals": (turn(9).signals[0],)})
    with pytest.raises(FlywheelError, match=r"(?i)foreign key"):
        store.append_events(bad)
    changed = PIRATE.model_copy(update={"greeting": "Arr"})
    with pytest.raises(FlywheelError, match="version = 2"):
        store.append_events(turn(3).model_copy(update={"characters": (changed,)}))
    lone = turn(4).messages[0].model_copy(update={"content": "\ud800"})
    with pytest.raises(FlywheelError, match="surrogate"):
        store.append([lone])
    assert store.position() == Position(messages=2, signals=1, exposures=1)


def test_an_error_does_not_tell_what_people_wrote(store: EventStore) -> None:
    store.append_events(turn(1))
    bad = turn(2).messages[0].model_copy(update={"role": "robot", "content": "my secret"})
    with pytest.raises(FlywheelError, match="known_role") as refused:
        store.append([bad])
    assert "my secret" not in "".join(traceback.format_exception(refused.value))


def test_conversations_are_listed_newest_first_a_page_at_a_time(store: EventStore) -> None:
    ben = User(id="ben", population="user", created_at=AT)
    talks = tuple(talk(number, "ben" if number == 3 else "ann") for number in range(1, 7))
    store.append_events(Events(users=(ANN, ben), characters=(PIRATE,), conversations=talks))
    assert [one.id for one in store.conversations_of("ann", 2)] == ["c6", "c5"]
    assert [one.id for one in store.conversations_of("ann", 9, before_id="c5")] == ["c4", "c2", "c1"]
    assert store.conversations_of("ann", 9, before_id="c1") == []
    assert store.conversations_of("ann", 9, before_id="unknown") == []
    assert store.conversations_of("cat", 9) == []
    assert store.conversations_of("ben", 9) == [talks[2]]


def decision(number: int, version: int, state: str) -> Publication:
    return Publication.model_validate(
        {"id": f"p{number}", "character_id": "pirate", "version": version, "state": state, "reason": "why",
         "reviewer": "safety", "created_at": AT - timedelta(hours=number)}
    )  # fmt: skip


def test_the_newest_decision_about_the_newest_version_counts(store: EventStore) -> None:
    store.add_characters([PIRATE])
    assert store.publications() == {}
    decisions = [decision(1, 1, "review"), decision(2, 1, "approved")]
    for one in decisions:
        store.publish(one)
    assert store.publications() == {"pirate": decisions[1]}  # though the clock went backwards
    second = PIRATE.model_copy(update={"version": 2, "greeting": "Arr"})
    store.add_characters([second])
    assert store.publications() == {}  # nobody has looked at version 2 yet
    decisions += [decision(3, 2, "refused"), decision(4, 1, "approved")]
    for one in decisions[2:]:
        store.publish(one)
    assert store.publications() == {"pirate": decisions[2]}
    assert store.publication_history("pirate") == decisions
    assert (store.character("pirate"), store.character("pirate", 1), store.character("pirate", 3)) == (
        second,
        PIRATE,
        None,
    )
    assert store.versions("pirate") == [PIRATE, second]
    assert store.versions("who") == []
    with pytest.raises(FlywheelError, match=r"(?i)foreign key"):
        store.publish(decision(5, 7, "approved"))


def test_the_newest_row_of_an_experiment_counts(store: EventStore) -> None:
    started = Experiment(
        id="1", name="x", salt="s", shares={"new": 0.1, "old": 0.1}, models={"new": "g1", "old": "base"},
        state="running", started_at=AT, created_at=AT,
    )  # fmt: skip
    stopped = started.model_copy(update={"id": "2", "state": "stopped", "created_at": AT + timedelta(days=7)})
    other = started.model_copy(update={"id": "3", "name": "y"})
    for one in (started, other, stopped):
        store.save_experiment(one)
    assert store.experiments() == {"x": stopped, "y": other}


def test_keys_are_kept_and_revoked_once(store: EventStore) -> None:
    app = ApiKey(id="1", name="app", digest="d1", scopes=("chat", "characters"), created_at=AT)
    mine = ApiKey(id="2", name="mine", digest="d2", scopes=(), user_id="ann", created_at=AT, expires_at=AT)
    store.add_key(app)
    store.add_key(mine)
    store.revoke_key("1", AT + timedelta(days=1))
    store.revoke_key("1", AT + timedelta(days=2))
    assert store.keys() == [app.model_copy(update={"revoked_at": AT + timedelta(days=1)}), mine]
    with pytest.raises(FlywheelError, match="'3' is not in the store"):
        store.revoke_key("3", AT)
    with pytest.raises(FlywheelError, match=r"(?i)unique"):
        store.add_key(mine.model_copy(update={"id": "4"}))


def test_lookups_use_indices(tmp_path: Path) -> None:
    with EventStore.open(tmp_path / "flywheel.db") as store, store.read() as connection:
        for condition in (
            "messages WHERE conversation_id = 'c' ORDER BY seq", "messages WHERE user_id = 'u'", "tips WHERE id = 't'",
            "conversations WHERE user_id = 'u' ORDER BY seq DESC LIMIT 9", "signals WHERE message_id = 'm'",
        ):  # fmt: skip
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN SELECT * FROM {condition}").all()
            assert [row[-1].split(" (")[0].split(" USING ")[1][:5] for row in plan] == ["INDEX"], plan
