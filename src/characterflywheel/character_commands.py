"""What `flywheel characters` does: the folder's files and the chat service's store, cards in and out.

Characters written by hand live as TOML in the workspace's folder; those that came as cards, or over HTTP, live in the
event store with every version of theirs (docs/decisions/053-characters.md).
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from .cards import card_of, character_of, greeting, read_card, write_png
from .cards.png import is_png, picture_of
from .characters import load_characters, system_prompt
from .errors import FlywheelError
from .records import Character
from .safety.moderator import make_moderator
from .service_records import Publication
from .serving.pictures import find
from .serving.publication import Publisher, decide
from .serving.publication import retire as retire_character
from .store import EventStore
from .workspace import Workspace

BY = "the command line"


def list_characters(workspace: Workspace) -> None:
    """One line a character: id, name, category, instructions, and what has been decided about it."""
    folder, known = load_characters(workspace.characters), _known(workspace)
    decided: dict[str, Publication] = {}
    if _has_store(workspace):
        with EventStore.open(workspace.events) as store:
            decided = store.publications()
    for id, character in known.items():
        if id not in folder and id not in decided:
            continue  # brought along by imported conversations
        rules = sum(instruction.rule is not None for instruction in character.instructions)
        said = f"{len(character.instructions)} instructions, {rules} verified by rule"
        if character.card is not None:
            said = f"character card, {said}" if character.instructions else "character card"
        state = decided[id].state if id in decided else "not published"
        print(f"{id:<16} {character.name:<20} {character.category:<14} {said}, version {character.version} {state}")


def show(workspace: Workspace, id: str) -> None:
    """A character as the model is told of it, and its greeting."""
    character = _one(workspace, id)
    print(f"{system_prompt(character)}\n\n{character.name}: {greeting(character)}")


def import_cards(workspace: Workspace, files: Sequence[Path], id: str | None = None) -> None:
    """Bring in cards, JSON or PNG, and submit them to safety. Bad files are named, the rest comes in.

    Raises FlywheelError where a file could not be imported.
    """
    if id is not None and len(files) > 1:
        raise FlywheelError(f"--id {id} names one character, but there are {len(files)} files: import them one by one.")

    async def bring_in() -> int:
        bad = 0
        async with _publisher(workspace) as publisher:
            for file in files:
                try:
                    raw = file.read_bytes()
                    character = character_of(read_card(raw), id)
                    decision = await publisher.submit(character, BY, picture=picture_of(raw) if is_png(raw) else None)
                except (FlywheelError, OSError) as error:  # one file; the others come in
                    bad += 1
                    sys.stderr.write(f"{file}: {error}\n")
                    continue
                _say(decision)
        return bad

    if bad := asyncio.run(bring_in()):
        raise FlywheelError(f"{bad} of {len(files)} files were not imported: see above.")


def export_card(
    workspace: Workspace, id: str, version: Literal["v2", "v3"], form: Literal["json", "png"], output: Path
) -> None:
    """Write a character's card; a PNG holds both versions, on its picture or its initials."""
    character = _one(workspace, id)
    picture = find(workspace.pictures, character)
    if form == "png":
        _write(output, write_png(character, picture.read_bytes() if picture else None))
    else:
        _write(output, (json.dumps(card_of(character, version), ensure_ascii=False, indent=1) + "\n").encode())
    print(f"{character.name} (version {character.version}) in {output}")


def publish(workspace: Workspace, id: str | None = None) -> None:
    """Submit the folder's characters to safety, or the newest version of one; what stands already is said again."""
    one = None if id is None else _one(workspace, id)

    async def submit() -> list[Publication]:
        async with _publisher(workspace) as publisher:
            return [await publisher.submit(one, BY)] if one else await publisher.publish_folder(workspace)

    for decision in asyncio.run(submit()):
        _say(decision)


def retire(workspace: Workspace, id: str, reason: str) -> None:
    """Take a character out of service."""
    with EventStore.open(workspace.events) as store:
        _say(retire_character(store, id, BY, reason))


def review(workspace: Workspace, id: str | None, decision: Literal["approved", "refused"] | None, reason: str) -> None:
    """Decide about the newest version of a character, or print those that wait for a decision."""
    with EventStore.open(workspace.events) as store:
        if id is not None and decision is not None:
            newest = store.character(id)
            if newest is None:
                raise FlywheelError(f"character {id!r} is not in the store: `flywheel characters publish` submits it.")
            _say(decide(store, newest, decision, reason, BY))
            return
        waiting = [
            one for one in store.publications().values() if one.state == "review" and id in (None, one.character_id)
        ]
    for one in waiting:
        _say(one)
    if not waiting:
        print("no character waits for a decision")


def _known(workspace: Workspace) -> dict[str, Character]:
    """The newest version of every character, of the folder and of the store, sorted by id."""
    found = load_characters(workspace.characters)
    if _has_store(workspace):
        with EventStore.open(workspace.events) as store:
            stored = store.characters()
        found |= {id: one for id, one in stored.items() if id not in found or found[id].version < one.version}
    return dict(sorted(found.items()))


def _one(workspace: Workspace, id: str) -> Character:
    known = _known(workspace)
    if id not in known:
        raise FlywheelError(f"there is no character {id!r}; there are {', '.join(known)}.")
    return known[id]


def _has_store(workspace: Workspace) -> bool:
    events = workspace.events
    return not isinstance(events, Path) or events.is_file()


@asynccontextmanager
async def _publisher(workspace: Workspace) -> AsyncIterator[Publisher]:
    moderator = make_moderator(workspace.config().safety)
    try:
        with EventStore.open(workspace.events) as store:
            yield Publisher(store, moderator, workspace.pictures, trusts_pictures=True)  # the operator saw them
    finally:
        await moderator.close()


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.writing")
    temporary.write_bytes(content)
    temporary.replace(path)


def _say(decision: Publication) -> None:
    print(f"{decision.character_id:<16} version {decision.version} {decision.state}: {decision.reason}")
