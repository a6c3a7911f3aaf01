"""Everything of a character that somebody could read or the model could be told, for safety to check (PAPER section 9).

All text of a card is taken, whatever the field, known or not: the card goes out whole. Text is taken as it reads with
its macros replaced, and also as it is written where a macro could hide something. The system prompt is taken as a
whole too, since its parts may be harmless one by one.
"""

from collections.abc import Iterator, Mapping

from ..characters import system_prompt
from ..records import Character
from .card import view
from .macros import Voice, has_calls


def texts_of(character: Character) -> dict[str, str]:
    """The character's texts by where they stand, e.g. `description` or `character_book.entries.3`; none is empty."""
    fields = character.model_dump(mode="json", exclude={"id", "version", "safety", "card"})
    found: dict[str, str] = {}
    for where, text in (*_by_field(fields), *_by_field(character.card or {}), ("prompt", system_prompt(character))):
        found[where] = f"{found[where]}\n{text}" if where in found else text
    if character.card is None:
        return found
    nickname = view(character.card).nickname
    voices = [Voice(name, "User", character.id) for name in dict.fromkeys((nickname or character.name, character.name))]
    read: dict[str, str] = {}
    for where, text in found.items():
        ways = (voice.render(text, "", hidden=hidden).strip() for voice in voices for hidden in (True, False))
        for number, way in enumerate(dict.fromkeys(ways)):
            read[where if number == 0 else f"{where} (read another way, {number})"] = way
        if has_calls(text):
            read[f"{where} (as written)"] = text
    return {where: text for where, text in read.items() if text}


def _by_field(data: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Each field's text; a lorebook's by entry."""
    for field, value in data.items():
        entries = value.get("entries") if field == "character_book" and isinstance(value, Mapping) else None
        if isinstance(value, Mapping) and isinstance(entries, list):
            for number, entry in enumerate(entries):
                yield from _joined(f"{field}.entries.{number}", entry)
            yield from _joined(field, {key: one for key, one in value.items() if key != "entries"})
        else:
            yield from _joined(field, value)


def _joined(where: str, value: object) -> Iterator[tuple[str, str]]:
    if text := "\n".join(_strings(value)).strip():
        yield where, text


def _strings(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case Mapping():
            for key, inner in value.items():
                yield str(key)
                # the bytes of an embedded picture or sound
                if not (key == "uri" and isinstance(inner, str) and inner.startswith("data:")):
                    yield from _strings(inner)
        case list() | tuple():
            for inner in value:
                yield from _strings(inner)
