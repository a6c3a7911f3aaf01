"""What the model is given: a character, then the conversation, by the rules of character cards (DESIGN section 5).

Of a card, these may reach the prompt: name or nickname, `system_prompt`, `description`, `personality`, `scenario`,
`mes_example`, `post_history_instructions` and the lorebook entries that are called for. Creator's notes, tags, creator,
version, assets and extensions never do. Where the budget is short, example conversations go first, then spare lorebook
entries, then the oldest turns; the last message of the user stays.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..characters import system_prompt
from ..errors import FlywheelError
from ..records import Character, ChatMessage, Role
from .card import CardData, view
from .lorebook import MESSAGE_TOKENS, Lore, Scene, lore_of
from .macros import Voice, plain_name

REPLY_TOKENS = 4
"""What a chat template adds where the reply begins."""
LORE_SHARE = 4
"""A lorebook without a budget of its own gets one part of so many of the whole."""
EXAMPLE_BEGINS = "Example of a conversation:"
CHAT_BEGINS = "The conversation begins:"
_START = re.compile(r"<START>", re.IGNORECASE)

Count = Callable[[str], int]


class PromptTooLongError(FlywheelError):
    """What must be in the prompt is longer than the budget."""


def assemble(
    character: Character, history: Sequence[ChatMessage], budget: int, count: Count, user_name: str = "User"
) -> list[ChatMessage]:
    """The prompt for a reply to `history`, of at most `budget` tokens as `count` counts a text's.

    A character without a card is its system prompt, then the history. Raises PromptTooLongError where the character
    and the last message of the user do not fit together.
    """
    if character.card is None:
        system = ChatMessage(role="system", content=system_prompt(character))
        room = _room(character, budget, [system, *_last_turn(history)], count)
        return [system, *_newest(history, room, count)]
    return _card_prompt(character, view(character.card), history, budget, count, plain_name(user_name))


def greetings(character: Character, user_name: str = "User") -> tuple[str, ...]:
    """The character's first messages, the usual one first, for this user."""
    if character.card is None:
        return (character.greeting,)
    card = view(character.card)
    return _greetings(card, _voice(character, card, plain_name(user_name)))


def _greetings(card: CardData, voice: Voice) -> tuple[str, ...]:
    return tuple(voice.render(text) for text in (card.first_mes, *card.alternate_greetings))


def greeting(character: Character, number: int = 0, user_name: str = "User") -> str:
    """The character's first message, or an alternate one by number from 1."""
    found = greetings(character, user_name)
    if not 0 <= number < len(found):
        raise FlywheelError(f"greeting {number} does not exist; {character.id!r} has 0 to {len(found) - 1}.")
    return found[number]


def static_prompt(character: Character) -> str:
    """A card character's system prompt without its lorebook: what stays the same in every conversation."""
    if character.card is None:
        raise FlywheelError(f"character {character.id!r} came from no card.")
    card = view(character.card)
    return _Sheet.of(card, _voice(character, card, "User")).text(())


class _Sheet(NamedTuple):
    """The character's part of the system prompt, in sections."""

    instruction: str
    description: str
    personality: str
    scenario: str
    char: str

    @classmethod
    def of(cls, card: CardData, voice: Voice) -> "_Sheet":
        original = f"You are {voice.char}."
        instruction = voice.render(card.system_prompt, original).strip() or original
        description, personality, scenario = (
            voice.render(text).strip() for text in (card.description, card.personality, card.scenario)
        )
        return cls(instruction, description, personality, scenario, voice.char)

    def text(self, lore: Sequence[Lore]) -> str:
        """The system prompt, with the lore that belongs into it at its places."""
        place: dict[str, list[str]] = {}
        for one in lore:
            if one.depth is None:
                place.setdefault(self._place(one.position), []).append(one.text)

        def at(position: str) -> list[str]:
            return place.get(position, [])

        personality = "\n".join([self.personality, *at("personality")]) if self.personality else ""
        scenario = "\n".join([self.scenario, *at("scenario")]) if self.scenario else ""
        sections = [
            self.instruction, *at("before_char"), *at("before_desc"), self.description, *at("after_desc"),
            f"{self.char}'s personality: {personality}" if personality else "",
            f"Scenario: {scenario}" if scenario else "", *at("after_char"),
        ]  # fmt: skip
        return "\n".join(section for section in sections if section)

    def _place(self, position: str) -> str:
        """A decorator that names a section which is not there is ignored."""
        missing = (position == "personality" and not self.personality) or (position == "scenario" and not self.scenario)
        return "after_char" if missing else position


