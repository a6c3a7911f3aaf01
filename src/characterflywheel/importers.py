"""Bring in conversations from elsewhere: OpenAI-style JSON lines, SillyTavern's chats, and chitchat-dataset.

A line that cannot be read is named by its number, kept aside verbatim with its error, and the rest is imported; mend
the kept lines and import that file. Ids follow from the content, so importing a file twice adds nothing.

`openai`: one conversation a line, `{"messages": [{"role", "content"}]}`; `id`, `user`, `character` (the id of a
registered character), `source`, `consent`, and on the conversation or on a message `created_at` (or `timestamp`) and
`model` may be given; other keys are ignored. A leading system message is the description of a character of its own
unless `character` names one. Without a time, messages count seconds from 1970; a time without zone is UTC.

`sillytavern`: a chat file, one conversation. Its character is the registered one of that name; without one, a bare
character is made. Replies that were swiped away become alternatives with a regenerate signal each. The file imported
again when the chat has grown adds what is new.

`chitchat`: dataset.json of that package, people talking to people. Whoever wrote first is the user, the other person
answers as the assistant; senders and times are kept, and the conversation's ratings (1 to 10) become rating signals (1
to 5).
"""

import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import AliasChoices, BaseModel, Field, ValidationError

from . import sillytavern
from .errors import FlywheelError
from .ids import derive_id
from .pipeline import write_atomically
from .records import Character, Conversation, Instruction, Message, Record, Role, Signal, Source, User
from .store import EventStore

Progress = Callable[[int, int], None]
_AT_ONCE = 1000
_UNKNOWN_TIME = datetime(1970, 1, 1, tzinfo=UTC)


class BadLine(Record):
    """A line (from 1) or an entry that could not be imported, and why."""

    line: int
    reason: str


class ImportSummary(Record):
    """What was in a file. `messages` are those of the imported conversations, `added` those new to the store."""

    conversations: int
    messages: int
    added: int
    rejected: int
    rejected_path: Path | None = None
    bad_lines: tuple[BadLine, ...] = ()

    def line(self) -> str:
        text = (
            f"{self.conversations} conversations, {self.messages} messages ({self.added} new), {self.rejected} rejected"
        )
        if self.rejected:
            shown = "; ".join(f"line {bad.line}: {bad.reason}" for bad in self.bad_lines[:3])
            text += f" and kept in {self.rejected_path} ({shown}{'; ...' if self.rejected > 3 else ''})"
        return text


class _Entry(NamedTuple):
    """One conversation of a file as it stands there.

    `line` is its line or number, `read` the bytes read so far, `copy` how many lines before it are the same.
    """

    line: int
    raw: bytes
    read: int
    copy: int = 0


class _Parsed(NamedTuple):
    users: tuple[User, ...]
    character: Character
    conversation: Conversation
    signals: tuple[Signal, ...] = ()


class _RefusedError(Exception):
    """An entry that cannot be imported; the message is the reason."""


