"""An OpenAI-compatible model server without a model: quick, or as slow and broken as asked.

    python benchmarks/mock_upstream.py --port 8001 --first 0.05 --piece 0.01 --words 24 [--mode MODE]

`/v1/chat/completions` (streaming and not, `n` drafts), `/v1/models`, and `/stats`: what came, what was left by the
client, the last body. A request overrides any setting in its model's name: `mock?mode=hang&first=0.5`. Modes:

    ok         answers                            status:N   answers with HTTP status N (429: Retry-After 7)
    hang       never answers                      reset      drops the connection without an answer
    crash      drops the connection half-way      garbage    answers 200 with a page of HTML
    truncated  ends the reply before its end      failing    sends an error event in the middle of a stream
    unusable   JSON of another shape              refused:K  drops the first K requests, then answers
"""

import argparse
import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from itertools import cycle, islice
from urllib.parse import parse_qsl

from aiohttp import web

SAID = "The lamp is lit and the sea is calm tonight so sit with me a while and tell me what brought you here ."


@dataclass(frozen=True)
class Settings:
    """`first` and `piece` are seconds: before the reply begins, and between its pieces."""

    mode: str = "ok"
    first: float = 0.0
    piece: float = 0.0
    words: int = 24

    def overridden(self, model: str) -> "Settings":
        """These settings with those in a model's name, `mock?mode=hang&first=0.5`."""
        asked = dict(parse_qsl(model.partition("?")[2]))
        return replace(self, **{k: type(getattr(self, k))(v) for k, v in asked.items()}) if asked else self

    @property
    def pieces(self) -> list[str]:
        said = list(islice(cycle(SAID.split()), self.words))
        return [said[0], *(f" {word}" for word in said[1:])] if said else []


class Mock:
    """The server's state. `counts` are requests by mode, and `left` those whose client did not wait."""

    def __init__(self, settings: Settings = Settings(), models: tuple[str, ...] = ("mock",)) -> None:
        self.settings, self.models = settings, models
        self.counts: Counter[str] = Counter()
        self.last: dict[str, object] = {}
        self.headers: dict[str, str] = {}

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_get("/v1/models", self.list_models)
        app.router.add_get("/stats", self.stats)
        return app

    async def list_models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": m, "object": "model"} for m in self.models]})

    async def stats(self, request: web.Request) -> web.Response:
        return web.json_response({"counts": self.counts, "last": self.last})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.last, self.headers = body, dict(request.headers)
        now = self.settings.overridden(body.get("model", ""))
        self.counts[now.mode] += 1
        try:
            return await self._answer(request, body, now)
        except (asyncio.CancelledError, ConnectionResetError):
            self.counts["left"] += 1
            raise

    async def _answer(self, request: web.Request, body: dict[str, object], now: Settings) -> web.StreamResponse:
        kind, _, argument = now.mode.partition(":")
        if kind == "hang":
            await asyncio.sleep(3600)
        if kind == "reset" or (kind == "refused" and self.counts[now.mode] <= int(argument)):
            return _drop(request)
        if now.first:
            await asyncio.sleep(now.first)
        if kind in ("status", "garbage", "unusable"):
            return _refusal(kind, argument)
        if body.get("stream"):
            return await self._stream(request, body, now, kind)
        if now.piece:
            await asyncio.sleep(now.piece * now.words)
        whole = json.dumps(self._whole(body, now)).encode()
        if kind in ("crash", "truncated"):
            response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "9999"})
            await response.prepare(request)
            await response.write(whole[: len(whole) // 2])
            return _drop(request)
        return web.Response(body=whole, content_type="application/json")

    def _whole(self, body: dict[str, object], now: Settings) -> dict[str, object]:
        text, n = "".join(now.pieces), int(str(body.get("n") or 1))
        return {
            "id": f"chatcmpl-{time.time_ns():x}", "object": "chat.completion", "created": int(time.time()),
            "model": body.get("model"), "usage": self._usage(body, now, n),
            "choices": [
                {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
                for i in range(n)
            ],
        }  # fmt: skip

    def _usage(self, body: dict[str, object], now: Settings, n: int = 1) -> dict[str, int]:
        messages = body.get("messages")
        asked = sum(len(m["content"].split()) for m in messages) if isinstance(messages, list) else 0
        return {"prompt_tokens": asked, "completion_tokens": n * now.words, "total_tokens": asked + n * now.words}

    async def _stream(
        self, request: web.Request, body: dict[str, object], now: Settings, kind: str
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        head = {
            "id": f"chatcmpl-{time.time_ns():x}", "object": "chat.completion.chunk", "created": int(time.time()),
            "model": body.get("model"),
        }  # fmt: skip

        async def send(choices: list[dict[str, object]], **more: object) -> None:
            await response.write(f"data: {json.dumps(head | {'choices': choices} | more)}\n\n".encode())

        await send([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        for number, piece in enumerate(now.pieces):
            if number and now.piece:
                await asyncio.sleep(now.piece)
            if number == now.words // 2 and kind in ("crash", "truncated", "failing"):
                if kind == "crash":
                    return _drop(request)
                if kind == "failing":
                    await response.write(b'data: {"error": {"message": "out of memory", "type": "server_error"}}\n\n')
                await response.write_eof()
                return response
            await send([{"index": 0, "delta": {"content": piece}, "finish_reason": None}])
        await send([{"index": 0, "delta": {}, "finish_reason": "stop"}])
        options = body.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage"):
            await send([], usage=self._usage(body, now))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


def _refusal(kind: str, argument: str) -> web.Response:
    if kind == "garbage":
        return web.Response(text="<html><body>Bad luck</body></html>", content_type="text/html")
    if kind == "unusable":
        return web.json_response({"object": "chat.completion", "choices": "none"})
    headers = {"Retry-After": "7"} if argument == "429" else {}
    error = {"message": f"you asked for {argument}", "type": "mock", "code": None}
    return web.json_response({"error": error}, status=int(argument), headers=headers)


def _drop(request: web.Request) -> web.StreamResponse:
    if request.transport:
        request.transport.abort()
    return web.Response()


@contextlib.asynccontextmanager
async def serving(mock: Mock, port: int = 0) -> AsyncIterator[str]:
    """Serve in this event loop; gives the base address. A request is cancelled when its client leaves."""
    runner = web.AppRunner(mock.app(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", port, backlog=2048)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="a free one if absent; the address is printed")
    parser.add_argument("--first", type=float, default=0.0, help="seconds before a reply begins")
    parser.add_argument("--piece", type=float, default=0.0, help="seconds between its words")
    parser.add_argument("--words", type=int, default=24)
    parser.add_argument("--mode", default="ok")
    parser.add_argument("--models", nargs="+", default=["mock"], help="what /v1/models lists")
    args = parser.parse_args()
    mock = Mock(Settings(args.mode, args.first, args.piece, args.words), tuple(args.models))
    async with serving(mock, args.port) as address:
        print(f"listening on {address}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    import uvloop

    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(main())
