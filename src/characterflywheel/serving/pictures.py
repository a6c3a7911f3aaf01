"""Pictures of characters, by content: a version names its picture's digest, and that file is shown with it.

No classifier here can look at a picture, so one that comes over HTTP waits for a person (PAPER section 9: fail closed).
A version that brings none keeps the picture of the version in service, which somebody approved.
"""

import hashlib
import re
from pathlib import Path

from ..ids import uuid7
from ..records import Character

MARK = "flywheel_picture"
"""The extension of a character that holds its picture's digest: another picture is another version."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


def marked(character: Character, picture: bytes) -> Character:
    """The character with this picture."""
    return _with(character, hashlib.sha256(picture).hexdigest())


def marked_like(character: Character, serving: Character | None) -> Character:
    """The character with the picture of the version in service, if that has one, whatever it says itself."""
    return _with(character, serving.extensions.get(MARK) if serving else None)


def keep(folder: Path, character: Character, picture: bytes) -> None:
    """Write the picture of a version; it appears whole or not at all."""
    target = _path(folder, character)
    assert target is not None, "keep() is for a character that is marked"
    folder.mkdir(exist_ok=True)
    draft = target.with_suffix(f".{uuid7()}.part")
    draft.write_bytes(picture)
    draft.replace(target)


def find(folder: Path, character: Character) -> Path | None:
    """The file of a version's picture; None where it has none."""
    path = _path(folder, character)
    return path if path is not None and path.is_file() else None


def _path(folder: Path, character: Character) -> Path | None:
    digest = character.extensions.get(MARK)
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        return None
    return folder / f"{character.id}-{digest}.png"


def _with(character: Character, digest: object) -> Character:
    extensions = {name: value for name, value in character.extensions.items() if name != MARK}
    if digest is not None:
        extensions[MARK] = digest
    return character.model_copy(update={"extensions": extensions})
