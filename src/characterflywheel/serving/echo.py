"""A backend without a model: it says the last user message back (for load tests, demonstrations and set-up)."""

import re
from collections.abc import AsyncGenerator, Sequence

from ..llm.base import Sampling
from ..records import ChatMessage, Finish
from .replies import Chunk, Reply

_WORD = re.compile(r"\S+\s*")


class Echo:
    """Repeats the last user message, at most `max_tokens` words of it. It counts no tokens, as it has none."""

    def __init__(self, name: str = "echo") -> None:
        self.name = name

    async def complete(self, messages: Sequence[ChatMessage], sampling: Sampling, seed: int, n: int = 1) -> list[Reply]:
        words, finish = _said(messages, sampling.max_tokens)
        return [Reply("".join(words), finish)] * n

    async def stream(
        self, messages: Sequence[ChatMessage], sampling: Sampling, seed: int
    ) -> AsyncGenerator[Chunk, None]:
        words, finish = _said(messages, sampling.max_tokens)
        for word in words:
            yield Chunk(word)
        yield Chunk("", finish)

    async def ready(self) -> None:
        """Always ready."""

    async def close(self) -> None:
        """Nothing is held."""


def _said(messages: Sequence[ChatMessage], limit: int) -> tuple[list[str], Finish]:
    text = next((m.content for m in reversed(messages) if m.role == "user"), "")
    words = _WORD.findall(text.strip())
    return (words, "stop") if len(words) <= limit else (words[:limit], "length")
