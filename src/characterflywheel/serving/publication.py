"""Which version of a character people meet: safety at every change, and people's word (PAPER section 9).

It fails closed. What a classifier could not check waits in the review queue, and so does what it doubts; the gravest is
refused. A version is published by a decision about it, kept with its reason; the approved version before it goes on
serving until then. The same content again is no new version, and needs no new decision.
"""

import asyncio
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from ..cards.card import check_values, data_of
from ..cards.texts import texts_of
from ..characters import load_characters
from ..errors import FlywheelError
from ..ids import uuid7
from ..records import Character
from ..safety import SafetyVerdict
from ..safety.policy import UNCHECKED
from ..service_records import Publication, PublicationState
from ..store import EventStore
from ..workspace import Workspace
from .pictures import keep, marked, marked_like

SAFETY = "safety"
"""The reviewer of decisions that classifiers made."""
GRAVEST = frozenset({"sexual_minors"})
PIECE_CHARS = 1500
OVERLAP_CHARS = 200
MAX_CHARS = 500_000
_AT_ONCE = 8
_NOT_CHECKED = "not checked"


class Checks(Protocol):
    """Who checks a text: `safety.moderator.Moderator`."""

    async def check(self, text: str, *, context: str = "") -> SafetyVerdict:
        """Judge `text`; never raises, and what cannot be judged is not allowed."""
        ...


class Finding(NamedTuple):
    """What safety says of a whole character: the state that follows, and why."""

    state: Literal["approved", "review", "refused"]
    reason: str


class Publisher:
    """Decides about characters and keeps the decisions in the store. `submit` is for the event loop, the rest for any
    thread."""

    def __init__(
        self, store: EventStore, moderator: Checks, pictures: Path | None = None, trusts_pictures: bool = False
    ) -> None:
        self.store, self.moderator, self.pictures, self.trusts_pictures = store, moderator, pictures, trusts_pictures
        self._turn = asyncio.Lock()

    async def submit(
        self, character: Character, by: str, at: datetime | None = None, picture: bytes | None = None
    ) -> Publication:
        """Check a character and register it as a new version; returns the decision about it.

        A picture (a PNG without a card in it) belongs to the version; unless pictures are trusted, a person decides.

        Its `version` and `safety` are ours to set. Content equal to the newest version is that version: where it was
        decided about, that decision stands, unless it could not be checked then or was retired since. Raises
        FlywheelError where a field of its card has a wrong type, or a text cannot be stored.
        """
        check_values(character.model_dump(exclude={"card"}), "character")
        if character.card is not None:
            data_of({"data": character.card})
        folder = self.pictures
        if picture is not None and folder is None:
            raise FlywheelError("pictures are not kept here: give the publisher a folder for them.")
        if picture is not None:
            character = marked(character, picture)
        else:
            serving = await asyncio.to_thread(self.store.cast)
            character = marked_like(character, serving.get(character.id))
        async with self._turn:  # versions are numbered one after the other
            version = await asyncio.to_thread(self._numbered, character)
            if picture is not None and folder is not None:
                await asyncio.to_thread(keep, folder, version, picture)
        return await self._decided(version, by, at, picture is not None)

    async def publish_folder(self, workspace: Workspace, at: datetime | None = None) -> list[Publication]:
        """Register and decide about the characters of the workspace's folder, whose files number their versions.

        One that its file marks `review` or `refused` is not published, and one that was retired stays so. Raises
        FlywheelError where a file changed and its version did not.
        """
        found = load_characters(workspace.characters).values()
        await asyncio.to_thread(self.store.add_characters, found)
        decided = await asyncio.to_thread(self.store.publications)
        retired = {id for id, decision in decided.items() if decision.state == "retired"}
        return [await self._decided(one, "the workspace's folder", at) for one in found if one.id not in retired]

    def decide(
        self, character: Character, decision: Literal["approved", "refused"], reason: str, by: str,
        at: datetime | None = None,
    ) -> Publication:  # fmt: skip
        """A person's word about a version; see `decide`."""
        return decide(self.store, character, decision, reason, by, at)

    def retire(self, character_id: str, by: str, reason: str, at: datetime | None = None) -> Publication:
        """Take a character out of service, in every version, until a version is approved again."""
        return retire(self.store, character_id, by, reason, at)

    def _numbered(self, character: Character) -> Character:
        """The registered version with this content: the newest, or a new one."""
        newest = self.store.character(character.id)
        if newest is not None and same_content(character, newest):
            return newest
        number = 1 if newest is None else newest.version + 1
        made = character.model_copy(update={"version": number, "safety": "approved"})
        self.store.add_characters([made])
        return made

    async def _decided(self, character: Character, by: str, at: datetime | None, pictured: bool = False) -> Publication:
        """The standing decision about a registered version, or one made now."""
        standing = await asyncio.to_thread(self._standing, character)
        if standing is not None:
            return standing
        finding = Finding("review", "its file says so") if character.safety == "review" else None
        if character.safety == "refused":
            finding = Finding("refused", "its file says so")
        finding = finding or await examine(self.moderator, texts_of(character))
        if pictured and finding.state == "approved" and not self.trusts_pictures:
            finding = Finding("review", "its texts are clean; its picture waits for a person to look at it")
        reason = f"{finding.reason} (submitted by {by})"
        return await asyncio.to_thread(_keep, self.store, character, finding.state, reason, SAFETY, at)

    def _standing(self, character: Character) -> Publication | None:
        history = self.store.publication_history(character.id)
        last = next((one for one in reversed(history) if one.version == character.version), None)
        if last is not None and last.state == "retired":
            word = next((one for one in reversed(history) if one.version == character.version and one != last), None)
            by_a_person = word is not None and word.state == "refused" and word.reviewer != SAFETY
            return last if by_a_person else None  # whom a person refused is not brought back by retiring first
        if last is None:
            return None
        return last if was_checked(last) else None


