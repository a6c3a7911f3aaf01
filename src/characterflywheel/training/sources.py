"""Sets of examples from files: safety, tool use, small sets for failure modes, general ability (PAPER section 4).

A file has one JSON object a line: `messages` (OpenAI's form, the last one the reply to learn), or `prompt` with
`chosen` or `completion` (TRL's forms; a text or messages). `user_id` and `character_id` are kept where they are there,
so that an erasure finds them; other keys are not read. A line that cannot be an example stops the run, with its number
and what is wrong with it.

Two small sets of our own ship with the package: `bundled:safety`, 36 unsafe requests that the cast turns down in
character, without preaching, and 43 harmless ones that look alike and are answered; `bundled:general`, 111 short
questions and instructions with their answers.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

from ..config import ExtraSource, SFTConfig
from ..errors import FlywheelError
from ..ids import derive_id
from ..pipeline import sha256_of
from ..records import ChatMessage, Dropped, Example, ExampleSource, Prompt, Role, SetAside
from ..safety.policy import SafetyPolicy
from .paths import learnt_turns

BUNDLED = Path(__file__).parent.parent / "bundled"
_REPLIES = ("chosen", "completion")
_SHOWN = 5


class Lost(NamedTuple):
    """An example that is not learnt from, why, and the source that it would have counted for."""

    source: ExampleSource
    row: Dropped

    @classmethod
    def of(cls, example: Example, reason: str, detail: str = "") -> "Lost":
        row = Dropped(id=example.id, stage="sft", reason=reason, detail=detail, prompt_id=example.prompt_id)
        return cls(example.source, row)


class Offered(NamedTuple):
    """Examples that may be learnt from, and those that may not, with the reason."""

    examples: tuple[Example, ...]
    refused: tuple[Lost, ...]


class Reserved(NamedTuple):
    """What no model may learn from: prompts that evaluate, by id and by text, their users, and those set aside."""

    prompts: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()
    users: frozenset[str] = frozenset()
    aside: frozenset[str] = frozenset()

    @classmethod
    def of(cls, prompts: Sequence[Prompt], aside: Sequence[SetAside] = ()) -> "Reserved":
        """From all prompts of a generation, of which those of the splits `evaluate` and `experiment` count."""
        held = [p for p in prompts if p.split in ("evaluate", "experiment")]
        return cls(
            frozenset(p.id for p in held), frozenset(text_of(p.messages) for p in held),
            frozenset(p.user_id for p in held), frozenset(row.user_id for row in aside),
        )  # fmt: skip

    def why(self, example: Example) -> str | None:
        """Why an example must not be learnt from; None where it may be."""
        if example.prompt_id in self.prompts or text_of(example.messages[:-1]) in self.texts:
            return "evaluation_prompt"
        if example.user_id in self.users:
            return "evaluation_user"
        return "set_aside" if example.user_id in self.aside else None


def text_of(messages: Sequence[ChatMessage]) -> str:
    """A conversation as one text for comparing: roles and words; case, spaces and how accents are encoded aside."""
    return "\n".join(f"{m.role}: {' '.join(_folded(m.content).split())}" for m in messages)


def _folded(text: str) -> str:
    """Equal for canonical caseless matches (The Unicode Standard, definition D145)."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", text).casefold())


def offer(
    config: SFTConfig, examples: Sequence[Example], reserved: Reserved = Reserved(),
    safety: SafetyPolicy = SafetyPolicy(),
) -> Offered:  # fmt: skip
    """These examples and those of the files whose source has a weight, less what must not be learnt.

    That is what `reserved` names, and examples with a reply to learn that safety refuses: any reply in files, and the
    earlier ones of ours where all are learnt (their last was judged when it was selected).

    Raises:
        FlywheelError: a file is missing, or lines of it are no examples: the first five are named.
    """
    kept: list[Example] = []
    refused: list[Lost] = []
    loaded = [example for one in wanted(config) for example in read(path_of(one.file), one.source)]
    for number, example in enumerate((*examples, *loaded)):
        if why := reserved.why(example):
            refused.append(Lost.of(example, why))
            continue
        own_last = len(example.messages) - 1 if number < len(examples) else None
        turns = [turn for turn in learnt_turns(example.messages, config.learn) if turn != own_last]
        if detail := _unsafe(safety, example, turns):
            refused.append(Lost.of(example, "unsafe", detail))
            continue
        kept.append(example)
    return Offered(tuple(kept), tuple(refused))


def _unsafe(safety: SafetyPolicy, example: Example, turns: Sequence[int]) -> str | None:
    """What safety has against the first of these replies that it refuses; an earlier one is named by its place."""
    for turn in turns:
        verdict = safety.check_answer(example.messages[:turn], example.messages[turn].content)
        if not verdict.allowed:
            place = "" if turn == len(example.messages) - 1 else f"message {turn}: "
            return place + ", ".join(verdict.categories)
    return None


