"""SillyTavern's chat files as conversations (DESIGN section 10): a line about the chat, then a message on each line.

A reply's `swipes` are the alternatives that were asked for; `swipe_id` is the one that the conversation went on with.
Messages marked `is_system` (hidden ones, notes of the program) are left out. Times are written in several ways and
without a zone: they are taken as UTC.
"""

import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from pydantic import BaseModel, Field, ValidationError

from .ids import derive_id
from .records import Role

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_NAMED_MONTH = re.compile(r"(\w{3})\w* (\d{1,2}), (\d{4}) (\d{1,2}):(\d{2}) ?([ap])m", re.IGNORECASE)
_NUMBERS = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2}) ?@(\d{1,2})h ?(\d{1,2})m ?(\d{1,2})s(?: ?(\d{1,3})ms)?")


class Said(NamedTuple):
    """A message, and the alternatives to it, in the order in which they were written; `number` is its own place."""

    role: Role
    texts: tuple[str, ...]
    number: int
    at: datetime | None
    model: str | None

    @property
    def text(self) -> str:
        return self.texts[self.number]


class Chat(NamedTuple):
    """A chat file. `id` is the same for the file when it has grown; `starts` is None where it does not say."""

    id: str
    user: str
    character: str
    starts: datetime | None
    said: tuple[Said, ...]


class NotAChatError(Exception):
    """A line that is no message of a chat, or lines that are no chat; the message is the reason."""


class _Header(BaseModel):
    user_name: str = ""
    character_name: str = ""
    create_date: str | float | None = None
    chat_metadata: dict[str, object] = Field(default_factory=dict)


class _Extra(BaseModel):
    model: str | None = None


class _Line(BaseModel):
    mes: str
    name: str = ""
    is_user: bool = False
    is_system: bool = False
    send_date: str | float | None = None
    swipes: list[str] = Field(default_factory=list)
    swipe_id: int = Field(0, ge=0)
    extra: _Extra | None = None


def is_readable(line: bytes) -> bool:
    """Whether a line is one of a chat file: the header or a message."""
    try:
        _header(line) or _message(line)
    except NotAChatError:
        return False
    return True


def chat_of(lines: Iterable[bytes]) -> Chat:
    """The chat in the lines of a file. Raises NotAChatError, which says why."""
    header, messages = _Header(), list[_Line]()
    first = b""
    for line in lines:
        about = None if messages else _header(line)
        header = about or header
        if about is None:
            first = first or line.strip()
            messages.append(_message(line))
    spoken = [one for one in messages if not one.is_system]
    if not any(one.is_user for one in spoken):
        raise NotAChatError("no message of a user")
    if len(names := sorted({one.name for one in spoken if not one.is_user})) > 1:
        raise NotAChatError(f"a group of {len(names)} characters ({', '.join(names[:3])}); one can be imported")
    user = header.user_name or next((one.name for one in spoken if one.is_user), "")
    same = header.chat_metadata.get("integrity") or (header.create_date, header.chat_metadata.get("main_chat"))
    told = names[0] if names else header.character_name
    return Chat(
        id=derive_id("sillytavern", user, told, same if header.create_date or isinstance(same, str) else first),
        user=user or "User",
        character=told or header.character_name or "Assistant",
        starts=_time(header.create_date),
        said=tuple(map(_said, spoken)),
    )


def _said(line: _Line) -> Said:
    """`mes` counts where it differs from its swipe: it was edited."""
    model = line.extra.model if line.extra and not line.is_user else None
    texts: tuple[str, ...] = (line.mes,)
    number = 0
    if not line.is_user and line.swipe_id < len(line.swipes):
        number = line.swipe_id
        texts = (*line.swipes[:number], line.mes, *line.swipes[number + 1 :])
    return Said("user" if line.is_user else "assistant", texts, number, _time(line.send_date), model)


def _header(line: bytes) -> _Header | None:
    """The line about the chat; None for another line."""
    found = _object(line)
    if "mes" in found or not found.keys() & {"chat_metadata", "user_name", "character_name"}:
        return None
    try:
        return _Header.model_validate(found)
    except ValidationError as error:
        raise NotAChatError(_first(error)) from None


def _message(line: bytes) -> _Line:
    try:
        return _Line.model_validate(_object(line))
    except ValidationError as error:
        raise NotAChatError(_first(error)) from None


def _object(line: bytes) -> dict[str, object]:
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise NotAChatError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise NotAChatError(f"a JSON {type(found).__name__}, must be an object")
    return found


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _time(written: str | float | None) -> datetime | None:
    """A time in any of SillyTavern's ways to write one; None where it is none of them."""
    if written is None:
        return None
    text = str(written).strip()
    try:
        if re.fullmatch(r"\d{1,15}(\.\d*)?", text):
            return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=float(text))
        if found := _NUMBERS.fullmatch(text):
            *parts, thousandths = (int(part or 0) for part in found.groups())
            return datetime(*parts, thousandths * 1000, tzinfo=UTC)  # type: ignore[arg-type, misc]
        if found := _NAMED_MONTH.fullmatch(text):
            month, day, year, hour, minute, half = found.groups()
            number = _MONTHS.index(month.lower()) + 1
            hours = int(hour) % 12 + (12 if half.lower() == "p" else 0)
            return datetime(int(year), number, int(day), hours, int(minute), tzinfo=UTC)
        moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        return None
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
