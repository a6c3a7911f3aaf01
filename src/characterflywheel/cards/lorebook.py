"""A card's lorebook: which entries a conversation calls for, within the book's budget (DESIGN section 5).

An entry counts when one of its keys stands in the newest messages (`scan_depth` of them, or four), and, with
`selective`, one of its secondary keys too; a `constant` one always counts. Keys are parts of the text, in any case
unless `case_sensitive`. With `recursive_scanning`, what an entry says can call for others. Where the budget is short,
the entries of lowest priority (or lowest insertion order) go first.

Books come from strangers and are read at every turn, so whatever is left after 100 ms is not called for. Patterns of
`use_regex` are JavaScript's, at most 300 characters long, with counted repeats that multiply to little; a search stops
after 10 ms. A pattern that is refused, invalid or too slow matches nothing.
"""

import re
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import regex  # type: ignore[import-untyped]

from ..records import ChatMessage, Role
from .card import BookEntry, CharacterBook
from .decorators import Decorators, read_decorators
from .macros import Voice

MESSAGE_TOKENS = 5
"""What a chat template adds to a message: the marks around it and its role, at most, in ChatML and Llama's format."""
SCAN_DEPTH = 4
PATTERN_CHARS = 300
PATTERN_WORK = 50_000
"""Length times repeats: about the memory that compiling takes, in nodes."""
SEARCH_SECONDS = 0.01
TURN_SECONDS = 0.1
_COUNTED = re.compile(r"\{(\d+)(?:,(\d*))?\}")
_LITERAL = re.compile(r"/(.+)/([a-z]*)", re.DOTALL)
# what JavaScript reads as text and Python's `regex` as something else: braces that count nothing
_BRACE = re.compile(r"\\[pP]\{\w+\}|\\.|\{(?!\d+(?:,\d*)?\})", re.DOTALL)
# groups that JavaScript has; others (recursion, conditions) have costs without bound
_KNOWN_GROUPS = re.compile(r"(?:\\.|[^\\(]|\((?!\?)|\(\?(?:[:=!]|<[=!A-Za-z_]|[ims]+[:)]))*", re.DOTALL)


class Lore(NamedTuple):
    """An entry for the prompt. `position` is a place in the system prompt, or `depth` counts messages from the end.

    `spare` entries are the first to go when the context is short. `tokens` counts the text and a line break, or the
    marks of a message.
    """

    text: str
    position: str
    depth: int | None
    role: Role
    spare: bool
    tokens: int


class Scene(NamedTuple):
    """What an entry is matched against: the messages so far, and the number of the greeting they began with."""

    history: Sequence[ChatMessage]
    greeting: int | None


class _Entry(NamedTuple):
    entry: BookEntry
    said: Decorators
    text: str
    number: int


def lore_of(
    book: CharacterBook, scene: Scene, voice: Voice, budget: int, count: Callable[[str], int]
) -> tuple[Lore, ...]:
    """The entries that count, in the order of insertion; together at most `budget` tokens and the book's own budget."""
    limit = budget if book.token_budget is None else min(budget, book.token_budget)
    entries = [
        _Entry(entry, *read_decorators(entry.content), number)
        for number, entry in enumerate(book.entries)
        if entry.enabled and entry.content.strip()
    ]
    depth = SCAN_DEPTH if book.scan_depth is None else book.scan_depth
    called = _called(book, entries, _Scan(scene, voice, depth, time.monotonic() + TURN_SECONDS))
    kept: list[tuple[_Entry, Lore]] = []
    for one in sorted(called, key=_worth, reverse=True):
        lore = _lore(one, voice, count)
        if lore.text and lore.tokens <= limit:
            limit -= lore.tokens
            kept.append((one, lore))
    kept.sort(key=lambda pair: (pair[0].entry.insertion_order, pair[0].number))
    return tuple(lore for _, lore in kept)


def _called(book: CharacterBook, entries: list[_Entry], scan: "_Scan") -> list[_Entry]:
    called = [one for one in entries if scan.calls_for(one)]
    fresh = called if book.recursive_scanning else []
    while fresh:
        told = "\n".join(scan.voice.render(one.text, hidden=True) for one in fresh)
        fresh = [one for one in entries if one not in called and scan.calls_for(one, told)]
        called = called + fresh
    return called


def _worth(one: _Entry) -> tuple[bool, float, int]:
    """Higher is kept longer."""
    priority = one.entry.priority if one.entry.priority is not None else one.entry.insertion_order
    return not one.said.ignore_on_max_context, priority, -one.number


def _lore(one: _Entry, voice: Voice, count: Callable[[str], int]) -> Lore:
    text = voice.render(one.text).strip()
    position = "before_char" if one.entry.position == "before_char" else "after_char"
    depth = None if one.said.position else one.said.depth
    tokens = count(text) + (1 if depth is None else MESSAGE_TOKENS)
    return Lore(text, one.said.position or position, depth, one.said.role, one.said.ignore_on_max_context, tokens)


