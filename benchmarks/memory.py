"""Whether the chat service's memory stays flat while people come and go: resident size over 20,000 conversations.

The real service with the echo backend; each conversation is a new person's, opened with a greeting, two turns (one
streamed) and a heart. Memory is read from the system after every `--every` conversations. The slope is fitted to the
second half, where caches that are bounded have filled.

    python benchmarks/memory.py --json memory.json
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

import record
import servers

PACKAGES = ("characterflywheel", "fastapi", "uvicorn", "SQLAlchemy")
UNLIMITED = "[server]\nkey_requests_per_minute = 10000000\nuser_requests_per_minute = 10000000\n"
MIB = 2**20


async def converse(http: aiohttp.ClientSession, url: str, number: int) -> None:
    """One person's visit: four requests."""

    async def post(path: str, body: dict[str, Any]) -> bytes:
        async with http.post(f"{url}/{path}", json=body | {"user": f"person-{number}"}) as response:
            text = await response.read()
            assert response.status in (200, 201), text
            return text

    conversation = json.loads(await post("conversations", {"character": servers.CHARACTER}))["id"]
    turn = {"model": servers.CHARACTER, "flywheel_conversation": conversation}
    said = [{"role": "user", "content": f"I am number {number}, and I have a long story to tell about the sea."}]
    reply = json.loads(await post("chat/completions", turn | {"messages": said}))["id"]
    await post("feedback", {"message_id": reply, "kind": "love"})
    said = [{"role": "user", "content": f"That was kind. Good night from {number}!"}]
    assert b"[DONE]" in await post("chat/completions", turn | {"messages": said, "stream": True})


async def visit(server: servers.Server, key: str, args: argparse.Namespace) -> list[int]:
    """All conversations, `args.people` at once; resident bytes at the start and after every `args.every`."""
    sizes, headers = [server.memory()], {"Authorization": f"Bearer {key}"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, connector=connector) as http:
        for start in range(0, args.conversations, args.every):
            numbers = iter(range(start, min(start + args.every, args.conversations)))

            async def person(numbers: Any = numbers) -> None:
                for number in numbers:
                    await converse(http, server.url, number)

            await asyncio.gather(*(person() for _ in range(args.people)))
            sizes.append(server.memory())
            sys.stderr.write(f"  {start + args.every} conversations: {sizes[-1] / MIB:.1f} MiB\n")
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=2_000)
    parser.add_argument("--people", type=int, default=32, help="conversations at once")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    figures: dict[str, Any] = record.circumstances(args, PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        product = Path(folder) / "product"
        key = servers.workspace(product, UNLIMITED)
        with servers.running(servers.flywheel(product, "--backend", "echo")) as server:
            began = time.monotonic()
            sizes = [size / MIB for size in asyncio.run(visit(server, key, args))]
            seconds = time.monotonic() - began
    half = np.array(sizes[len(sizes) // 2 :])
    slope = float(np.polyfit(np.arange(len(half)) * args.every / 1000, half, 1)[0]) if len(half) > 1 else None
    figures |= {
        "conversations": args.conversations, "resident_mib": sizes, "requests_per_s": args.conversations * 4 / seconds,
        "growth_ratio": sizes[-1] / sizes[len(sizes) // 2], "slope_kib_per_1000": slope and slope * 1024,
        "slope_bytes_per_conversation": slope and slope * MIB / 1000,
    }  # fmt: skip
    record.show(figures, ["conversations", "MiB"], [[i * args.every, size] for i, size in enumerate(sizes)])
    print(f"\nsecond half: {figures['slope_bytes_per_conversation']:.0f} bytes a conversation, "
          f"{figures['growth_ratio']:.3f} times; {figures['requests_per_s']:.0f} requests/s")  # fmt: skip
    record.write(args.json, figures)


if __name__ == "__main__":
    main()