def decide(
    store: EventStore, character: Character, decision: Literal["approved", "refused"], reason: str, by: str,
    at: datetime | None = None,
) -> Publication:  # fmt: skip
    """A person's word about a version, whatever was decided before. Raises FlywheelError without a reason."""
    if not reason.strip():
        raise FlywheelError(f"the decision about {character.id!r} needs a reason: say why it is {decision}.")
    if store.character(character.id, character.version) is None:
        raise FlywheelError(f"character {character.id!r} has no version {character.version} to decide about.")
    return _keep(store, character, decision, reason.strip(), by, at)


def retire(store: EventStore, character_id: str, by: str, reason: str, at: datetime | None = None) -> Publication:
    """Take a character out of service, in every version, until a version is approved again."""
    newest = store.character(character_id)
    if newest is None:
        raise FlywheelError(f"there is no character {character_id!r} to retire.")
    return _keep(store, newest, "retired", reason, by, at)


def _keep(
    store: EventStore, character: Character, state: PublicationState, reason: str, by: str, at: datetime | None
) -> Publication:
    decision = Publication(
        id=uuid7(), character_id=character.id, version=character.version, state=state, reason=reason, reviewer=by,
        created_at=at or datetime.now(UTC),
    )  # fmt: skip
    store.publish(decision)
    return decision


def was_checked(decision: Publication) -> bool:
    """Whether somebody could judge: safety that failed leaves a character to be checked again."""
    return not (decision.state == "review" and decision.reviewer == SAFETY and decision.reason.startswith(_NOT_CHECKED))


def same_content(one: Character, other: Character) -> bool:
    """Whether two characters differ in nothing but version and state."""
    left, right = (character.model_dump(exclude={"version", "safety"}) for character in (one, other))
    return left == right


async def examine(moderator: Checks, texts: Mapping[str, str]) -> Finding:
    """What safety says of texts, by where they stand: approved only where every piece of every one was found clean."""
    if (length := sum(map(len, texts.values()))) > MAX_CHARS:
        return Finding("review", f"{_NOT_CHECKED}: {length} characters of text, at most {MAX_CHARS} are checked")
    free = asyncio.Semaphore(_AT_ONCE)

    async def check(where: str, piece: str) -> tuple[str, SafetyVerdict]:
        async with free:
            return where, await moderator.check(piece)

    pieces = [(where, piece) for where, text in texts.items() for piece in _pieces(text)]
    verdicts = await asyncio.gather(*(check(where, piece) for where, piece in pieces))
    found: dict[str, set[str]] = {}
    for where, verdict in verdicts:
        if not verdict.allowed:
            found.setdefault(where, set()).update(verdict.categories or (UNCHECKED,))
    categories = set[str]().union(*found.values())
    if not found:
        return Finding("approved", "safety found nothing")
    if categories == {UNCHECKED}:
        return Finding("review", f"{_NOT_CHECKED}: a classifier failed on {', '.join(found)}")
    where = "; ".join(f"{', '.join(sorted(names))} in {field}" for field, names in found.items())
    return Finding("refused" if categories & GRAVEST else "review", where)


def _pieces(text: str) -> Iterator[str]:
    """A text in overlapping pieces that a classifier reads whole, cut between words where there are any."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        cut = text.rfind(" ", start + PIECE_CHARS // 2, start + PIECE_CHARS)
        end = cut if cut > 0 else start + PIECE_CHARS
        yield text[start:end]
        start = end - OVERLAP_CHARS
    yield text[start:]
