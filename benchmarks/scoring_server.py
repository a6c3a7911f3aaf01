"""What does sharing one reward model over HTTP cost, and what does joining waiting requests give?

    python benchmarks/scoring_server.py [--clients 1 4 16] [--json FILE]

Each of k clients asks, again and again, for the pointwise scores of 8 replies (32 tokens each) to one prompt (200
tokens), by a 6-layer reward model cut from SmolLM2. In process: k threads share the model behind a lock, no HTTP. The
scoring server runs in a process of its own, once as it is and once with `max_joined` at 1, so that every request is
computed alone. `own`: each client has prompts of its own, a new one every time; `one`: all ask about the same prompt,
as when a rollout's replies arrive one group after another. Contenders take turns; a rate is the median over rounds,
latencies are pooled. `difference`: the largest between a score over HTTP and the same score computed alone.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import bench
import record
import servers
from characterflywheel.config import RewardConfig
from characterflywheel.records import ChatMessage
from characterflywheel.reward.pointwise import Pointwise
from characterflywheel.reward.remote import connect
from characterflywheel.reward.server import serve
from characterflywheel.reward.wire import Card, Limits

WORDS = ("rain", "bread", "stars", "ships", "tea", "river", "night", "winter", "garden", "story", "letter", "music")
Score = Callable[[Sequence[Sequence[ChatMessage]], Sequence[Sequence[str]]], list[list[float]]]


def make(args: argparse.Namespace, folder: Path) -> Pointwise:
    """A reward model of the first layers of a base model; its head is random, so that scores differ."""
    config = RewardConfig(layers=args.layers, max_prompt_tokens=256, max_reply_tokens=80)
    model = Pointwise.from_folder(folder, config, threads=args.threads)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.net.head.weight, std=0.02)
    model.net.precision = getattr(torch, args.precision)
    model.net.eval()
    return model


class Alone:
    """As much of `RewardModels` as the server needs to score by the pointwise model."""

    gold = pairwise = None

    def __init__(self, pointwise: Pointwise) -> None:
        self.pointwise = pointwise


def serving(args: argparse.Namespace) -> None:
    """What the server's process does."""
    card = Card(
        artifact="benchmark", content="0", generation=0, mean=0, deviation=1, signals=(), weights={}, gold=False,
        precision=args.precision, limits=Limits(max_joined=args.max_joined, max_waiting=256),
    )  # fmt: skip
    serve(Alone(make(args, Path(args.model))), card, "127.0.0.1", args.port)  # type: ignore[arg-type]


def started(args: argparse.Namespace, folder: Path, logs: Path, max_joined: int) -> servers.Server:
    port = servers.free_port()
    command = [
        sys.executable, __file__, "--serve", "--port", str(port), "--max-joined", str(max_joined), "--model",
        str(folder), "--layers", str(args.layers), "--threads", str(args.threads), "--precision", args.precision,
    ]  # fmt: skip
    base = f"http://127.0.0.1:{port}"
    return servers.Server("score", command, base, f"{base}/readyz", logs / f"{max_joined}.log")