def import_file(
    store: EventStore,
    path: Path,
    format: Literal["openai", "sillytavern", "chitchat"],
    rejected_folder: Path,
    on_progress: Progress = lambda done, total: None,
) -> ImportSummary:
    """Import a file's conversations into the store, a thousand to a durable transaction.

    `path` of a chitchat data set may be its folder, or the word `package` for the installed one. What cannot be read
    goes to `rejected_folder`: the lines verbatim in `NAME-DIGEST.rejected`, the reasons in `NAME-DIGEST.errors.txt`.
    Raises FlywheelError where the format is unknown, the file is missing, or nothing in it can be imported.
    """
    if format not in _READERS:
        raise FlywheelError(f"format {format!r} does not exist; there are {', '.join(_READERS)}.")
    path = _data_file(path, format)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    read, parse = _READERS[format]
    before, known, total = store.position(), store.characters(), path.stat().st_size
    seen: dict[str, int] = {}
    bad: list[tuple[_Entry, str]] = []
    conversations = messages = 0
    entries = read(path)
    while chunk := list(islice(entries, _AT_ONCE)):
        good: list[_Parsed] = []
        for entry in chunk:
            try:
                parsed = parse(entry, known)
                first = seen.setdefault(parsed.conversation.id, entry.line)
                if first != entry.line:
                    raise _RefusedError(f"conversation {parsed.conversation.id!r} was on line {first} already")
                good.append(parsed)
            except _RefusedError as error:
                bad.append((entry, str(error)))
        _append(store, good)
        conversations += len(good)
        messages += sum(len(one.conversation.messages) for one in good)
        on_progress(chunk[-1].read, total)
    kept = _set_aside(rejected_folder, f"{path.stem}-{digest[:8]}", bad) if bad else None
    lines = tuple(BadLine(line=entry.line, reason=reason) for entry, reason in bad)
    if not conversations:
        why = f"line {lines[0].line}: {lines[0].reason}; all lines are kept in {kept}" if lines else "the file is empty"
        raise FlywheelError(f"{path} has no conversation to import as {format!r}: {why}.")
    store.record_import(
        digest, file=path.name, format=format, conversations=conversations, messages=messages, rejected=len(bad)
    )
    added = store.position().messages - before.messages
    return ImportSummary(
        conversations=conversations,
        messages=messages,
        added=added,
        rejected=len(bad),
        rejected_path=kept,
        bad_lines=lines,
    )


def _append(store: EventStore, parsed: list[_Parsed]) -> None:
    store.add_characters({one.character.id: one.character for one in parsed}.values())
    store.add_users(user for one in parsed for user in one.users)
    store.add_conversations(one.conversation for one in parsed)
    store.append(
        messages=[message for one in parsed for message in one.conversation.messages],
        signals=[signal for one in parsed for signal in one.signals],
    )


def _data_file(path: Path, format: str) -> Path:
    if format == "chitchat":
        if str(path) == "package":
            package = importlib.util.find_spec("chitchat_dataset")
            if package is None or package.origin is None:
                raise FlywheelError("chitchat-dataset is not installed: pip install --no-deps chitchat-dataset.")
            path = Path(package.origin).parent
        if path.is_dir():
            path /= "dataset.json"
    if not path.is_file():
        raise FlywheelError(f"{path} is missing or is no file: give the file to import.")
    return path


