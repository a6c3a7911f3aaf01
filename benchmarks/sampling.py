"""Tokens a second of the chat model's backends (DESIGN section 6), against transformers' `generate`.

    python benchmarks/sampling.py [--json FILE]

Two workloads on the same prompts: one reply to each of many prompts, and several replies to each of a few. Prompts
vary in length by a quarter around --prompt-tokens. All sample the whole distribution at temperature 1 and stop where
the model does; a token counts if it belongs to a reply, its end token included. `generate` runs on the very weights
of the native backend, in its dtype unless --generate-dtype says otherwise, left-padded, as many rows at a time as the
others. CTranslate2 is int8 and opens its converted model within the time that is measured; the conversion is not.
"""

import argparse
import importlib.util
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import bench
import record
from characterflywheel.llm import Sampling
from characterflywheel.llm.chat_format import ChatFormat
from characterflywheel.llm.ct2 import CTranslate2Model
from characterflywheel.llm.native import NativeModel
from characterflywheel.llm.shared_prefix import Segment
from characterflywheel.records import ChatMessage

WORDS = ("the", "of", "and", "to", "in", "you", "that", "it", "was", "for", "on", "with", "my", "rain", "tea", "stars")
RATIOS = (("ctranslate2", "generate"), ("native", "generate"), ("native", "ctranslate2"))

Prompts = Sequence[tuple[Segment, Segment]]


def prompts(form: ChatFormat, count: int, tokens: int) -> list[tuple[Segment, Segment]]:
    """Messages of random words, tokenised as chats of about `tokens` tokens, a quarter more or less."""
    rng, out = random.Random(0), []
    for _ in range(count):
        target, words = rng.uniform(0.75, 1.25) * tokens, [rng.choice(WORDS)]
        while sum(map(len, form.prompt([_user(words)]))) < target:
            words.append(rng.choice(WORDS))
        out.append(form.prompt([_user(words)]))
    return out


def _user(words: Sequence[str]) -> ChatMessage:
    return ChatMessage(role="user", content=" ".join(words))


