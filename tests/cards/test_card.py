"""Reading cards: tolerant of what is missing or unknown, clear about what is wrong, FlywheelError and nothing else."""

import contextlib
import json

import pytest
from cards_at_hand import FULL, json_value
from hypothesis import given, settings
from hypothesis import strategies as st

from characterflywheel.cards import character_of, read_card
from characterflywheel.cards.card import MAX_JSON_BYTES, data_of, read_json, view
from characterflywheel.errors import FlywheelError


def with_field(**fields: object) -> dict[str, object]:
    return FULL | {"data": FULL["data"] | fields}


@pytest.mark.parametrize(
    ("card", "problem"),
    [
        (with_field(description=["x"]), r"description = \"\['x'\]\": Input should be a valid string"),
        (with_field(tags="a, b"), "tags = 'a, b'"),
        (with_field(name=""), "name is empty"),
        (with_field(extensions=[]), "extensions ="),
        (with_field(character_book={"entries": [{"keys": "x"}]}), r"character_book\.entries\.0\.keys = 'x'"),
        (with_field(character_book={"entries": [{}, {"insertion_order": "a"}]}), r"entries\.1\.insertion_order"),
        (with_field(character_book={"entries": [{}] * 2001}), "character_book.entries"),
        (with_field(character_book={"entries": [{"keys": ["x"] * 10_001}]}), "10001 keys, at most 10000"),
        (with_field(description="a\0b"), r"card\.data\.description' holds a NUL"),
        (with_field(description="\ud83d"), "half a character"),
        (with_field(extensions={"x": float("inf")}), "numbers must be finite"),
        (FULL | {"data": []}, "data is a list"),
        (FULL | {"spec": "chara_card_v9"}, "spec = 'chara_card_v9' is no character card"),
        ({"spec": "lorebook_v3", "data": {}}, "this is a lorebook"),
        ({"spec": "chara_card_v2", "data": {}}, "has no name"),
        ({"name": "x"}, "no character card"),
        ({}, "no character card"),
    ],
)
def test_what_is_wrong_is_named(card: dict[str, object], problem: str) -> None:
    with pytest.raises(FlywheelError, match=problem):
        character_of(card)


def test_what_is_missing_or_null_has_its_default() -> None:
    data = data_of({"spec": "chara_card_v2", "data": {"name": "Jo", "description": None, "character_book": None}})
    assert data["description"] is None, "kept as it was"
    assert view(data).description == ""
    assert view(data).character_book is None
    assert data["alternate_greetings"] == []
    assert view({"name": "Jo", "character_version": 1.5}).character_version == "1.5"


def test_a_newer_version_of_the_specification_is_read() -> None:
    assert character_of(FULL | {"spec_version": "3.1"}).name == "Mirabel the Innkeeper"


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "not readable JSON"),
        (b"[1]", "JSON list"),
        (b"\xff\xfe{}", "not readable JSON"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": 1e999}', "must be finite"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not readable JSON"),
        (b'{"a": ' * 100 + b"1" + b"}" * 100, "is nested more than 64 deep"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "not readable JSON"),
        (b" " * (MAX_JSON_BYTES + 1), "at most 8388608 are read"),
    ],
)
def test_json_that_is_no_card_is_refused(raw: bytes, problem: str) -> None:
    with pytest.raises(FlywheelError, match=problem):
        read_json(raw)


def test_a_byte_order_mark_is_no_obstacle() -> None:
    assert read_json(b"\xef\xbb\xbf" + json.dumps(FULL).encode()) == FULL


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_card_or_refused(raw: bytes) -> None:
    with contextlib.suppress(FlywheelError):
        assert isinstance(read_card(raw), dict)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FULL["data"])), json_value)
def test_any_value_of_a_field_is_kept_or_refused(field: str, value: object) -> None:
    card = with_field(**{field: value})
    with contextlib.suppress(FlywheelError):
        made = character_of(read_json(json.dumps(card).encode()))
        assert made.card is not None
        assert made.card[field] == value