def _set_aside(folder: Path, name: str, bad: list[tuple[_Entry, str]]) -> Path:
    """Keep bad lines byte for byte, ready to be mended and imported, and their reasons beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{name}.rejected"
    kept.write_bytes(b"".join(entry.raw.rstrip(b"\r\n") + b"\n" for entry, _ in bad))
    write_atomically(folder / f"{name}.errors.txt", "".join(f"line {entry.line}: {why}\n" for entry, why in bad))
    return kept


# OpenAI-style JSON lines


_TIME = AliasChoices("created_at", "timestamp")


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class _OpenAIMessage(BaseModel):
    role: Role
    content: str | list[_Part]
    model: str | None = None
    created_at: datetime | None = Field(None, validation_alias=_TIME)

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class _OpenAILine(BaseModel):
    messages: list[_OpenAIMessage] = Field(min_length=1)
    id: str | None = Field(None, min_length=1)
    user: str | None = Field(None, min_length=1)
    character: str | None = None
    source: Source = "user"
    consent: bool = True
    model: str | None = None
    created_at: datetime | None = Field(None, validation_alias=_TIME)


def _read_lines(path: Path) -> Iterator[_Entry]:
    read, copies = 0, Counter[bytes]()
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            read += len(raw)
            if raw.strip():
                key = hashlib.sha256(raw.strip()).digest()
                yield _Entry(number, raw, read, copies[key])
                copies[key] += 1


def _parse_openai(entry: _Entry, known: Mapping[str, Character]) -> _Parsed:
    try:
        line = _OpenAILine.model_validate_json(entry.raw.removeprefix(b"\xef\xbb\xbf"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _RefusedError(f"{where}: {first['msg']}" if where else first["msg"]) from None
    said = line.messages
    system = said[0].text if said[0].role == "system" else ""
    said = said[1:] if said[0].role == "system" else said
    if not said:
        raise _RefusedError("no message but the system's")
    if any(message.role == "system" for message in said):
        raise _RefusedError("a system message after the first message")
    if line.character is not None and line.character not in known:
        raise _RefusedError(f"character {line.character!r} is not registered; add its file to characters/ first")
    character = known[line.character] if line.character is not None else _described(system)
    conversation_id = line.id or derive_id("openai", hashlib.sha256(entry.raw.strip()).hexdigest(), entry.copy)
    user_id = line.user or derive_id("openai", "user", conversation_id)
    starts = _utc(line.created_at or said[0].created_at or _UNKNOWN_TIME)
    messages = []
    at = starts
    for number, message in enumerate(said):
        at = _utc(message.created_at) if message.created_at else (at + timedelta(seconds=1) if number else starts)
        model = (message.model or line.model) if message.role == "assistant" else None
        messages.append(
            Message(
                id=derive_id("openai", conversation_id, number),
                conversation_id=conversation_id,
                user_id=user_id,
                role=message.role,
                content=message.text,
                model=model,
                created_at=at,
            )
        )
    user = User(id=user_id, population=line.source, consent=line.consent, created_at=starts)
    return _Parsed((user,), character, _conversation(conversation_id, user_id, character, line.source, messages))


def _described(system: str, name: str = "Assistant") -> Character:
    """The character that a system message describes; the same words are the same character."""
    text = system.strip() or "Be good company."
    return Character(
        id=f"imported-{hashlib.sha256(text.encode()).hexdigest()[:12]}", name=name, category="imported",
        traits=(), instructions=(Instruction(text=text),), greeting="",
    )  # fmt: skip


def _utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)


def _conversation(id: str, user: str, character: Character, source: Source, messages: list[Message]) -> Conversation:
    return Conversation(
        id=id, user_id=user, character_id=character.id, character_version=character.version, source=source,
        created_at=messages[0].created_at, messages=tuple(messages),
    )  # fmt: skip


# SillyTavern


def _read_sillytavern(path: Path) -> Iterator[_Entry]:
    """The file's readable lines as one entry; each line that is not is an entry of its own, to be refused."""
    good: list[bytes] = []
    read = 0
    for entry in _read_lines(path):
        read = entry.read
        if sillytavern.is_readable(entry.raw):
            good.append(entry.raw.strip())
        else:
            yield entry
    if good:
        yield _Entry(1, b"\n".join(good), read)


def _parse_sillytavern(entry: _Entry, known: Mapping[str, Character]) -> _Parsed:
    try:
        chat = sillytavern.chat_of(entry.raw.split(b"\n"))
    except sillytavern.NotAChatError as error:
        raise _RefusedError(str(error)) from None
    named = (one for one in known.values() if one.name.casefold() == chat.character.casefold())
    character = next(named, None) or _described(f"You are {chat.character}.", chat.character)
    user_id = derive_id("sillytavern", "user", chat.user)
    messages, signals = list[Message](), list[Signal]()
    at = (chat.starts or chat.said[0].at or _UNKNOWN_TIME) - timedelta(seconds=1)
    asked: str | None = None
    copies = Counter[tuple[Role, str]]()  # ids follow from words, so that they stay when the chat has grown
    for said in chat.said:
        at = max(said.at or at + timedelta(seconds=1), at)
        # an unused greeting was no reply; the reply that was kept arrives last, for that is where the chat goes on
        others = [n for n in range(len(said.texts)) if n != said.number] if asked else []
        written: dict[int, Message] = {}
        for n in (*others, said.number):
            words = (said.role, said.texts[n])
            copies[words] += 1
            written[n] = Message(
                id=derive_id("sillytavern", chat.id, *words, copies[words]),
                conversation_id=chat.id, user_id=user_id, role=said.role, content=said.texts[n], model=said.model,
                parent_id=asked if others else None, created_at=at,
            )  # fmt: skip
        messages += written.values()
        acts = [(written[n].id, "regenerate") for n in range(len(said.texts) - 1) if others]
        acts += [(written[said.number].id, "pick")] if others and said.number < len(said.texts) - 1 else []
        signals += [
            Signal(
                id=derive_id("sillytavern", id, kind), message_id=id, user_id=user_id,
                kind="pick" if kind == "pick" else "regenerate", created_at=at,
            )
            for id, kind in acts
        ]  # fmt: skip
        if said.role == "user":
            asked = written[said.number].id
    user = User(id=user_id, population="user", created_at=messages[0].created_at)
    return _Parsed((user,), character, _conversation(chat.id, user_id, character, "user", messages), tuple(signals))


