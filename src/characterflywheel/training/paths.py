"""Examples and preference pairs as token paths: what a learner sees of a conversation (PAPER section 4).

A path is a prompt and a reply to learn. Long histories lose their oldest turns, as when the model serves; what cannot
be shown even then is dropped and named. Replies longer than the bound are learnt up to it, without their end.
"""

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path as FilePath
from typing import Literal, NamedTuple

from ..errors import FlywheelError
from ..llm.chat_format import ChatFormat
from ..llm.shared_prefix import Path, Segment
from ..records import ChatMessage, Dropped, Example, Preference

Learn = Literal["last", "all"]
Packed = tuple["array[int]", ...]


class Lesson(NamedTuple):
    """The paths of one example or pair, four bytes a token until they are needed; how many of its replies were cut."""

    packed: tuple[Packed, ...]
    cut: int

    @property
    def paths(self) -> list[Path]:
        return [tuple(tuple(segment) for segment in path) for path in self.packed]

    @property
    def longest(self) -> int:
        """Tokens of its longest path."""
        return max(sum(map(len, path)) for path in self.packed)

    @property
    def tokens(self) -> int:
        """Reply tokens, which are learnt."""
        return sum(len(path[-1]) for path in self.packed)


class Tokenised(NamedTuple):
    """Lessons by the id of their example or pair, and what could not be shown."""

    lessons: dict[str, Lesson]
    dropped: tuple[Dropped, ...]

    @property
    def cut(self) -> int:
        """Replies that were longer than the bound."""
        return sum(lesson.cut for lesson in self.lessons.values())


def open_format(folder: FilePath, max_prompt_tokens: int) -> ChatFormat:
    """The chat format of a model folder, without its weights."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - takes seconds

    return ChatFormat(AutoTokenizer.from_pretrained(folder), max_prompt_tokens)


def of_examples(form: ChatFormat, examples: Sequence[Example], learn: Learn, max_reply_tokens: int) -> Tokenised:
    """The last reply of every example, or with "all" each assistant message that answers a user.

    A turn whose own message does not fit the window under its system prompt is dropped, and with "last" its example.
    An earlier turn that is the last of another example, or is in several of one conversation, is learnt once.
    """
    shown: list[tuple[list[_Turn], _Turn | None]] = []
    dropped = []
    for example in examples:
        numbers = learnt_turns(example.messages, learn)
        if not numbers:
            dropped.append(Dropped(id=example.id, stage="sft", reason="no_reply", prompt_id=example.prompt_id))
        turns: list[_Turn | None] = []
        for number in numbers:
            prompt = in_window(form, example.messages[:number])
            if isinstance(prompt, str):
                dropped.append(_dropped(example, "sft", f"message {number}: {prompt}"))
                turns.append(None)
                continue
            reply, cut = _reply(form, example.messages[number], max_reply_tokens)
            turns.append(_Turn(_packed((*prompt, reply)), cut))
        shown.append(([turn for turn in turns[:-1] if turn], turns[-1] if turns else None))
    taken = {last.key for _, last in shown if last} if learn == "all" else set()
    lessons = {}
    for example, (earlier, last) in zip(examples, shown, strict=True):
        new = {turn.key: turn for turn in earlier if turn.key not in taken}
        taken |= new.keys()
        if mine := [*new.values(), *((last,) if last else ())]:
            lessons[example.id] = Lesson(tuple(turn.packed for turn in mine), sum(turn.cut for turn in mine))
    return Tokenised(lessons, tuple(dropped))


def learnt_turns(messages: Sequence[ChatMessage], learn: Learn) -> list[int]:
    """The places of the replies to learn: of the last message, or of each of the assistant's that answers a user."""
    if learn == "last":
        return [len(messages) - 1]
    roles = [message.role for message in messages]
    return [i for i in range(1, len(roles)) if (roles[i - 1], roles[i]) == ("user", "assistant")]


class _Turn(NamedTuple):
    packed: Packed
    cut: bool

    @property
    def key(self) -> tuple[bytes, ...]:
        return tuple(segment.tobytes() for segment in self.packed)


def of_pairs(form: ChatFormat, pairs: Sequence[Preference], max_reply_tokens: int) -> Tokenised:
    """Two paths a pair: the chosen reply and the rejected one. A pair whose prompt does not fit is dropped."""
    lessons, dropped = {}, []
    for pair in pairs:
        prompt = in_window(form, pair.prompt)
        if isinstance(prompt, str):
            dropped.append(_dropped(pair, "dpo", prompt))
            continue
        replies = [_reply(form, side[-1], max_reply_tokens) for side in (pair.chosen, pair.rejected)]
        lessons[pair.id] = Lesson(
            tuple(_packed((*prompt, reply)) for reply, _ in replies), sum(cut for _, cut in replies)
        )
    return Tokenised(lessons, tuple(dropped))


def check_room(folder: FilePath, section: Literal["sft", "dpo"], lessons: Iterable[Lesson]) -> None:
    """Make sure that the model of this folder has a position for every token that it is to learn from.

    What counts is how long the lessons are, not the bounds, which are often far above them.

    Raises:
        FlywheelError: a prompt with its reply is longer than the model's context.
    """
    from transformers import AutoConfig  # noqa: PLC0415 - takes seconds

    room = AutoConfig.from_pretrained(folder).max_position_embeddings
    if (longest := max((lesson.longest for lesson in lessons), default=0)) > room:
        raise FlywheelError(
            f"{section}: a prompt with its reply has {longest} tokens, must be <= {room}, the model's longest context: "
            f"lower {section}.max_prompt_tokens or {section}.max_reply_tokens to at most {room} together."
        )


def in_window(form: ChatFormat, messages: Sequence[ChatMessage]) -> tuple[Segment, Segment] | str:
    """The prompt's segments, or why it cannot be shown."""
    try:
        prompt = form.prompt(messages)
    except FlywheelError as error:  # a system prompt that leaves no room
        return str(error)
    if sum(map(len, prompt)) == form.max_prompt_tokens and (size := form.shortest(messages)) > form.max_prompt_tokens:
        return f"{size} tokens with its system prompt, max_prompt_tokens is {form.max_prompt_tokens}"
    return prompt


def _reply(form: ChatFormat, message: ChatMessage, most: int) -> tuple[Segment, bool]:
    reply = form.reply(message.content)
    return reply[:most], len(reply) > most


def _dropped(row: Example | Preference, stage: str, detail: str) -> Dropped:
    return Dropped(id=row.id, stage=stage, reason="longer_than_window", detail=detail, prompt_id=row.prompt_id)


def _packed(path: Path) -> Packed:
    return tuple(array("i", segment) for segment in path)