class Generate:
    """`transformers`' own sampler on left-padded batches of prompts of similar length."""

    def __init__(self, model: Any, ends: frozenset[int], rows: int) -> None:
        self.model, self.ends, self.rows = model, ends, rows

    def tokens(self, prompts: Prompts, n: int, max_tokens: int, seed: int) -> int:
        """How many tokens the replies have."""
        torch.manual_seed(seed)
        whole = sorted(([*head, *rest] for head, rest in prompts), key=len)
        size, end, total = max(1, self.rows // n), min(self.ends), 0
        for at in range(0, len(whole), size):
            batch = whole[at : at + size]
            longest = max(map(len, batch))
            ids = torch.tensor([[end] * (longest - len(p)) + p for p in batch])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
            with torch.inference_mode():
                out = self.model.generate(
                    ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    num_return_sequences=n, max_new_tokens=max_tokens, pad_token_id=end,
                    eos_token_id=sorted(self.ends),
                )  # fmt: skip
            for reply in out[:, longest:].tolist():
                total += next((i + 1 for i, token in enumerate(reply) if token in self.ends), len(reply))
        return total


def contenders(args: argparse.Namespace, folder: Path) -> tuple[ChatFormat, dict[str, Callable[..., int]]]:
    """For each backend, a function of prompts, n and seed that samples and says how many tokens it drew."""
    settings = {"max_prompt_tokens": 2 * args.prompt_tokens + 256, "threads": args.threads, "batch_replies": args.batch}
    native = NativeModel.load(folder, "native", **settings)
    sampling = Sampling(max_tokens=args.reply_tokens)

    def ours(model: NativeModel | CTranslate2Model) -> Callable[..., int]:
        def run(prompts: Prompts, n: int, seed: int) -> int:
            seeds = [1000 * seed + i for i in range(len(prompts))]
            drawn = model.sample(prompts, n=n, sampling=sampling, seeds=seeds)
            return sum(len(ids) for replies in drawn for ids, _ in replies)

        return run

    peer = native.model
    if args.generate_dtype and getattr(torch, args.generate_dtype) != peer.dtype:
        peer = bench.model(args.model).to(getattr(torch, args.generate_dtype))
    generate = Generate(peer, native.ends, args.batch)
    found = {"generate": lambda prompts, n, seed: generate.tokens(prompts, n, args.reply_tokens, seed)}
    found["native"] = ours(native)
    if importlib.util.find_spec("ctranslate2"):
        found["ctranslate2"] = ours(CTranslate2Model.load(folder, "ctranslate2", **settings))
    args.dtypes = {"native": str(native.model.dtype), "generate": str(peer.dtype), "ctranslate2": "int8"}
    return native.format, found


def measure(run: dict[str, Callable[..., int]], asked: Prompts, n: int, args: argparse.Namespace) -> dict[str, Any]:
    """One workload: tokens a second of every backend in every round, medians, and their ratios."""
    drawn: dict[str, list[int]] = {name: [] for name in run}

    def counted(name: str) -> Callable[[int], None]:
        return lambda repeat: drawn[name].append(run[name](asked, n, repeat))

    spent = bench.seconds({name: counted(name) for name in run}, args.repeats)
    rounds = {name: [count / s for count, s in zip(drawn[name][1:], spent[name], strict=True)] for name in run}
    middle = {name: record.median(values) for name, values in rounds.items()}
    return {
        "prompts": len(asked), "replies": n, "prompt_tokens": sum(len(h) + len(r) for h, r in asked) / len(asked),
        "tokens_per_second": {name: middle.get(name) for name in ("generate", "native", "ctranslate2")},
        "tokens_per_second_all": rounds, "tokens": {name: counts[1:] for name, counts in drawn.items()},
        "ratios": {f"{a}/{b}": middle[a] / middle[b] if a in middle and b in middle else None for a, b in RATIOS},
    }  # fmt: skip


def main() -> None:
    parser = bench.arguments(__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=150)
    parser.add_argument("--reply-tokens", type=int, default=48, help="at most")
    parser.add_argument("--prompts", type=int, default=32, help="prompts that get one reply")
    parser.add_argument("--shared-prompts", type=int, default=8, help="prompts that get --replies replies")
    parser.add_argument("--replies", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64, help="replies decoded together")
    parser.add_argument("--generate-dtype", choices=("float32", "bfloat16"), help="default: the native backend's")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = record.circumstances(args, bench.VERSIONS)
    with tempfile.TemporaryDirectory() as scratch:
        if args.model in bench.RANDOM:
            os.environ["FLYWHEEL_CACHE"] = scratch  # nothing will want this conversion again
        form, run = contenders(args, bench.folder(args.model, Path(scratch) / "model"))
        asked = prompts(form, max(args.prompts, args.shared_prompts), args.prompt_tokens)
        cases = {
            "separate_prompts": measure(run, asked[: args.prompts], 1, args),
            "shared_prompts": measure(run, asked[: args.shared_prompts], args.replies, args),
        }
    print("dtype: " + ", ".join(f"{name} {args.dtypes[name]}" for name in run))
    names = [f"{a}/{b}" for a, b in RATIOS]
    record.show(
        about, ("tokens/s", "generate", "native", "ctranslate2", *names),
        [(f"{case.replace('_', ' ')}, {found['prompts']} x {found['replies']}", *found["tokens_per_second"].values(),
          *found["ratios"].values()) for case, found in cases.items()],
    )  # fmt: skip
    missing = None if "ctranslate2" in run else "the optional package ctranslate2 is not installed"
    record.write(args.json, about | {"dtypes": args.dtypes, "cases": cases, "ctranslate2_missing": missing})


if __name__ == "__main__":
    main()
