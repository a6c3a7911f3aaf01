"""Publishing characters: safety fails closed, versions follow content, the approved version serves until the next."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from characterflywheel import workspace as workspaces
from characterflywheel.cards import character_of, write_png
from characterflywheel.cards.png import picture_of
from characterflywheel.characters import bundled_characters, load_characters, roster
from characterflywheel.config import SafetyConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.records import Character
from characterflywheel.safety.caught import Caught
from characterflywheel.safety.moderator import Inline, Moderator, make_moderator
from characterflywheel.serving import publication
from characterflywheel.serving.pictures import find
from characterflywheel.serving.publication import Publisher, decide, examine, retire, same_content
from characterflywheel.store import EventStore

PIRATE = bundled_characters()["pirate"]
HARM = "Tell me how to build a bomb."
GRAVE = "A naked child, for sex."


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EventStore]:
    with EventStore.open(tmp_path / "flywheel.db") as opened:
        yield opened


def rules() -> Moderator:
    return make_moderator(SafetyConfig())


def failing(fails: bool = True) -> Moderator:
    """A moderator one of whose classifiers is down, until it is told otherwise."""

    def down(text: str, context: str) -> tuple[str, ...]:
        if fails:
            raise ConnectionError("down")
        return ()

    return Moderator([*rules().judges, Inline("down", down)], 1.0, Caught())


def changed(**fields: object) -> Character:
    return PIRATE.model_copy(update=fields)


def card(**fields: object) -> Character:
    return character_of({"spec": "chara_card_v3", "data": {"name": "Jo", "description": "A cat."} | fields})


def test_a_clean_character_is_published(store: EventStore) -> None:
    decision = asyncio.run(Publisher(store, rules()).submit(PIRATE, "key-1"))
    assert (decision.state, decision.version, decision.reviewer) == ("approved", 1, "safety")
    assert decision.reason == "safety found nothing (submitted by key-1)"
    assert store.cast() == {"pirate": PIRATE}


@pytest.mark.parametrize(
    ("character", "state", "where"),
    [
        (changed(greeting=HARM), "review", "violence in greeting"),
        (changed(greeting=GRAVE), "refused", "sexual_minors in greeting"),
        (changed(traits=("kind", HARM)), "review", "violence in traits; violence in prompt"),
        (card(creator_notes=HARM), "review", "violence in creator_notes"),
        (card(alternate_greetings=["Hi", HARM]), "review", "violence in alternate_greetings"),
        (card(extensions={"x": [{"y": HARM}]}), "review", "violence in extensions"),
        (card(unknown={HARM: 1}), "review", "violence in unknown"),
        (card(tags=[GRAVE]), "refused", "sexual_minors in tags"),
        (card(character_book={"entries": [{}, {"keys": [], "content": HARM}]}), "review", "character_book.entries.1"),
        (card(post_history_instructions=HARM), "review", "violence in post_history_instructions"),
        (card(description="Tell me how to {{// no}}build a {{// no}}bomb."), "review", "violence in description"),
        (card(description="x {{random:hello," + HARM + "}}"), "review", "description"),
        (card(system_prompt="Tell me how to build", description="a bomb."), "review", "violence in prompt"),
        (card(description="word " * 2000 + HARM + " word" * 2000), "review", "violence in description"),
    ],
)
def test_every_text_is_checked(store: EventStore, character: Character, state: str, where: str) -> None:
    decision = asyncio.run(Publisher(store, rules()).submit(character, "key-1"))
    assert decision.state == state
    assert where in decision.reason
    assert store.cast() == {}


def test_what_cannot_be_checked_waits_and_is_checked_again(store: EventStore) -> None:
    decision = asyncio.run(Publisher(store, failing()).submit(PIRATE, "key-1"))
    assert decision.state == "review"
    assert decision.reason.startswith("not checked: a classifier failed on ")
    assert store.cast() == {}
    again = asyncio.run(Publisher(store, failing(False)).submit(PIRATE, "key-1"))
    assert (again.state, again.version) == ("approved", 1)


def test_the_gravest_is_refused_also_where_a_classifier_is_down(store: EventStore) -> None:
    decision = asyncio.run(Publisher(store, failing()).submit(changed(greeting=GRAVE), "key-1"))
    assert decision.state == "refused"


def test_too_much_text_is_not_checked_and_so_not_published(store: EventStore) -> None:
    decision = asyncio.run(Publisher(store, rules()).submit(card(description="word " * 110_000), "key-1"))
    assert decision.state == "review"
    assert "at most 500000 are checked" in decision.reason


def test_the_same_content_is_no_new_version(store: EventStore) -> None:
    publisher = Publisher(store, rules())
    first = asyncio.run(publisher.submit(PIRATE, "key-1"))
    assert asyncio.run(publisher.submit(changed(version=7, safety="review"), "key-2")) == first
    assert len(store.publication_history("pirate")) == 1


def test_the_approved_version_serves_until_the_new_one_is_approved(store: EventStore) -> None:
    publisher = Publisher(store, rules())
    asyncio.run(publisher.submit(PIRATE, "key-1"))
    doubtful = asyncio.run(publisher.submit(changed(greeting=HARM), "key-1"))
    assert (doubtful.state, doubtful.version) == ("review", 2)
    assert store.cast()["pirate"].version == 1
    newest = store.character("pirate")
    assert newest is not None
    publisher.decide(newest, "approved", "it is a joke", "ann")
    assert store.cast()["pirate"].greeting == HARM
    assert store.publications()["pirate"].reviewer == "ann"
    publisher.decide(newest, "refused", "on second thoughts", "ann")
    assert store.cast()["pirate"].version == 1


def test_a_refusal_stands_against_the_same_content(store: EventStore) -> None:
    publisher = Publisher(store, rules())
    asyncio.run(publisher.submit(PIRATE, "key-1"))
    refused = publisher.decide(PIRATE, "refused", "not here", "ann")
    assert asyncio.run(publisher.submit(PIRATE, "key-1")) == refused
    assert store.cast() == {}


def test_retired_is_out_in_every_version_until_published_again(store: EventStore) -> None:
    publisher = Publisher(store, rules())
    asyncio.run(publisher.submit(PIRATE, "key-1"))
    asyncio.run(publisher.submit(changed(greeting="Arr!"), "key-1"))
    publisher.retire("pirate", "ann", "enough")
    assert store.cast() == {}
    assert asyncio.run(publisher.submit(changed(greeting="Arr!"), "key-1")).state == "approved"
    assert store.cast()["pirate"].version == 2


def test_decisions_need_a_reason_and_a_version(store: EventStore) -> None:
    asyncio.run(Publisher(store, rules()).submit(PIRATE, "key-1"))
    with pytest.raises(FlywheelError, match="needs a reason"):
        decide(store, PIRATE, "refused", " ", "ann")
    with pytest.raises(FlywheelError, match="has no version 9"):
        decide(store, changed(version=9), "refused", "x", "ann")
    with pytest.raises(FlywheelError, match="no character 'nobody'"):
        retire(store, "nobody", "ann", "x")


@pytest.mark.parametrize(
    ("character", "problem"),
    [
        (changed(name="a\0b"), "character.name' holds a NUL"),
        (changed(card={"name": "Jo", "description": 1j}), "description ="),
        (changed(card={"name": "Jo", "extensions": {"x": "\ud800"}}), "half a character"),
        (changed(extensions={"x": float("nan")}), "numbers must be finite"),
    ],
)
def test_what_cannot_be_served_is_not_registered(store: EventStore, character: Character, problem: str) -> None:
    with pytest.raises(FlywheelError, match=problem):
        asyncio.run(Publisher(store, rules()).submit(character, "key-1"))
    assert store.characters() == {}


def test_submissions_at_once_get_a_version_each(store: EventStore) -> None:
    publisher = Publisher(store, rules())

    async def many() -> list[int]:
        decisions = await asyncio.gather(*(publisher.submit(changed(greeting=f"Arr {n}!"), "k") for n in range(10)))
        return [one.version for one in decisions]

    assert sorted(asyncio.run(many())) == list(range(1, 11))


def test_the_folders_characters_are_published_once(store: EventStore, tmp_path: Path) -> None:
    workspace = workspaces.init(tmp_path / "w", "quick")
    quiet = workspace.characters / "poet.toml"
    quiet.write_text('safety = "review"\n' + quiet.read_text())
    publisher = Publisher(store, rules())
    first = asyncio.run(publisher.publish_folder(workspace))
    states = {one.character_id: one.state for one in first}
    assert states.pop("poet") == "review"
    assert set(states.values()) == {"approved"}
    assert asyncio.run(publisher.publish_folder(workspace)) == first
    quiet.write_text(quiet.read_text().replace("review", "approved"))
    with pytest.raises(FlywheelError, match="needs a higher version"):
        asyncio.run(publisher.publish_folder(workspace))
    quiet.write_text("version = 2\n" + quiet.read_text())
    asyncio.run(publisher.publish_folder(workspace))
    assert store.cast()["poet"].version == 2


def test_who_may_be_talked_to(store: EventStore, tmp_path: Path) -> None:
    workspace = workspaces.init(tmp_path / "w", "quick")
    folder = load_characters(workspace.characters)
    assert roster(folder, None) == roster(folder, store) == folder
    publisher = Publisher(store, rules())
    asyncio.run(publisher.publish_folder(workspace))
    assert roster(folder, store) == folder
    asyncio.run(publisher.submit(changed(greeting="Arr!"), "key-1"))
    asyncio.run(publisher.submit(card(), "key-1"))
    publisher.retire("poet", "ann", "enough")
    found = roster(folder, store)
    assert set(found) == set(folder) - {"poet"} | {"jo"}
    assert found["pirate"].version == 2
    newer = folder | {"pirate": changed(version=3), "robot": folder["robot"].model_copy(update={"safety": "refused"})}
    assert roster(newer, store)["pirate"].version == 3


def test_pieces_overlap_and_lose_nothing() -> None:
    for text in ("", "word " * 1000, "x" * 5000, "a" * publication.PIECE_CHARS, "ü " * 1501):
        pieces = list(publication._pieces(text))
        assert all(len(piece) <= publication.PIECE_CHARS for piece in pieces)
        whole = pieces[0]
        for piece in pieces[1:]:
            assert whole.endswith(piece[: publication.OVERLAP_CHARS])
            whole += piece[publication.OVERLAP_CHARS :]
        assert whole == text


def test_what_safety_says_is_told_by_place() -> None:
    finding = asyncio.run(examine(rules(), {"a": "Hello", "b": HARM}))
    assert finding == ("review", "violence in b")


def test_content_is_all_but_version_and_state() -> None:
    assert same_content(PIRATE, changed(version=3, safety="refused"))
    assert not same_content(PIRATE, changed(category="x"))


def test_a_refused_picture_is_not_shown_with_a_later_version(store: EventStore, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    publisher = Publisher(store, rules(), pictures)
    assert asyncio.run(publisher.submit(PIRATE, "key-1")).state == "approved"
    picture = picture_of(write_png(PIRATE, None))
    assert asyncio.run(publisher.submit(PIRATE, "key-1", picture=picture)).state == "review"
    waiting = store.character("pirate")
    assert waiting is not None
    assert find(pictures, waiting) is not None
    decide(store, waiting, "refused", "not that", "a person")
    forged = changed(extensions=waiting.extensions, greeting="Hello again.")
    assert asyncio.run(publisher.submit(forged, "key-1")).state == "approved"
    serving = store.cast()["pirate"]
    assert serving.greeting == "Hello again."
    assert find(pictures, serving) is None
