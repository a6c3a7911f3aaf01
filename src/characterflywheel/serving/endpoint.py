"""Replies from any OpenAI-compatible server, vLLM among them (DESIGN section 6): chat completions and their stream."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from ..llm.base import Sampling
from ..records import ChatMessage, Finish
from .replies import BackendError, Chunk, Reply
from .upstream import LEFTOVER_S, Upstream

_FINISH: dict[object, Finish] = {"length": "length", "content_filter": "error"}
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)


class Endpoint:
    """One of a server's models (`Backend` Protocol); `name` is the model's name there."""

    def __init__(self, name: str, upstream: Upstream) -> None:
        self.name, self._upstream = name, upstream

    async def complete(self, messages: Sequence[ChatMessage], sampling: Sampling, seed: int, n: int = 1) -> list[Reply]:
        """See `Backend.complete`. A server that knows no `n`, and so sends fewer, is asked again for the rest."""
        replies: list[Reply] = []
        while len(replies) < n:
            body = self._body(messages, sampling, seed + len(replies), n=n - len(replies))
            replies += self._replies(await self._upstream.whole(await self._upstream.chat(body)))
        return replies[:n]

    async def stream(
        self, messages: Sequence[ChatMessage], sampling: Sampling, seed: int
    ) -> AsyncGenerator[Chunk, None]:
        """See `Backend.stream`. Events that arrive together are one piece."""
        response = await self._upstream.chat(self._body(messages, sampling, seed, stream=True))
        if response.content_type != "text/event-stream":  # a server that does not stream
            yield Chunk(*self._replies(await self._upstream.whole(response))[0])
            return
        told, rest = _Told(), b""
        async with contextlib.aclosing(self._upstream.blocks(response)) as blocks:
            async for block in blocks:
                *lines, rest = (rest + block).split(b"\n")
                if text := self._text(lines, told):
                    yield Chunk(text)
                if told.error:
                    raise told.error
                if told.done:
                    await _end(response)
                    break
        if text := self._text([rest], told):
            yield Chunk(text)
        if not told.done and told.finish is None:
            raise told.error or self._upstream.trouble(aiohttp.ClientPayloadError("the stream stopped before its end"))
        yield Chunk("", told.finish or "stop", told.prompt_tokens, told.completion_tokens)

    async def ready(self) -> None:
        """Ask the server for its models; where it lists some, this one must be among them."""
        listed = await self._upstream.models()
        try:
            names = [str(model["id"]) for model in json.loads(listed)["data"]] if listed else []
        except _UNREADABLE:
            raise self._upstream.garbage(listed) from None
        if names and self.name not in names:
            raise BackendError(
                f"the model server has no model {self.name!r}, it has {', '.join(names[:5])}: serve it there, or set "
                "server.endpoint_model.",
                status=503, code="model_missing",
            )  # fmt: skip

    async def close(self) -> None:
        """The connections belong to the `Upstream`."""

    def _body(
        self, messages: Sequence[ChatMessage], sampling: Sampling, seed: int, *, n: int = 1, stream: bool = False
    ) -> bytes:
        body: dict[str, object] = {
            "model": self.name, "messages": [{"role": m.role, "content": m.content} for m in messages],
            "temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_tokens,
            "seed": seed % 2**31,  # some servers keep it in 32 bits
        }  # fmt: skip
        if n > 1:
            body["n"] = n
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(body).encode()

    def _replies(self, said: bytes) -> list[Reply]:
        """The drafts of a whole answer. Tokens are counted for all of them together, so several have no count each."""
        try:
            answer = json.loads(said)
            choices, usage = answer["choices"], answer.get("usage") or {}
            written = _count(usage.get("completion_tokens")) if len(choices) == 1 else None
            replies = [
                Reply(
                    str(choice["message"]["content"] or ""), _FINISH.get(choice.get("finish_reason"), "stop"),
                    _count(usage.get("prompt_tokens")), written,
                )
                for choice in choices
            ]  # fmt: skip
        except _UNREADABLE:
            raise self._upstream.garbage(said) from None
        if not replies:
            raise self._upstream.garbage(said)
        return replies

    def _text(self, lines: Sequence[bytes], told: "_Told") -> str:
        """The text of a stream's lines; it ends where one is an error, which goes into `told`."""
        texts = []
        for line in lines:
            if line.startswith(b"data:"):
                try:
                    texts.append(self._event(line, told))
                except BackendError as error:
                    told.error = error
                    break
        return "".join(texts)

    def _event(self, line: bytes, told: "_Told") -> str:
        """The text of one event of a stream; what else it says goes into `told`."""
        data = line[5:].strip()
        if data == b"[DONE]":
            told.done = True
            return ""
        try:
            event: dict[str, Any] = json.loads(data)
            if "error" in event:
                raise self._upstream.failed(event["error"])
            if usage := event.get("usage"):
                told.prompt_tokens = _count(usage.get("prompt_tokens"))
                told.completion_tokens = _count(usage.get("completion_tokens"))
            if not event["choices"]:
                return ""
            choice = event["choices"][0]
            if (reason := choice.get("finish_reason")) is not None:
                told.finish = _FINISH.get(reason, "stop")
            return str((choice.get("delta") or {}).get("content") or "")
        except _UNREADABLE:
            raise self._upstream.garbage(data) from None


@dataclass
class _Told:
    """What a stream has said beside its text. `done`: its last event has come."""

    finish: Finish | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    done: bool = False
    error: BackendError | None = None


def _count(said: object) -> int | None:
    return said if isinstance(said, int) else None


async def _end(response: aiohttp.ClientResponse) -> None:
    """Read the empty end of an answer, so that its connection can be used again; it mostly has come already."""
    if response.content.at_eof():
        return
    with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
        async with asyncio.timeout(LEFTOVER_S):
            while await response.content.readany():
                pass
