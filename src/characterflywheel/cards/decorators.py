"""V3 decorators: lines `@@name value` at the top of a lorebook entry that say when and where it counts.

A line `@@@name value` is the fallback of the one above, and counts where that is unknown here or has no valid value.
Unknown decorators are ignored, and stay in the card.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from ..records import Role

_LINE = re.compile(r"(@{2,3})([A-Za-z_]+)(?:[ \t]+(.*?))?[ \t]*")
MAX_WORDS = 200
POSITIONS = ("before_char", "after_char", "before_desc", "after_desc", "personality", "scenario")


class Decorators(NamedTuple):
    """What an entry's decorators say, None or False where they do not; see the V3 specification for their meaning."""

    activate: bool = False
    dont_activate: bool = False
    constant: bool = False
    keep_activate_after_match: bool = False
    dont_activate_after_match: bool = False
    ignore_on_max_context: bool = False
    activate_only_after: int | None = None
    activate_only_every: int | None = None
    is_greeting: int | None = None
    scan_depth: int | None = None
    depth: int | None = None
    role: Role = "system"
    position: str | None = None
    additional_keys: tuple[tuple[str, ...], ...] = ()
    exclude_keys: tuple[str, ...] = ()


class Decorated(NamedTuple):
    """An entry's content taken apart."""

    decorators: Decorators
    text: str


def read_decorators(content: str) -> Decorated:
    """The decorators at the top of an entry's content, and the text below them."""
    if not content.lstrip().startswith("@@"):
        return Decorated(Decorators(), content)
    lines = content.lstrip().splitlines()
    found: dict[str, object] = {}
    settled = False  # whether the decorator above, or a fallback of it, counts
    below = 0
    for line in lines:
        marks = _LINE.fullmatch(line)
        if line.strip() and marks is None:
            break
        below += 1
        if marks is None or (len(marks[1]) == 3 and settled):
            continue
        settled = _take(found, marks[2].lower(), marks[3] or "")
    return Decorated(Decorators()._replace(**found), "\n".join(lines[below:]).strip("\n"))  # type: ignore[arg-type]


def has_decorators(content: str) -> bool:
    """Whether the content begins with a decorator."""
    return _LINE.fullmatch(content.lstrip().split("\n", 1)[0]) is not None


def without_decorators(content: str) -> str:
    """The content as a program that knows no decorators should see it."""
    return read_decorators(content).text


def _take(found: dict[str, object], name: str, value: str) -> bool:
    """Note a decorator that is known and valid, the first of its name; whether it was."""
    reader = _READERS.get(name)
    said = reader(value) if reader else None
    if said is None:
        return False
    if name == "additional_keys":
        found[name] = (*found.get(name, ()), said)  # type: ignore[misc]
    else:
        found.setdefault(name, said)
    return True


def _flag(value: str) -> bool | None:
    return None if value.strip().lower() == "false" else True


def _number(value: str) -> int | None:
    digits = value.strip()
    return int(digits) if digits.isdecimal() and len(digits) <= 9 else None


def _positive(value: str) -> int | None:
    return _number(value) or None


def _depth(value: str) -> int | None:
    return _number(value.strip().removeprefix("-")) if not value.strip().startswith("-") else 0


def _role(value: str) -> str | None:
    return value.strip().lower() if value.strip().lower() in ("system", "user", "assistant") else None


def _position(value: str) -> str | None:
    return value.strip().lower() if value.strip().lower() in POSITIONS[2:] else None


def _words(value: str) -> tuple[str, ...] | None:
    return tuple(word.strip() for word in value.split(",")[:MAX_WORDS] if word.strip()) or None


_READERS: dict[str, Callable[[str], object]] = {
    "activate": _flag, "dont_activate": _flag, "constant": _flag, "keep_activate_after_match": _flag,
    "dont_activate_after_match": _flag, "ignore_on_max_context": _flag, "activate_only_after": _number,
    "activate_only_every": _positive, "is_greeting": _number, "scan_depth": _number, "depth": _depth,
    "role": _role, "position": _position, "additional_keys": _words, "exclude_keys": _words,
}  # fmt: skip