# chitchat-dataset

_STRANGER = Character(
    id="chitchat-stranger", name="A stranger", category="people", traits=("a person",), greeting="",
    instructions=(Instruction(text="Chat with the other person as you would with a stranger you like."),),
)  # fmt: skip


class _ChitchatMessage(BaseModel):
    text: str
    timestamp: datetime
    sender: str


class _ChitchatEntry(BaseModel):
    messages: list[list[_ChitchatMessage]]
    ratings: dict[str, int] = {}


def _read_chitchat(path: Path) -> Iterator[_Entry]:
    """Each conversation as a line of its own, `{"id": {...}}`; numbers count the entries."""
    try:
        entries = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FlywheelError(f"{path} is not JSON: {error}; a chitchat data set is one JSON object.") from error
    if not isinstance(entries, dict):
        raise FlywheelError(f"{path} holds a {type(entries).__name__}; a chitchat data set is one JSON object.")
    size = path.stat().st_size
    for number, (key, value) in enumerate(entries.items(), 1):
        yield _Entry(number, json.dumps({key: value}, ensure_ascii=False).encode(), size * number // len(entries))


def _parse_chitchat(entry: _Entry, known: Mapping[str, Character]) -> _Parsed:
    ((key, value),) = json.loads(entry.raw).items()
    try:
        talk = _ChitchatEntry.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise _RefusedError(f"{key}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    said = [message for turn in talk.messages for message in turn]
    if not said:
        raise _RefusedError(f"{key}: no messages")
    owner = said[0].sender
    messages = [
        Message(
            id=derive_id("chitchat", key, number, at=_utc(one.timestamp)), conversation_id=key, user_id=one.sender,
            role="user" if one.sender == owner else "assistant", content=one.text, created_at=_utc(one.timestamp),
        )
        for number, one in enumerate(said)
    ]  # fmt: skip
    last = messages[-1]
    signals = tuple(
        Signal(
            id=derive_id("chitchat", key, name, at=last.created_at), message_id=last.id, user_id=owner, kind="rating",
            value=1 + (rating - 1) * 4 / 9, text=f"{name}: {rating} of 10", created_at=last.created_at,
        )
        for name, rating in sorted(talk.ratings.items())
    )  # fmt: skip
    met = {one.user_id: one.created_at for one in reversed(messages)}
    users = tuple(User(id=sender, population="user", created_at=at) for sender, at in sorted(met.items()))
    return _Parsed(users, _STRANGER, _conversation(key, owner, _STRANGER, "user", messages), signals)


_READERS: Mapping[
    str, tuple[Callable[[Path], Iterator[_Entry]], Callable[[_Entry, Mapping[str, Character]], _Parsed]]
] = {
    "openai": (_read_lines, _parse_openai),
    "sillytavern": (_read_sillytavern, _parse_sillytavern),
    "chitchat": (_read_chitchat, _parse_chitchat),
}
