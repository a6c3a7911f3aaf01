"""What asking a model costs the chat service itself: processor time of our side for one request, beside `openai`'s.

    python benchmarks/backends.py [--requests 600] [--words 24] [--messages 8] [--json FILE]

The model server is `mock_upstream.py` in a process of its own, so its time is not counted. Contenders take turns, eight
requests at once; the figures are microseconds of user and system time for one request, the median over rounds.
"""

import argparse
import asyncio
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import uvloop

from characterflywheel.config import ServerConfig
from characterflywheel.llm.base import Sampling
from characterflywheel.records import ChatMessage
from characterflywheel.serving.backends import Backend, Guarded
from characterflywheel.serving.echo import Echo
from characterflywheel.serving.endpoint import Endpoint
from characterflywheel.serving.upstream import Upstream

AT_ONCE = 8
Ask = Callable[[], Awaitable[Any]]


def contenders(
    address: str, upstream: Upstream, client: openai.AsyncOpenAI, args: argparse.Namespace
) -> dict[str, Ask]:
    """One request each; all send the same."""
    history = [ChatMessage(role="user", content="Tell me about the sea and the people on it.")] * (args.messages - 1)
    messages = [ChatMessage(role="system", content="You are Mo: dry, kind and brief. " * 10), *history]
    sampling, server = Sampling(max_tokens=4 * args.words), ServerConfig()
    plain = {
        "model": "mock", "messages": [m.model_dump() for m in messages], "temperature": 1.0, "top_p": 1.0,
        "max_tokens": 4 * args.words, "seed": 1,
    }  # fmt: skip

    def whole(backend: Backend) -> Ask:
        return lambda: backend.complete(messages, sampling, 1)

    def streamed(backend: Backend) -> Ask:
        async def ask() -> None:
            async for _ in backend.stream(messages, sampling, 1):
                pass

        return ask

    async def openai_stream() -> None:
        stream = await client.chat.completions.create(**plain, stream=True, stream_options={"include_usage": True})
        async for _ in stream:
            pass

    echo, endpoint = Echo(), Endpoint("mock", upstream)
    return {
        "echo": whole(echo), "echo, guarded": whole(Guarded(echo, server)),
        "echo, guarded, streamed": streamed(Guarded(echo, server)),
        "endpoint": whole(endpoint), "endpoint, guarded": whole(Guarded(endpoint, server)),
        "endpoint, streamed": streamed(endpoint),
        "endpoint, guarded, streamed": streamed(Guarded(endpoint, server)),
        "openai": lambda: client.chat.completions.create(**plain), "openai, streamed": openai_stream,
    }  # fmt: skip


async def microseconds(ask: Ask, requests: int) -> float:
    numbers = iter(range(requests))

    async def one_after_the_other() -> None:
        for _ in numbers:
            await ask()

    began = time.process_time()
    await asyncio.gather(*[one_after_the_other() for _ in range(AT_ONCE)])
    return (time.process_time() - began) / requests * 1e6


async def measure(address: str, args: argparse.Namespace) -> dict[str, list[float]]:
    upstream, client = Upstream(address), openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0)
    asks = contenders(address, upstream, client, args)
    spent: dict[str, list[float]] = {name: [] for name in asks}
    for repeat in range(-1, args.repeats):
        for name, ask in asks.items():
            figure = await microseconds(ask, args.requests)
            if repeat >= 0:
                spent[name].append(figure)
    await upstream.close()
    await client.close()
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=600, help="of each contender in a round")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--words", type=int, default=24, help="of a reply; a stream has as many events")
    parser.add_argument("--messages", type=int, default=8, help="of a request")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    mock = [sys.executable, str(Path(__file__).with_name("mock_upstream.py")), "--words", str(args.words)]
    with subprocess.Popen(mock, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            address = server.stdout.readline().removeprefix("listening on ").strip()
            spent = uvloop.run(measure(address, args))
        finally:
            server.terminate()
    for name, figures in spent.items():
        print(f"{name:28} {statistics.median(figures):7.0f} us   ({min(figures):.0f} to {max(figures):.0f})")
    if args.json:
        about = {"requests": args.requests, "words": args.words, "python": platform.python_version()}
        args.json.write_text(json.dumps({**about, "microseconds": spent}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
