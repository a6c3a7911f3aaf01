"""Cards to characters and back: nothing is lost, whatever the card holds."""

import json
from pathlib import Path

import pytest
from cards_at_hand import FULL, own, v1, v2, v3
from hypothesis import given, settings
from hypothesis import strategies as st

from characterflywheel.cards import card_of, character_of, read_png, write_png
from characterflywheel.cards.card import read_json
from characterflywheel.cards.convert import Version, backfill, slug
from characterflywheel.characters import bundled_characters
from characterflywheel.errors import FlywheelError
from characterflywheel.records import Character

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
versions = st.sampled_from(["v2", "v3"])
few = settings(max_examples=60, deadline=None)


def through_json(card: dict[str, object]) -> dict[str, object]:
    return read_json(json.dumps(card, ensure_ascii=False).encode())


@few
@given(v2 | v3, versions)
def test_a_card_comes_back_whole_through_json_and_the_store(card: dict[str, object], version: Version) -> None:
    made = character_of(through_json(card))
    stored = Character.model_validate_json(made.model_dump_json())
    assert stored == made
    back = through_json(card_of(stored, version))
    data = card["data"]
    assert isinstance(data, dict)
    assert back["data"] == {"group_only_greetings": []} | data
    assert character_of(back) == made
    assert back["spec"] == f"chara_card_{version}"


@few
@given(v1)
def test_a_v1_card_is_read(card: dict[str, object]) -> None:
    made = character_of(through_json(card))
    assert made.card is not None
    assert {key: made.card[key] for key in card} == card
    assert character_of(card_of(made, "v2")).card == made.card


@few
@given(own, versions)
def test_our_own_come_back_equal(character: Character, version: Version) -> None:
    assert character_of(through_json(card_of(character, version))) == character


@settings(max_examples=10, deadline=None)
@given(v2 | v3)
def test_a_card_comes_back_whole_through_a_picture(card: dict[str, object]) -> None:
    made = character_of(card)
    assert character_of(read_png(write_png(made))) == made


def test_our_own_come_back_equal_through_a_picture() -> None:
    for character in bundled_characters().values():
        assert character_of(read_png(write_png(character))) == character


def test_our_own_fields_stand_where_other_programs_look() -> None:
    pirate = bundled_characters()["pirate"]
    data = card_of(pirate, "v2")["data"]
    assert isinstance(data, dict)
    assert data["name"] == pirate.name
    assert data["first_mes"] == pirate.greeting
    assert data["description"].splitlines() == [one.text for one in pirate.instructions]
    assert data["personality"] == ", ".join(pirate.traits)
    assert data["tags"] == [pirate.category]


def test_what_another_program_adds_is_kept_beside_our_own_fields() -> None:
    pirate = bundled_characters()["pirate"]
    card = card_of(pirate, "v2")
    data = card["data"]
    assert isinstance(data, dict)
    data["extensions"]["talkativeness"] = "0.5"
    back = character_of(card)
    assert back.instructions == pirate.instructions
    assert back.card == data
    assert character_of(card_of(back)) == back


def test_an_edited_card_counts_more_than_what_we_once_wrote_into_it() -> None:
    card = card_of(bundled_characters()["pirate"], "v2")
    data = card["data"]
    assert isinstance(data, dict)
    data["description"] = "A gardener."
    back = character_of(card)
    assert back.id == "pirate"
    assert back.instructions == ()
    assert back.card is not None
    assert back.card["description"] == "A gardener."


def test_top_level_fields_of_other_programs_are_kept() -> None:
    card = FULL | {"create_date": "2024", "name": "not the name"}
    made = character_of(card)
    assert made.extensions == {"card": {"create_date": "2024"}}
    assert card_of(made)["create_date"] == "2024"


def test_the_v2_card_beside_a_v3_card_has_no_decorators_and_says_so() -> None:
    beside = backfill(character_of(FULL))["data"]
    assert isinstance(beside, dict)
    assert [entry["content"] for entry in beside["character_book"]["entries"]][2] == "It pours."
    assert beside["creator_notes"].startswith("This character card is Character Card V3")
    plain = backfill(bundled_characters()["pirate"])["data"]
    assert isinstance(plain, dict)
    assert plain["creator_notes"] == ""


@pytest.mark.parametrize(
    ("given_name", "expected"),
    [("Mirabel the Innkeeper", "mirabel-the-innkeeper"), ("Zoë Ångström", "zoe-angstrom"), ("--a  b--", "a-b")],
)
def test_ids_come_from_names(given_name: str, expected: str) -> None:
    assert slug(given_name) == expected


@given(st.text(min_size=1))
def test_any_name_gives_a_usable_id(given_name: str) -> None:
    made = Character(id=slug(given_name), name="x", category="", traits=(), greeting="", card={})
    assert slug(given_name) == made.id


def test_the_card_of_a_name_in_another_script_has_an_id_of_its_own() -> None:
    ids = {character_of({"name": one, "description": ""}).id for one in ("Юля", "ひかり", "Юля")}
    assert len(ids) == 2


@pytest.mark.parametrize("id", ["", "A B", "x" * 64, "../x"])
def test_an_unusable_id_is_refused(id: str) -> None:
    if id:
        with pytest.raises(FlywheelError, match="character's id"):
            character_of(FULL, id)
    else:
        assert character_of(FULL, id).id == "mirabel-the-innkeeper"


def test_real_characters_of_a_public_benchmark_round_trip() -> None:
    file = SHARED / "pingpong_characters.json"
    if not file.is_file():
        pytest.skip("the shared data are not on this machine")
    found = [one for language in json.loads(file.read_text("utf-8")).values() for one in language["characters"]]
    assert len(found) > 10
    for one in found:
        card = {
            "name": one["char_name"], "description": one["system_prompt"], "first_mes": one.get("first_message") or "",
        }  # fmt: skip
        made = character_of(card)
        assert character_of(read_png(write_png(made))) == made
