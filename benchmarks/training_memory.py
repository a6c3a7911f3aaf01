"""Does the plan of a training run's memory come true? Predicted against measured peak, a fresh process for each way.

    python benchmarks/training_memory.py [--device cuda] [--json FILE]

Ways: all weights; with gradient checkpointing; adapters of rank 8; adapters with checkpointing; the upper half of the
layers. Each takes two steps of SFT of two micro-batches full of the longest examples. On a CPU the measured peak is
resident memory over what the process held before the model was loaded, and includes the holes of the C library's heap;
`--no-holes` has every large block mapped apart, which is slower and shows what is really held. On a GPU it is the most
that was allocated. The prediction is `characterflywheel.training.plan`'s, from config.json alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

import bench
import record
from characterflywheel.llm.shared_prefix import reply_logprobs
from characterflywheel.pipeline import peak_memory_mb, release_memory, reset_peak_memory
from characterflywheel.training.footprint import Example
from characterflywheel.training.learner import Learner
from characterflywheel.training.plan import Machine, Setting, plan
from characterflywheel.training.shape import read_shape


class Way(NamedTuple):
    name: str
    lora_rank: int | None = None
    train_layers: int | None = None
    checkpointing: bool = False


def ways(layers: int) -> tuple[Way, ...]:
    return (
        Way("all weights"), Way("all weights, checkpointing", checkpointing=True), Way("adapters", lora_rank=8),
        Way("adapters, checkpointing", lora_rank=8, checkpointing=True),
        Way("upper half of the layers", train_layers=layers // 2),
    )  # fmt: skip


def predict(folder: Path, way: Way, args: argparse.Namespace) -> dict[str, float]:
    example = Example(args.prompt_tokens, args.reply_tokens, 1)
    setting = Setting(
        "sft", example, 10_000, 1, args.micro_batch_tokens, way.train_layers, way.lora_rank, 1, "none",
        way.checkpointing,
    )  # fmt: skip
    memory = plan(read_shape(folder), setting, Machine(2.0**40, 1e12, args.device != "cpu")).memory
    return {**memory.model_dump(), "total": memory.total}


def train(folder: Path, way: Way, args: argparse.Namespace) -> float:
    """Bytes that two steps took at most, over what was held before the model was loaded."""
    import transformers.models.llama.modeling_llama  # noqa: F401, PLC0415 - what is imported is no part of training

    if way.lora_rank:
        import peft  # noqa: F401, PLC0415

    on_gpu = args.device != "cpu"
    release_memory()
    reset_peak_memory()
    before = 0.0 if on_gpu else peak_memory_mb() * 2**20
    learner = Learner(
        folder, learning_rate=1e-5, steps=2, max_prompt_tokens=args.prompt_tokens, threads=args.threads,
        device=args.device, lora_rank=way.lora_rank, train_layers=way.train_layers,
        gradient_checkpointing=way.checkpointing,
    )  # fmt: skip
    example = Example(args.prompt_tokens, args.reply_tokens, 1)
    count = max(1, args.micro_batch_tokens // example.rows)
    paths = [path for number in range(count) for path in example.paths(number)]
    for _ in learner.remaining_steps():
        for _ in range(2):
            with learner.autocast():
                loss = -reply_logprobs(learner.model, paths, device=args.device).logprobs.mean() / 2
            loss.backward()  # type: ignore[no-untyped-call]
        learner.update(loss=float(loss.detach()))
    return float(torch.cuda.max_memory_allocated()) if on_gpu else peak_memory_mb() * 2**20 - before


def measure_apart(folder: Path, way: Way, args: argparse.Namespace) -> float:
    """`train` in a process of its own."""
    given = ["--one", json.dumps(way), "--folder", str(folder), "--device", args.device]
    for name in ("prompt_tokens", "reply_tokens", "micro_batch_tokens", "threads"):
        given += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    apart = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"} if args.no_holes else {}
    done = subprocess.run(
        [sys.executable, __file__, *given], check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **apart}
    )
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = bench.arguments(__doc__ or "")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt-tokens", type=int, default=192)
    parser.add_argument("--reply-tokens", type=int, default=64)
    parser.add_argument("--micro-batch-tokens", type=int, default=1536)
    parser.add_argument("--no-holes", action="store_true", help="map every block of a MiB or more apart (glibc)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(train(args.folder, Way(*json.loads(args.one)), args))
        return
    about = record.circumstances(args, bench.VERSIONS, args.device)
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = bench.folder(args.model, Path(scratch))
        layers = json.loads((folder / "config.json").read_text("utf-8"))["num_hidden_layers"]
        for way in ways(layers):
            measured, predicted = measure_apart(folder, way, args), predict(folder, way, args)
            rows.append(
                {
                    "way": way.name,
                    "predicted": predicted,
                    "measured": measured,
                    "error": predicted["total"] / measured - 1,
                }
            )
            record.write(args.json, about | {"rows": rows})
    record.show(
        about, ("way", "predicted MiB", "measured MiB", "error"),
        [(r["way"], f"{r['predicted']['total'] / 2**20:.0f}", f"{r['measured'] / 2**20:.0f}", f"{r['error']:+.1%}")
         for r in rows],
    )  # fmt: skip
    record.write(args.json, about | {"rows": rows, "largest_error": max(abs(row["error"]) for row in rows)})


if __name__ == "__main__":
    main()
