"""From messages to token segments: the model's own chat template, split where prefixes are shared."""

import re
from collections.abc import Sequence
from typing import Any

from ..errors import FlywheelError
from ..records import ChatMessage
from .base import Completion
from .shared_prefix import Segment

HEADS = 1024
"""System prompts whose tokens are kept, those used last; a service may be sent another one with every request."""


class ChatFormat:
    """Tokenises conversations with a tokenizer's chat template; long histories lose their oldest turns."""

    def __init__(self, tokenizer: Any, max_prompt_tokens: int) -> None:
        if not tokenizer.chat_template:
            raise FlywheelError("the model's tokenizer has no chat template: add `chat_template` to its folder.")
        self.tokenizer, self.max_prompt_tokens = tokenizer, max_prompt_tokens
        self._cache: dict[tuple[ChatMessage, ...], Segment] = {}
        special = sorted(set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab()), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    def prompt(self, messages: Sequence[ChatMessage]) -> tuple[Segment, Segment]:
        """The system prompt's tokens, and the rest up to where the assistant's reply begins.

        When both are longer than `max_prompt_tokens`, the oldest turns go first, the system prompt never; a last
        message that alone is too long loses its beginning.
        """
        messages = tuple(messages)
        system = messages[:1] if messages and messages[0].role == "system" else ()
        turns = messages[len(system) :]
        head = self._head(system) if system else ()
        if self.max_prompt_tokens - len(head) < 16:
            raise FlywheelError(
                f"the system prompt has {len(head)} tokens, the limit for prompts is {self.max_prompt_tokens}: "
                "shorten the character or raise max_prompt_tokens."
            )
        while True:
            ids = self._render((*system, *turns))
            # a greeting first, or white space that merges with what stands before it, shares less than the head
            same = _common_prefix(head, ids)
            if len(ids) <= self.max_prompt_tokens:
                return ids[:same], ids[same:]
            if len(turns) <= 1:
                return ids[:same], ids[same - self.max_prompt_tokens :]
            turns = turns[2:] if len(turns) > 2 else turns[1:]

    def shortest(self, messages: Sequence[ChatMessage]) -> int:
        """Tokens of the system prompt and the last message alone: above `max_prompt_tokens`, `prompt` cuts into it."""
        system = tuple(messages[:1]) if len(messages) > 1 and messages[0].role == "system" else ()
        return len(self._render((*system, *messages[-1:])))

    def reply(self, text: str) -> Segment:
        """A reply's tokens, with the end-of-turn token that the model must learn to say."""
        ids = self.tokenizer(self._harmless(text), add_special_tokens=False)["input_ids"]
        return (*ids, self.tokenizer.eos_token_id)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def completion(
        self, ids: Sequence[int], logprobs: Sequence[float], ends: frozenset[int] = frozenset()
    ) -> Completion:
        """A sampled reply; without the end token's text where it ended by itself (the tokenizer's or one of `ends`)."""
        stopped = bool(ids) and ids[-1] in ends | {self.tokenizer.eos_token_id}
        text = self.decode(ids[:-1] if stopped else ids).strip()
        return Completion(text, tuple(ids), tuple(logprobs), "stop" if stopped else "length")

    def _head(self, system: tuple[ChatMessage, ...]) -> Segment:
        """The tokens common to every conversation under this system prompt."""
        head = self._cache.pop(system, None)
        if head is None:
            one, two = (self._render((*system, ChatMessage(role="user", content=c))) for c in ("a", "1"))
            head = one[: _common_prefix(one, two)]
            for oldest in list(self._cache)[: max(0, len(self._cache) - HEADS + 1)]:
                self._cache.pop(oldest, None)
        self._cache[system] = head  # the newest is the last
        return head

    def _harmless(self, text: str) -> str:
        """Text that cannot speak for another role: a control token written out by a person is broken by a space."""
        return self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def _render(self, messages: Sequence[ChatMessage]) -> Segment:
        plain = [{"role": m.role, "content": self._harmless(m.content)} for m in messages]
        ids = self.tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
        return tuple(ids)


def _common_prefix(one: Segment, two: Segment) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