def settings(config: SFTConfig) -> SFTConfig:
    """The stage's settings as part of its identity: files that count by their content, not by where they lie."""
    return config.model_copy(
        update={
            "extra": tuple(one.model_copy(update={"file": sha256_of(path_of(one.file))[:12]}) for one in wanted(config))
        }
    )


def wanted(config: SFTConfig) -> list[ExtraSource]:
    """The files whose source has a weight."""
    return [one for one in config.extra if config.weights.get(one.source, 0.0) > 0]


def path_of(file: str) -> Path:
    """Where a configured file lies. Raises FlywheelError where it does not."""
    name = file.removeprefix("bundled:")
    path = BUNDLED / f"{name}.jsonl" if file.startswith("bundled:") else Path(file).expanduser()
    if not path.is_file():
        there = ", ".join(f"bundled:{found.stem}" for found in sorted(BUNDLED.glob("*.jsonl")))
        raise FlywheelError(
            f"sft.extra: there is no file {str(path.absolute())!r}: give a path to JSON lines, or one of {there}."
        )
    return path


def read(path: Path, source: ExampleSource) -> list[Example]:
    """One file's examples, in its order.

    Raises:
        FlywheelError: lines are no examples; their numbers and what is wrong with them.
    """
    examples, problems = [], []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                examples.append(_example(json.loads(line.decode("utf-8")), source))
            except UnicodeDecodeError:
                problems.append(f"line {number}: is not UTF-8")
            except json.JSONDecodeError as error:
                problems.append(f"line {number}: is not JSON ({error.msg} at column {error.colno})")
            except _NoExample as error:
                problems.append(f"line {number}: {error}")
    if not examples and not problems:
        raise FlywheelError(f"{path} has no example: write one JSON object a line, or take it out of sft.extra.")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise FlywheelError(
            f"{path}: {len(problems)} of {len(lines)} lines are no examples: {'; '.join(problems[:_SHOWN])}{more}. "
            "Mend them or take them out."
        )
    return examples


class _NoExample(Exception):  # noqa: N818 - what is wrong with a line, said in its message
    """A line that cannot be learnt from."""


def _example(value: object, source: ExampleSource) -> Example:
    if not isinstance(value, dict):
        raise _NoExample("is no JSON object")
    messages = tuple(_conversation(value))
    if messages[-1].role != "assistant" or not messages[-1].content.strip():
        raise _NoExample("the last message must be the assistant's, with the reply to learn")
    if not any(message.role == "user" for message in messages[:-1]):
        raise _NoExample("no message of the user comes before the reply")
    if any(message.role == "system" for message in messages[1:]):
        raise _NoExample("a system message must be the first")
    score = value.get("score")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise _NoExample(f"score = {score!r} must be a number")
    named = {key: value.get(key) for key in ("user_id", "character_id")}
    for key, name in named.items():
        if name is not None and not isinstance(name, str):
            raise _NoExample(f"{key} = {name!r} must be a text")
    digests = [hashlib.sha256(repr(part).encode()).hexdigest() for part in (messages[:-1], messages)]
    return Example(
        id=derive_id("example", source, digests[1]), prompt_id=derive_id("prompt of a file", digests[0]),
        user_id=named["user_id"], character_id=named["character_id"], source=source, messages=messages, score=score,
    )  # fmt: skip


def _conversation(value: dict[str, object]) -> Iterator[ChatMessage]:
    """The messages of a line in any of the known forms."""
    reply = next((key for key in _REPLIES if key in value), None)
    if "messages" in value:
        yield from _messages(value["messages"], "messages", "user")
    elif reply is None:
        raise _NoExample(
            f"has neither messages nor prompt with chosen or completion, but {', '.join(value) or 'nothing'}"
        )
    else:
        if "prompt" in value:
            yield from _messages(value["prompt"], "prompt", "user")
        yield from _messages(value[reply], reply, "assistant")


def _messages(value: object, where: str, role: Role) -> Iterator[ChatMessage]:
    """Messages, or one of this role where `value` is a plain text."""
    if isinstance(value, str):
        yield ChatMessage(role=role, content=value)
        return
    if not isinstance(value, list) or not value:
        raise _NoExample(f"{where} must be a text or a list of messages")
    for number, message in enumerate(value):
        place = f"{where}[{number}]"
        if not isinstance(message, dict):
            raise _NoExample(f"{place} is no message with role and content")
        if message.get("role") not in get_args(Role):
            raise _NoExample(f"{place}.role = {message.get('role')!r} must be one of {', '.join(get_args(Role))}")
        if not isinstance(message.get("content"), str):
            raise _NoExample(f"{place}.content must be a text")
        for key in message.keys() - {"role", "content"}:
            if message[key]:
                raise _NoExample(f"{place} has {key}: write into content what the model should write")
        yield ChatMessage(role=message["role"], content=message["content"])