def _card_prompt(
    character: Character, card: CardData, history: Sequence[ChatMessage], budget: int, count: Count, user: str
) -> list[ChatMessage]:
    last = _last_turn(history)
    voice = _voice(character, card, user, last[0].content if last else "")
    sheet = _Sheet.of(card, voice)
    orders = voice.render(card.post_history_instructions, "").strip()
    after = [ChatMessage(role="system", content=orders)] if orders else []
    fixed = [ChatMessage(role="system", content=sheet.text(())), *last, *after]
    room = _room(character, budget, fixed, count)
    lore: tuple[Lore, ...] = ()
    if card.character_book is not None and card.character_book.entries:
        scene = Scene(history, _greeting_number(history, _greetings(card, _voice(character, card, user))))
        share = budget // LORE_SHARE if card.character_book.token_budget is None else budget
        lore = lore_of(card.character_book, scene, voice, min(share, room), count)
    kept = _newest(history, room - _lore_tokens(lore), count)
    if len(kept) < len(history) and any(one.spare for one in lore):
        lore = tuple(one for one in lore if not one.spare)
        kept = _newest(history, room - _lore_tokens(lore), count)
    examples: list[ChatMessage] = []
    if len(kept) == len(history):
        used = _lore_tokens(lore) + _tokens(kept[: len(history) - len(last)], count)
        examples = _examples(card, voice, room - used, count)
    return [ChatMessage(role="system", content=sheet.text(lore)), *examples, *_with_lore(kept, lore), *after]


def _voice(character: Character, card: CardData, user: str, turn: str = "") -> Voice:
    return Voice(card.nickname.strip() or card.name, user, character.id, turn)


def _room(character: Character, budget: int, needed: Sequence[ChatMessage], count: Count) -> int:
    """The tokens that are left beside what must be there."""
    tokens = _tokens(needed, count) + REPLY_TOKENS
    if tokens > budget:
        raise PromptTooLongError(
            f"character {character.id!r} and the last message take {tokens} tokens of {budget} "
            "(server.max_prompt_tokens): shorten the message or the character, or raise the bound."
        )
    return budget - tokens


def _tokens(messages: Sequence[ChatMessage], count: Count) -> int:
    return sum(count(message.content) + MESSAGE_TOKENS for message in messages)


def _lore_tokens(lore: Sequence[Lore]) -> int:
    return sum(one.tokens for one in lore)


def _last_turn(history: Sequence[ChatMessage]) -> list[ChatMessage]:
    """From the last message of the user on; the last message where the user has said nothing."""
    at = max((n for n, message in enumerate(history) if message.role == "user"), default=len(history) - 1)
    return list(history[max(at, 0) :])


def _newest(history: Sequence[ChatMessage], room: int, count: Count) -> list[ChatMessage]:
    """The last turn, and the newest whole turns before it that fit into `room` tokens."""
    start = len(history) - len(_last_turn(history))
    kept = start
    for at in range(start - 1, -1, -1):
        room -= count(history[at].content) + MESSAGE_TOKENS
        if room < 0:
            break
        if at == 0 or history[at].role == "user":
            kept = at
    return list(history[kept:])


def _greeting_number(history: Sequence[ChatMessage], known: Sequence[str]) -> int | None:
    """Which greeting the conversation began with; None where it began otherwise."""
    first = history[0].content if history and history[0].role == "assistant" else None
    return known.index(first) if first in known else None


def _with_lore(history: list[ChatMessage], lore: Sequence[Lore]) -> list[ChatMessage]:
    """The history with the entries that have a depth, counted in messages from the end."""
    deep = [one for one in lore if one.depth is not None]
    placed: list[ChatMessage] = []
    for at in range(len(history) + 1):
        here = (one for one in deep if max(len(history) - (one.depth or 0), 0) == at)
        placed += [ChatMessage(role=one.role, content=one.text) for one in here]
        placed += history[at : at + 1]
    return placed


def _examples(card: CardData, voice: Voice, room: int, count: Count) -> list[ChatMessage]:
    """The example conversations that fit, from the first, with a line before each and before the conversation."""
    room -= count(CHAT_BEGINS) + MESSAGE_TOKENS
    found: list[ChatMessage] = []
    for block in example_turns(card, voice):
        told = [ChatMessage(role="system", content=EXAMPLE_BEGINS), *block]
        room -= _tokens(told, count)
        if room < 0:
            break
        found += told
    return [*found, ChatMessage(role="system", content=CHAT_BEGINS)] if found else []


def example_turns(card: CardData, voice: Voice) -> list[list[ChatMessage]]:
    """`mes_example` as conversations: one begins at `<START>`, a turn at a name; other lines continue it."""
    names = "|".join(re.escape(name) for name in sorted({card.name.strip(), card.nickname.strip()} - {""}))
    speaker = re.compile(
        rf"\s*(?:(?P<user>\{{\{{user\}}\}}|<user>)|(?:\{{\{{char\}}\}}|<char>|<bot>|{names}))[ \t]*:[ \t]*",
        re.IGNORECASE,
    )
    blocks = []
    for block in _START.split(card.mes_example):
        turns: list[ChatMessage] = []
        for line in block.strip().splitlines():
            said = speaker.match(line)
            role: Role = ("user" if said["user"] else "assistant") if said else (turns[-1].role if turns else "system")
            text = line[said.end() :] if said else line
            if turns and turns[-1].role == role:
                turns[-1] = ChatMessage(role=role, content=f"{turns[-1].content}\n{text}")
            else:
                turns.append(ChatMessage(role=role, content=text))
        rendered = [ChatMessage(role=one.role, content=voice.render(one.content).strip()) for one in turns]
        if any(one.content for one in rendered):
            blocks.append([one for one in rendered if one.content])
    return blocks
