"""The `{{...}}` of cards: names, and V3's small functions, replaced in what a card's writer wrote and nowhere else.

Chance is a function of its seed, so the same prompt is assembled the same way again. What is unknown stays as it is.
"""

import random
import re
from dataclasses import dataclass

from ..ids import derive_seed

_NAMES = re.compile(r"\{\{\s*(?P<name>char|user|original)\s*\}\}|<(?P<tag>char|bot|user)>", re.IGNORECASE)
_CALLS = re.compile(
    r"\{\{\s*(?:(?P<call>random|pick|roll|reverse|hidden_key|comment)\s*::?|(?P<note>//))(?P<value>[^{}]*)\}\}",
    re.IGNORECASE,
)
_COMMA = re.compile(r"(?<!\\),")
_UNFIT_FOR_NAMES = re.compile(r"[{}<>\s\x00-\x1f]+")


@dataclass(frozen=True)
class Voice:
    """Who speaks with whom, and the seeds of chance: `turn` for what is drawn anew each turn, `id` for what stays."""

    char: str
    user: str
    id: str
    turn: str = ""

    def render(self, text: str, original: str | None = None, *, hidden: bool = False) -> str:
        """`text` with its macros replaced; `{{original}}` where `original` is given; hidden keys where `hidden`."""
        if "{" not in text and "<" not in text:
            return text
        drawn = 0

        def name(found: re.Match[str]) -> str:
            word = (found["name"] or found["tag"]).lower()
            if word == "original":
                return found[0] if original is None else original
            return self.user if word == "user" else self.char

        def call(found: re.Match[str]) -> str:
            nonlocal drawn
            drawn += 1
            return self._call((found["call"] or "//").lower(), found["value"].strip(), drawn, hidden) or ""

        return _CALLS.sub(call, _NAMES.sub(name, text))

    def _call(self, what: str, value: str, number: int, hidden: bool) -> str:
        match what:
            case "random" | "pick":
                choices = [one.replace("\\,", ",").strip() for one in _COMMA.split(value)]
                seed = (self.id, value) if what == "pick" else (self.id, self.turn, number, value)
                return random.Random(derive_seed(what, *seed)).choice(choices)
            case "roll":
                sides = value.lower().removeprefix("d")
                most = int(sides) if sides.isdecimal() and len(sides) <= 9 else 0
                rng = random.Random(derive_seed(what, self.id, self.turn, number))
                return str(rng.randint(1, most)) if most else ""
            case "reverse":
                return value[::-1]
            case "hidden_key":
                return value if hidden else ""
        return ""  # comments


def has_calls(text: str) -> bool:
    """Whether a text has macros other than names: what they hold may not read as it is written."""
    return _CALLS.search(text) is not None


def plain_name(name: str, otherwise: str = "User") -> str:
    """A user's name as it may stand in a prompt: one line of at most 64 characters, without marks of macros."""
    return _UNFIT_FOR_NAMES.sub(" ", name).strip()[:64].strip() or otherwise
