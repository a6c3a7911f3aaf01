"""Direct preference optimisation, a pass over real chats: `train_dpo` against TRL's `DPOTrainer` (PAPER section 4).

    python benchmarks/dpo_step.py [--device cuda] [--json FILE]

Both really train, on the same pairs of different lengths, eight to an optimiser step; no two prompts begin alike. TRL
runs with its defaults (bfloat16 autocast, checkpointed activations, batches of 8 pairs, the reference's pass in every
step), without checkpointing, with `precompute_ref_log_probs`, and in float32. The pass over all pairs is a turn: the
first is not counted. Ours computes the reference once, before the first step, and so does TRL where it precomputes:
both are charged that pass in full in every turn, though a second epoch would not need it.

`speedup` is to TRL's defaults, `speedup_fastest` to the fastest of all peers, `speedup_precomputed` to the faster with
the reference computed beforehand, `speedup_float32` is ours against TRL's with all products of both in float32.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import record
import sft_step
import sides
from sft_step import DEFAULT, FLOAT32, OURS, OURS_32, PACKAGES, prepare, ratios, report
from sides import Side, Turn

PEERS = (DEFAULT, "autocast,8,plain", "autocast,8,plain,precomputed", FLOAT32)
LEARNING_RATE = 1e-6
LONGEST = 1024


def ours(turn: Turn, *, precision: str, args: argparse.Namespace, folder: Path) -> None:
    """Train with the product's stage."""
    log = sides.product(turn, precision, args.threads)

    import chats  # noqa: PLC0415
    from characterflywheel.config import DPOConfig  # noqa: PLC0415
    from characterflywheel.pipeline import Work  # noqa: PLC0415
    from characterflywheel.training import dpo  # noqa: PLC0415

    turn.once(dpo, "reference_sums", "reference", share=args.repeats + 1)
    every = args.pairs // args.step

    def on_progress(done: int, total: int, /) -> None:
        if done % every == 0:
            turn.over(loss=sum(row["loss"] for row in log[-every:]) / every,
                      tokens=sum(row["tokens"] for row in log[-every:]))  # fmt: skip

    config = DPOConfig(
        pairs=args.pairs * (args.repeats + 1), pairs_per_step=args.step, learning_rate=LEARNING_RATE,
        max_prompt_tokens=LONGEST, evaluation_pairs=0, micro_batch_tokens=args.micro_batch_tokens,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        dpo.train_dpo(
            Work(Path(scratch), seed=0), config, folder, chats.pairs(args.pairs, args.repeats + 1),
            threads=args.threads, device=args.device, on_progress=on_progress,
        )  # fmt: skip


def theirs(turn: Turn, *, peer: str, args: argparse.Namespace, folder: Path) -> None:
    """Train with TRL. Prompts are given as rendered text, so that replies end with the end token, as ours do."""
    import torch  # noqa: PLC0415
    from datasets import Dataset, disable_progress_bars  # type: ignore[import-untyped]  # noqa: PLC0415
    from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]  # noqa: PLC0415

    import chats  # noqa: PLC0415
    import trl_peer  # noqa: PLC0415
    from characterflywheel.training.paths import open_format  # noqa: PLC0415

    torch.set_num_threads(args.threads)
    disable_progress_bars()
    before = peer.endswith(",precomputed")
    plain = trl_peer.arguments(
        trl_peer.parse(peer.removesuffix(",precomputed")), args.step, -1, LEARNING_RATE, args.device
    )
    config = DPOConfig(
        **plain, num_train_epochs=args.repeats + 1, precompute_ref_log_probs=before, beta=0.1, max_length=LONGEST
    )
    template = open_format(folder, LONGEST).tokenizer
    rows = [
        {
            "prompt": template.apply_chat_template(
                [m.model_dump(include={"role", "content"}) for m in pair.prompt],
                add_generation_prompt=True, tokenize=False,
            ),
            "chosen": pair.chosen[-1].content, "rejected": pair.rejected[-1].content,
        }
        for pair in chats.pairs(args.pairs, 1)
    ]  # fmt: skip
    turn.once(DPOTrainer, "_precompute_ref_logps", "reference", share=1)
    trainer = DPOTrainer(str(folder), args=config, train_dataset=Dataset.from_list(rows))
    learnt = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in trainer.train_dataset)
    trl_peer.watch(turn, trainer, "_compute_loss", lambda: {"tokens": learnt}, epochs=True)
    trainer.train()


def main() -> None:
    parser = sft_step.arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=32, help="in a turn; a multiple of --step")
    parser.add_argument("--step", type=int, default=8, help="pairs of an optimiser step")
    parser.add_argument("--peers", nargs="+", default=list(PEERS),
                        help="PRECISION,MICRO-BATCH,plain|checkpointing[,precomputed]")  # fmt: skip
    args = parser.parse_args()
    sides.limit_threads(args.threads)
    figures: dict[str, Any] = record.circumstances(args, PACKAGES, args.device)
    with tempfile.TemporaryDirectory() as name:
        folder = sides.apart(prepare, args, Path(name))
        common = {"args": args, "folder": folder}
        started = [Side(OURS, ours, common | {"precision": "fast"}, args.device)]
        if FLOAT32 in args.peers:
            started.append(Side(OURS_32, ours, common | {"precision": "float32"}, args.device))
        started += [Side(peer, theirs, common | {"peer": peer}, args.device) for peer in args.peers]
        found = sides.take_turns(started, args.repeats)
    figures |= ratios(found, args.peers)
    early = [name for name in found if name.endswith(",precomputed")]
    figures["speedup_precomputed"] = (
        min(sides.middle(found[name]).seconds for name in early) / sides.middle(found[OURS]).seconds if early else None
    )
    report(args, found, figures, f"{args.pairs} pairs, {found[OURS][0].figures['tokens']:.0f} reply tokens")


if __name__ == "__main__":
    main()