class _Scan:
    """Matches entries against a scene; after `deadline` (monotonic seconds) nothing matches any more."""

    def __init__(self, scene: Scene, voice: Voice, depth: int, deadline: float) -> None:
        self.scene, self.voice, self.depth, self.deadline = scene, voice, depth, deadline
        self.spoken = sum(message.role == "assistant" for message in scene.history)
        self._texts: dict[tuple[int, bool], str] = {}

    def calls_for(self, one: _Entry, told: str | None = None) -> bool:
        """Whether the scene calls for an entry; `told` is what other entries say, in place of the newest messages."""
        said = one.said
        if said.activate or said.dont_activate:
            return said.activate
        if time.monotonic() > self.deadline:
            return False
        if (said.keep_activate_after_match or said.dont_activate_after_match) and self._called_before(one):
            return not said.dont_activate_after_match
        return self._may_now(said) and self._mentioned(one, told)

    def _may_now(self, said: Decorators) -> bool:
        if said.activate_only_after is not None and self.spoken < said.activate_only_after:
            return False
        if said.activate_only_every is not None and self.spoken % said.activate_only_every:
            return False
        return said.is_greeting is None or self.scene.greeting in (None, said.is_greeting)

    def _called_before(self, one: _Entry) -> bool:
        """Whether an earlier message of the user called for the entry."""
        once = one.said._replace(keep_activate_after_match=False, dont_activate_after_match=False)
        history = self.scene.history
        return any(
            _Scan(self.scene._replace(history=history[:end]), self.voice, self.depth, self.deadline).calls_for(
                one._replace(said=once)
            )
            for end in range(1, len(history))
            if history[end - 1].role == "user"
        )

    def _mentioned(self, one: _Entry, told: str | None) -> bool:
        entry, said = one.entry, one.said
        folded = not (entry.case_sensitive or entry.use_regex)
        if told is None:
            text = self._newest(self.depth if said.scan_depth is None else said.scan_depth, folded)
        else:
            text = told.casefold() if folded else told
        if entry.use_regex:
            return self._matches(entry, entry.keys, text) and all(
                self._matches(entry, keys, text) for keys in said.additional_keys
            )
        if self._stands(entry, said.exclude_keys, text):
            return False
        if not all(self._stands(entry, keys, text) for keys in said.additional_keys):
            return False
        if entry.constant or said.constant:
            return True
        second = entry.secondary_keys if entry.selective else ()
        return self._stands(entry, entry.keys, text) and (not any(second) or self._stands(entry, second, text))

    def _newest(self, depth: int, folded: bool) -> str:
        """The newest `depth` messages as one text."""
        if (depth, folded) not in self._texts:
            messages = self.scene.history[-depth:] if depth else ()
            text = "\n".join(message.content for message in messages)
            self._texts[depth, folded] = text.casefold() if folded else text
        return self._texts[depth, folded]

    def _stands(self, entry: BookEntry, keys: Sequence[str], text: str) -> bool:
        """Whether one of the keys stands in a text, which is folded unless case counts."""
        plain = (self.voice.render(key).strip() for key in keys)
        return any((key if entry.case_sensitive else key.casefold()) in text for key in plain if key)

    def _matches(self, entry: BookEntry, keys: Sequence[str], text: str) -> bool:
        return any(self._search(key, entry.case_sensitive, text) for key in keys)

    def _search(self, key: str, case_sensitive: bool, text: str) -> bool:
        if (left := self.deadline - time.monotonic()) <= 0:
            return False
        try:
            pattern = pattern_of(key, case_sensitive)
            return pattern is not None and pattern.search(text, timeout=min(left, SEARCH_SECONDS)) is not None
        except (TimeoutError, MemoryError):
            return False


@lru_cache(maxsize=2048)
def pattern_of(key: str, case_sensitive: bool) -> "regex.Pattern[str] | None":
    """A key as a pattern, `/pattern/flags` or bare; None where it is invalid or over the bounds."""
    literal = _LITERAL.fullmatch(key)
    pattern, letters = (literal[1], literal[2]) if literal else (key, "" if case_sensitive else "i")
    if len(pattern) > PATTERN_CHARS or not _KNOWN_GROUPS.fullmatch(pattern):
        return None
    pattern = _BRACE.sub(lambda found: "\\{" if found[0] == "{" else found[0], pattern)
    repeats = prod(max(1, *(int(number or 1) for number in found)) for found in _COUNTED.findall(pattern))
    if not pattern or len(pattern) * repeats > PATTERN_WORK:
        return None
    flags = regex.V0
    for letter, flag in (("i", regex.IGNORECASE), ("m", regex.MULTILINE), ("s", regex.DOTALL)):
        flags |= flag if letter in letters else 0
    try:
        return regex.compile(pattern, flags)
    except Exception:  # a stranger's pattern: whatever the compiler says of it, it matches nothing
        return None
