"""Pictures of characters: a file for each version that brought one, shown with the version in service.

No classifier here can look at a picture, so one that comes over HTTP waits for a person (PAPER section 9: fail closed).
"""

import hashlib
from pathlib import Path

from ..ids import uuid7
from ..records import Character

MARK = "flywheel_picture"
"""The extension of a character that holds its picture's digest: another picture is another version."""


def marked(character: Character, picture: bytes) -> Character:
    """The character with its picture's digest."""
    digest = hashlib.sha256(picture).hexdigest()
    return character.model_copy(update={"extensions": {**character.extensions, MARK: digest}})


def keep(folder: Path, character: Character, picture: bytes) -> None:
    """Write the picture of a version; it appears whole or not at all."""
    folder.mkdir(exist_ok=True)
    target = folder / f"{character.id}-{character.version}.png"
    draft = target.with_suffix(f".{uuid7()}.part")
    draft.write_bytes(picture)
    draft.replace(target)


def find(folder: Path, character: Character) -> Path | None:
    """The picture of a version: its own, or that of the version before it that brought one."""
    for version in range(character.version, 0, -1):
        path = folder / f"{character.id}-{version}.png"
        if path.is_file():
            return path
    return None
