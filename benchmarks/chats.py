"""Real chats between people (chitchat-dataset, MIT) as examples and pairs to train on, for measurements of speed."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from characterflywheel.characters import bundled_characters, system_prompt
from characterflywheel.records import ChatMessage, Example, Preference

TURNS = (2, 4, 6, 8)
ROLES = ("user", "assistant")


def examples(count: int, *, shared: bool, seed: int = 0) -> list[Example]:
    """Histories of one to seven messages and a reply. `shared`: under one of our characters' system prompts; else each
    has a system prompt of its own, so that no two begin alike."""
    made = list(_windows(count, seed))
    return [
        Example(
            id=f"e{i:05}", prompt_id=f"p{i:05}", user_id=f"u{i:05}", character_id=None, source="user",
            messages=(_system(i, shared), *_messages(texts)),
        )
        for i, texts in enumerate(made)
    ]  # fmt: skip


def pairs(count: int, copies: int, seed: int = 0) -> list[Preference]:
    """Pairs whose rejected reply is another chat's; `copies` of each, which DPO takes one after the other."""
    made = list(_windows(count, seed))
    return [
        Preference(
            id=f"d{i:05}-{copy:02}", prompt_id=f"p{i:05}", user_id=f"u{i:05}", character_id="someone", source="user",
            prompt=(_system(i, False), *_messages(texts)[:-1]),
            chosen=(ChatMessage(role="assistant", content=texts[-1]),),
            rejected=(ChatMessage(role="assistant", content=made[i - 1][-1]),),
            chosen_policy="a", rejected_policy="b", reviewers=1, label=1.0,
        )
        for copy in range(copies) for i, texts in enumerate(made)
    ]  # fmt: skip


def _windows(count: int, seed: int) -> Iterator[list[str]]:
    """The texts of stretches of chats, no two chats the same; the last has four words at least."""
    import chitchat_dataset  # type: ignore[import-untyped]  # noqa: PLC0415 - only measurements need it

    kept = json.loads(Path(chitchat_dataset.__file__).with_name("dataset.json").read_text(encoding="utf-8"))
    draw = random.Random(seed)
    names = sorted(kept)
    draw.shuffle(names)
    found = 0
    for name in names:
        turns = [" ".join(part["text"].strip() for part in turn).strip() for turn in kept[name]["messages"]]
        size = draw.choice(TURNS)
        if len(turns) < size or not all(turns[:size]) or len(turns[size - 1].split()) < 4:
            continue
        yield turns[:size]
        found += 1
        if found == count:
            return
    raise SystemExit(f"the chats give {found} examples, {count} are wanted.")


def _messages(texts: Sequence[str]) -> tuple[ChatMessage, ...]:
    return tuple(ChatMessage(role=ROLES[i % 2], content=text) for i, text in enumerate(texts))


def _system(number: int, shared: bool) -> ChatMessage:
    who = sorted(bundled_characters().items())
    text = system_prompt(who[number % len(who)][1]) if shared else f"{number} is your name. You like to chat."
    return ChatMessage(role="system", content=text)
