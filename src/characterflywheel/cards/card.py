"""Character cards V1, V2 and V3 as JSON: what their fields are, and a tolerant, bounded reading (DESIGN section 5).

A card is `{"spec", "spec_version", "data"}`; a V1 card is its `data` alone. A card's `data` is kept as it was read,
with every field that we do not know, and the models below are views of it. A field that is missing or null has its
default; one of a wrong type is an error that names it. What no store or database could give back unchanged is refused
(half characters, NUL, infinite numbers), and so is what is too large or nested too deeply.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import FlywheelError

MAX_JSON_BYTES = 8 * 1024 * 1024
MAX_DEPTH = 64
MAX_ENTRIES = 2000
MAX_KEYS = 10_000
SPECS = {"chara_card_v2": "2.0", "chara_card_v3": "3.0"}
_UNKEEPABLE = re.compile("[\0\ud800-\udfff]")
_V1_FIELDS = ("name", "description", "personality", "scenario", "first_mes", "mes_example")


class _View(BaseModel):
    """A typed look at a part of a card. Other fields are allowed, and stay where they are."""

    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_missing(cls, data: object) -> object:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class BookEntry(_View):
    """An entry of a lorebook: `content` goes into the prompt when one of `keys` has been said."""

    keys: tuple[str, ...] = ()
    secondary_keys: tuple[str, ...] = ()
    content: str = ""
    enabled: bool = True
    insertion_order: float = 0
    case_sensitive: bool = False
    use_regex: bool = False
    constant: bool = False
    selective: bool = False
    priority: float | None = None
    position: str = Field("", description="before_char or after_char; anything else counts as after_char")


class CharacterBook(_View):
    """A lorebook. `scan_depth` counts messages, `token_budget` tokens."""

    scan_depth: int | None = Field(None, ge=0)
    token_budget: int | None = Field(None, ge=0)
    recursive_scanning: bool = False
    entries: tuple[BookEntry, ...] = Field((), max_length=MAX_ENTRIES)

    @field_validator("entries")
    @classmethod
    def _keys_can_be_looked_for(cls, entries: tuple[BookEntry, ...]) -> tuple[BookEntry, ...]:
        if (keys := sum(len(one.keys) + len(one.secondary_keys) for one in entries)) > MAX_KEYS:
            raise ValueError(f"{keys} keys, at most {MAX_KEYS} are looked for at every turn")
        return entries


class CardData(_View):
    """The fields of a card's `data` that we use; `character_book` may be missing."""

    name: str
    nickname: str = ""
    description: str = ""
    personality: str = ""
    scenario: str = ""
    first_mes: str = ""
    mes_example: str = ""
    system_prompt: str = ""
    post_history_instructions: str = ""
    alternate_greetings: tuple[str, ...] = ()
    group_only_greetings: tuple[str, ...] = ()
    creator_notes: str = ""
    tags: tuple[str, ...] = ()
    creator: str = ""
    character_version: str = ""
    character_book: CharacterBook | None = None
    extensions: dict[str, object] = Field(default_factory=dict)


def read_json(raw: bytes | str) -> dict[str, object]:
    """A card from JSON in UTF-8. Raises FlywheelError for what is no JSON object or over the bounds above."""
    if len(raw) > MAX_JSON_BYTES:
        raise FlywheelError(f"the card has {len(raw)} bytes of JSON, at most {MAX_JSON_BYTES} are read.")
    try:
        text = raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw
        found = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, a number of 5000 digits
        raise FlywheelError(f"the card is not readable JSON ({error}); export it again as JSON or PNG.") from None
    if not isinstance(found, dict):
        raise FlywheelError(f"the card is a JSON {type(found).__name__}; a character card is an object.")
    check_values(found)
    return found


def data_of(card: Mapping[str, object]) -> dict[str, object]:
    """The `data` of a card of any version, copied, with the fields that every version demands filled in.

    Raises FlywheelError where it is no card, or a field that we use has a wrong type.
    """
    check_values(card)
    spec = card.get("spec")
    if spec == "lorebook_v3":
        raise FlywheelError("this is a lorebook (spec = 'lorebook_v3'), not a character card: import the character.")
    if "data" in card and (spec is None or spec in SPECS):
        data = card["data"]
    elif spec is None and "name" in card and any(field in card for field in _V1_FIELDS[1:]):
        data = card
    else:
        raise FlywheelError(f"spec = {spec!r} is no character card; there are V1, {' and '.join(SPECS)}.")
    if not isinstance(data, Mapping):
        raise FlywheelError(f"the card's data is a {type(data).__name__}, must be an object with a name.")
    view(data)
    return _DEMANDED | dict(data)


def view(data: Mapping[str, object]) -> CardData:
    """The typed view of a card's `data`. Raises FlywheelError that names the field, its value and what it must be."""
    try:
        found = CardData.model_validate(data if isinstance(data, dict) else dict(data))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "data"
        if first["type"] == "missing":
            raise FlywheelError(f"the card has no {where}: give it one.") from None
        raise FlywheelError(f"the card's {where} = {_short(first['input'])}: {first['msg']}.") from None
    if not found.name.strip():
        raise FlywheelError("the card's name is empty: give the character a name.")
    return found


_DEMANDED: dict[str, object] = {
    "name": "", "description": "", "personality": "", "scenario": "", "first_mes": "", "mes_example": "",
    "creator_notes": "", "system_prompt": "", "post_history_instructions": "", "alternate_greetings": [],
    "tags": [], "creator": "", "character_version": "", "group_only_greetings": [], "extensions": {},
}  # fmt: skip


def check_values(value: object, where: str = "card", depth: int = 0) -> None:
    """Raise FlywheelError for what would not come back the same from a store, or would exhaust the stack."""
    if depth > MAX_DEPTH:
        raise FlywheelError(f"{_short(where)} is nested more than {MAX_DEPTH} deep.")
    match value:
        case str():
            if _UNKEEPABLE.search(value):
                raise FlywheelError(f"{_short(where)} holds a NUL or half a character; remove it.")
        case float() if not math.isfinite(value):
            raise FlywheelError(f"{_short(where)} = {value}: numbers must be finite.")
        case Mapping():
            for key, inner in value.items():
                check_values(key, f"{where}: a field's name", depth + 1)
                check_values(inner, f"{where}.{key}", depth + 1)
        case list() | tuple():
            for number, inner in enumerate(value):
                check_values(inner, f"{where}.{number}", depth + 1)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return ascii(text if len(text) <= 80 else f"{text[:77]}...")
