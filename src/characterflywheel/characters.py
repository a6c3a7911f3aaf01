"""Characters on disk and in the prompt: TOML files written by creators, one a character (DESIGN section 5).

`bundled/` holds a dozen of our own; `flywheel init` copies them into a workspace, where people change them. The
system prompt is what the model sees of a character, and it is paid for with every sampled and every trained token,
so it holds the name, the traits and the instructions as plain lines and nothing else.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from .errors import FlywheelError
from .records import Character

if TYPE_CHECKING:
    from .store import EventStore

BUNDLED = Path(__file__).parent / "bundled"


def system_prompt(character: Character) -> str:
    """The character as the model is told of it: who it is, then one instruction a line.

    For one that came from a card, the part of the card that is the same in every conversation.
    """
    if character.card is not None:
        from .cards.prompt import static_prompt  # noqa: PLC0415 - cards build on this module

        return static_prompt(character)
    who = f"You are {character.name}" + (f": {', '.join(character.traits)}." if character.traits else ".")
    return "\n".join([who, *(instruction.text for instruction in character.instructions)])


def load_character(path: Path) -> Character:
    """Read one character from TOML. Its `id` is the file's name unless the file says otherwise."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FlywheelError(f"{path} is not valid TOML: {error}.") from error
    if not values.get("instructions"):
        raise FlywheelError(
            f"{path}: the character has no instructions; write at least one, e.g. "
            '[[instructions]] text = "Answer in at most 25 words."'
        )
    try:
        return Character.model_validate({"id": path.stem} | values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise FlywheelError(f"{path}: {where or 'character'} = {first['input']!r}: {first['msg']}.") from error


def load_characters(folder: Path) -> dict[str, Character]:
    """All characters of a folder by id, sorted by id.

    Raises FlywheelError where the folder is missing or empty, a file is not a character, or two share an id.
    """
    if not folder.is_dir():
        raise FlywheelError(f"{folder} is missing: `flywheel init DIR` creates it with a dozen characters.")
    characters: dict[str, Character] = {}
    for path in sorted(folder.glob("*.toml")):
        character = load_character(path)
        if character.id in characters:
            raise FlywheelError(f"{path}: id {character.id!r} is taken by another file of {folder}; choose another.")
        characters[character.id] = character
    if not characters:
        raise FlywheelError(f"{folder} has no character: put at least one .toml file there.")
    return dict(sorted(characters.items()))


def roster(folder: Mapping[str, Character], store: "EventStore | None") -> dict[str, Character]:
    """The characters that may be talked to, by id, sorted by id: those that the service has approved and not retired,
    and those of the `folder` that nobody has decided about yet, as far as their files do not object."""
    found = store.cast() if store else {}
    for id, one in folder.items():
        older = id not in found or found[id].version <= one.version
        history = store.publication_history(id) if store else []
        decided = any(decision.version == one.version for decision in history)
        if older and not decided and one.safety == "approved":
            found[id] = one
    return dict(sorted(found.items()))


def bundled_characters() -> dict[str, Character]:
    """The characters that ship with the package, by id, sorted by id."""
    return load_characters(BUNDLED)
