"""Characters to cards and back, losing nothing (DESIGN section 5).

A character that came from a card keeps the card's `data` whole, so it goes out as it came in. One of our own goes out
with its fields mapped to a card's (instructions are the description, traits the personality) and, complete, in the
extension `characterflywheel`; it comes back equal unless somebody changed the card's text meanwhile. Then the card
counts, for that is what its writer saw.
"""

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import ValidationError

from ..errors import FlywheelError
from ..records import Character, ChatMessage
from .card import SPECS, data_of, view
from .decorators import has_decorators, without_decorators

Version = Literal["v2", "v3"]
EXTENSION = "characterflywheel"
_PROMPT_FIELDS = (
    "name", "nickname", "description", "personality", "scenario", "first_mes", "mes_example", "system_prompt",
    "post_history_instructions", "alternate_greetings", "character_book",
)  # fmt: skip
_READ_AS_V2 = (
    "This character card is Character Card V3, but it is loaded as a Character Card V2. "
    "Please use a program that reads Character Card V3 to use it properly."
)


def character_of(card: Mapping[str, object], id: str | None = None) -> Character:
    """The character of a card of any version. Its `id` is the one given, else our extension's, else from its name.

    Raises FlywheelError where `card` is no card, a field has a wrong type, or the id is not usable.
    """
    data = data_of(card)
    about = view(data)
    own = _own(about.extensions.get(EXTENSION))
    rest = {
        key: value for key, value in card.items() if key not in data and key not in ("spec", "spec_version", "data")
    }
    found = {
        "id": id or (own.id if own else slug(about.name)),
        "version": own.version if own else 1,
        "name": about.name,
        "category": own.category if own else next(iter(about.tags), "imported"),
        "traits": (),
        "greeting": about.first_mes,
        "extensions": {"card": rest} if rest else {},
        "card": data,
    }
    if own is not None:
        written = _data(own)
        if data == written:
            found = own.model_dump() | {"id": id or own.id}
        elif all(data.get(field) == written.get(field) for field in _PROMPT_FIELDS):
            found |= {"traits": own.traits, "instructions": own.instructions, "examples": own.examples}
    try:
        return Character.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise FlywheelError(f"the character's {where} = {first['input']!r}: {first['msg']}.") from None


def card_of(character: Character, version: Version = "v3") -> dict[str, object]:
    """The character's card, ready for JSON. Fields that only V3 knows stay in a V2 card, as unknown fields do."""
    spec = f"chara_card_{version}"
    if spec not in SPECS:
        raise FlywheelError(f"card version {version!r} does not exist; there are v2 and v3.")
    rest = character.extensions.get("card") if character.card is not None else None
    envelope: dict[str, object] = {"spec": spec, "spec_version": SPECS[spec], "data": _data(character)}
    return envelope | dict(rest) if isinstance(rest, Mapping) else envelope


def backfill(character: Character) -> dict[str, object]:
    """A V2 card to stand beside the V3 card in a picture: decorators removed, with a note where V2 says less."""
    card = card_of(character, "v2")
    data = dict(_data(character))
    book = data.get("character_book")
    entries = book.get("entries") if isinstance(book, Mapping) else None
    decorated = False
    if isinstance(book, Mapping) and isinstance(entries, Sequence):
        decorated = any(has_decorators(entry.get("content") or "") or entry.get("use_regex") for entry in entries)
        plain = [entry | {"content": without_decorators(entry.get("content") or "")} for entry in entries]
        data["character_book"] = dict(book) | {"entries": plain}
    if decorated or any(data.get(field) for field in ("nickname", "assets", "group_only_greetings")):
        data["creator_notes"] = f"{_READ_AS_V2}\n\n{data.get('creator_notes') or ''}".strip()
    return card | {"data": data}


def slug(name: str) -> str:
    """An id from a name: its letters a to z and digits, joined by hyphens; a digest where it has none."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:63].rstrip("-")
    return words or f"card-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _own(kept: object) -> Character | None:
    """The character that our extension holds, None where it is somebody else's or no longer valid."""
    if not isinstance(kept, Mapping):
        return None
    try:
        return Character.model_validate({**kept, "card": None})
    except ValidationError:
        return None


def _data(character: Character) -> dict[str, object]:
    """A card's `data`: the one that was read, or one made from our own fields."""
    if character.card is not None:
        return character.card
    return {
        "name": character.name,
        "description": "\n".join(instruction.text for instruction in character.instructions),
        "personality": ", ".join(character.traits),
        "scenario": "",
        "first_mes": character.greeting,
        "mes_example": _dialogue(character.examples),
        "creator_notes": "",
        "system_prompt": "",
        "post_history_instructions": "",
        "alternate_greetings": [],
        "tags": [character.category] if character.category else [],
        "creator": "",
        "character_version": str(character.version),
        "group_only_greetings": [],
        "extensions": {EXTENSION: character.model_dump(mode="json", exclude={"card"})},
    }


def _dialogue(examples: Sequence[ChatMessage]) -> str:
    """Example messages as `mes_example` writes them."""
    if not examples:
        return ""
    names = {"user": "{{user}}: ", "assistant": "{{char}}: ", "system": ""}
    return "\n".join(["<START>", *(names[example.role] + example.content for example in examples)])