def text(seed: int, words: int) -> str:
    """Of these words nearly all are one token."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def question(args: argparse.Namespace, seed: int) -> tuple[tuple[ChatMessage, ...], list[str]]:
    """A prompt and its replies; seeds differ in the first word after the system prompt."""
    system = ChatMessage(role="system", content=f"You are Mo {seed}, a lighthouse keeper.")
    prompt = (system, ChatMessage(role="user", content=text(seed, args.prompt_tokens - 30)))
    return prompt, [text(seed * 100 + i, args.reply_tokens - 1) for i in range(args.replies)]


@contextmanager
def locked(model: Pointwise, clients: int) -> Iterator[list[Score]]:
    """The model for several threads of this process, one at a time."""
    lock = threading.Lock()

    def score(prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]]) -> list[list[float]]:
        with lock:
            return model.score(prompts, replies)

    yield [score] * clients


@contextmanager
def remote(address: str, clients: int) -> Iterator[list[Score]]:
    """A connection for each client."""
    rewards = [connect(address) for _ in range(clients)]
    try:
        yield [one.pointwise.score for one in rewards]
    finally:
        for one in rewards:
            one.close()


class Round(NamedTuple):
    """How long it took until the last request was answered, and the seconds of each request."""

    elapsed: float
    requests: list[float]


def round_of(scores: Sequence[Score], args: argparse.Namespace, shared: bool, seeds: Iterator[int]) -> Round:
    """Every client asks until the time is over."""
    spent: list[list[float]] = [[] for _ in scores]
    started = time.perf_counter()
    until = started + args.seconds

    def client(number: int) -> None:
        while (began := time.perf_counter()) < until:
            prompt, replies = question(args, 0 if shared else next(seeds))
            if shared:
                replies = [f"{one} {number} {len(spent[number])}" for one in replies]
            scores[number]([prompt], [replies])
            spent[number].append(time.perf_counter() - began)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(len(scores))]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return Round(time.perf_counter() - started, [seconds for mine in spent for seconds in mine])


def difference(address: str, model: Pointwise, args: argparse.Namespace, clients: int) -> float:
    """The largest between a score over HTTP, among `clients` who ask at once, and the model's own, computed alone."""
    asked = [question(args, 10**6 + i % 3) for i in range(clients)]
    told: list[Any] = [None] * clients

    def client(i: int, score: Score) -> None:
        told[i] = score([asked[i][0]], [asked[i][1]])

    with remote(address, clients) as scores:
        threads = [threading.Thread(target=client, args=(i, score)) for i, score in enumerate(scores)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    alone = [model.score([prompt], [replies]) for prompt, replies in asked]
    return float(np.abs(np.array(told) - np.array(alone)).max())


def main() -> None:
    parser = bench.arguments(__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--replies", type=int, default=8)
    parser.add_argument("--reply-tokens", type=int, default=32)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seconds", type=float, default=4.0, help="of every contender in every round")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--max-joined", type=int, default=256, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serving(args)
        return
    about = record.circumstances(args, bench.VERSIONS)
    seeds = count(1)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = bench.folder(args.model, Path(scratch) / "model")
        model = make(args, folder)
        joined, single = (
            stack.enter_context(servers.running(started(args, folder, Path(scratch), most))).url for most in (256, 1)
        )
        contenders = {"in process": partial(locked, model), "server": partial(remote, joined),
                      "server, nothing joined": partial(remote, single)}  # fmt: skip
        keys = [(k, shared, name) for k in args.clients for shared in (False, True) for name in contenders]
        spent: dict[Any, list[Round]] = {key: [] for key in keys}
        for number in range(-1, args.repeats):
            for key in keys:
                with contenders[key[2]](key[0]) as scores:
                    took = round_of(scores, args, key[1], seeds)
                if number >= 0:
                    spent[key].append(took)
        off = difference(joined, model, args, max(args.clients))
    rows: list[dict[str, Any]] = [row_of(*key, spent[key], args) for key in keys]
    print(
        f"{args.replies} replies of {args.reply_tokens} tokens after a prompt of {args.prompt_tokens}; {args.precision}"
    )
    record.show(
        about, ("contender", "clients", "prompts", "requests/s", "p50 ms", "p99 ms", "requests"),
        [(r["contender"], r["clients"], r["prompts"], r["requests_per_s"], r["p50_ms"], r["p99_ms"], r["n"])
         for r in rows],
    )  # fmt: skip
    print(f"\nlargest difference of a joined score over HTTP from the same computed alone: {off:.2g}")
    record.write(args.json, about | {"rows": rows, "difference": off})


def row_of(clients: int, shared: bool, name: str, rounds: Sequence[Round], args: argparse.Namespace) -> dict[str, Any]:
    """A row of the table: rates are medians over rounds, quantiles of all requests."""
    every = np.array([seconds for one in rounds for seconds in one.requests])
    rates = [len(one.requests) / one.elapsed for one in rounds]
    return {
        "contender": name, "clients": clients, "prompts": "one" if shared else "own",
        "requests_per_s": record.median(rates), "requests_per_s_rounds": rates,
        "replies_per_s": args.replies * record.median(rates), "p50_ms": float(np.quantile(every, 0.5)) * 1000,
        "p99_ms": float(np.quantile(every, 0.99)) * 1000, "n": len(every),
    }  # fmt: skip


if __name__ == "__main__":
    main()
