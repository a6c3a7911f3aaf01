"""Reward models of the embedded world (PAPER section 3): is a preference of 70% right seven times in ten?

    python benchmarks/reward_world.py --work FOLDER [--workspace DIR] [--seeds 3] [--models pointwise pairwise]
        [--minutes M] [--json FILE]

The quick preset holds out some 50 pairs, on which ten bins show a calibration error of about 0.06 by chance alone.
Here the product's pool and annotate stage make enough of them from the prompts of a workspace (a new one if none is
given, otherwise read only), several replies to a prompt, each prompt judged by several of the world's annotators. For
every seed some users' prompts train, all others are held out; models are screened, trained and evaluated by the
functions of the reward stage. The temperature of a pair is fitted on other users. `by chance` is the error that a
perfectly calibrated model would show on these pairs.

The claim: calibration error after temperature scaling at most 0.05, for every model and seed. Sampled replies,
judgements and finished models' margins stay in `--work`; a killed run goes on, `--minutes` begins no new piece after.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import bench
import judges
import record
import world
from characterflywheel.config import RewardConfig
from characterflywheel.records import Preference
from characterflywheel.reward import format, screen
from characterflywheel.reward.evaluate import PreferenceEvaluation, evaluate_preference
from characterflywheel.reward.judge import Margins, pairwise_margins, pointwise_margins
from characterflywheel.reward.network import backbone_folder
from characterflywheel.reward.pointwise import Pointwise
from record import said

CLAIM = 0.05


class Parts(NamedTuple):
    """Pairs that train, pairs that judge, and what the screen left out of either, by reason."""

    training: list[Preference]
    held_out: list[Preference]
    dropped: dict[str, int]


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """What the benchmarks of the embedded world's reward models have in common."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where sampled replies and finished pieces are kept")
    parser.add_argument("--workspace", type=Path, help="whose prompts to use; one is made in --work if absent")
    parser.add_argument("--prompts", type=int, default=300, help="of a workspace that is made")
    parser.add_argument("--candidates", type=int, default=6, help="replies to each of them")
    parser.add_argument("--reviewers", type=int, default=7, help="reviews of each prompt that are made")
    parser.add_argument("--train-share", type=float, default=0.2, help="share of the prompts that train")
    parser.add_argument("--seeds", type=int, default=3, help="splits by user, with another start of training each")
    parser.add_argument("--world-seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=RewardConfig().epochs)
    parser.add_argument("--backbone", help="a model folder or package:NAME; the base model if absent")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no new piece after so many")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser


def the_world(args: argparse.Namespace) -> world.World:
    """The prompts, replies and judgements that the arguments ask for."""
    return world.make(
        args.work, args.workspace, prompts=args.prompts, candidates=args.candidates, reviewers=args.reviewers,
        seed=args.world_seed, threads=args.threads,
    )  # fmt: skip


def reward_config(args: argparse.Namespace) -> RewardConfig:
    """The product's settings but for what the arguments change."""
    return RewardConfig(backbone=args.backbone, epochs=args.epochs)


def screened(pairs: Sequence[Preference], config: RewardConfig, most: tuple[int, int], seed: int) -> Parts:
    """As the reward stage screens them, then at most so many pairs of a prompt, drawn by seed (train, held out)."""
    folder = backbone_folder(config.backbone or judges.BASE)
    kept, dropped = screen.screen(
        sorted(pairs, key=lambda p: (p.prompt_id, p.id)),
        format.make(folder, config.max_prompt_tokens, config.max_reply_tokens),
    )
    sides = [
        thin([p for p in kept if p.held_out is out], many, seed) for out, many in zip((False, True), most, strict=True)
    ]
    return Parts(*sides, dict(Counter(one.reason for one in dropped)))


def thin(pairs: Sequence[Preference], most: int, seed: int) -> list[Preference]:
    """At most `most` pairs of each prompt."""
    taken: Counter[str] = Counter()
    out = []
    for i in np.random.default_rng(seed).permutation(len(pairs)):
        taken[pairs[i].prompt_id] += 1
        if taken[pairs[i].prompt_id] <= most:
            out.append(pairs[i])
    return sorted(out, key=lambda p: (p.prompt_id, p.id))


def judged(kind: str, parts: Parts, config: RewardConfig, seed: int, args: argparse.Namespace) -> Margins:
    """Margins on the held-out pairs of a model trained on the others, kept in `--work`."""
    name = (args.backbone or "base").replace("/", "_").replace(":", "_")
    file = args.work / f"{kind}-{name}-{args.epochs}-{len(parts.training)}-seed{seed}.json"
    ids = [pair.id for pair in parts.held_out]
    record.made_with(file, config=config.model_dump(), taught=taught(parts.training), judged=taught(parts.held_out))
    if not file.exists():
        model = judges.trained(kind, parts.training, config, seed, args.threads, file.with_suffix(".weights"))
        read = pointwise_margins if isinstance(model, Pointwise) else pairwise_margins
        found = read(model, parts.held_out)
        file.write_text(json.dumps({"pairs": ids, **found._asdict()}), encoding="utf-8")
        file.with_suffix(".weights").unlink(missing_ok=True)
    kept = json.loads(file.read_text(encoding="utf-8"))
    if kept.pop("pairs") != ids:
        raise SystemExit(f"{file} judged other pairs: remove it.")
    return Margins(**kept)


def taught(pairs: Sequence[Preference]) -> str:
    """What pairs teach: a pair's id says which replies, not which was chosen nor by how many."""
    return record.digest((p.id, p.label, p.strength, p.chosen[-1].content) for p in pairs)


def evaluation(kind: str, parts: Parts, found: Margins, seed: int) -> PreferenceEvaluation:
    """The reward stage's own."""
    if kind == "pointwise":
        return evaluate_preference(parts.held_out, found.log_odds, found.first, found.second, seed=seed)
    return evaluate_preference(parts.held_out, found.log_odds, orders=(found.first, found.second), seed=seed)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", choices=tuple(judges.KINDS), default=("pointwise", "pairwise"))
    parser.add_argument("--label-reviewers", type=int, default=3, help="reviews of a prompt that its labels come from")
    parser.add_argument("--train-pairs", type=int, default=6, help="at most so many of a prompt train")
    parser.add_argument("--held-out-pairs", type=int, default=28, help="at most so many of a prompt judge")
    args = parser.parse_args()
    began = time.perf_counter()
    torch.set_num_threads(args.threads)
    about = record.circumstances(args, bench.VERSIONS)
    data, config = the_world(args), reward_config(args)
    rows, found = [], []
    for kind in args.models:
        for seed in range(args.seeds):
            pairs = world.pairs(data, args.label_reviewers, share=1 - args.train_share, seed=seed)
            parts = screened(pairs, config, (args.train_pairs, args.held_out_pairs), seed)
            if time.perf_counter() - began > 60 * args.minutes:
                raise SystemExit(f"{args.minutes:g} minutes are over: run again to go on with {kind}, seed {seed}.")
            one = evaluation(kind, parts, judged(kind, parts, config, seed, args), seed)
            prompts = len({pair.prompt_id for pair in parts.held_out})
            found.append({"model": kind, "seed": seed, "trained": len(parts.training), "dropped": parts.dropped,
                          "held_out": len(parts.held_out), "held_out_prompts": prompts,
                          "evaluation": one.model_dump(mode="json")})  # fmt: skip
            rows.append(row(kind, seed, parts, prompts, one))
    print(f"{len(data.prompts)} prompts, {len(data.candidates)} replies, {len(data.judgements)} reviews; labels of "
          f"{args.label_reviewers} reviewers\n")  # fmt: skip
    record.show(
        about, ("model", "seed", "train", "judge (prompts)", "accuracy", "longer wins", "ECE before", "ECE after",
                "by chance", "temperature", "log loss", "best of n", "chance"), rows)  # fmt: skip
    errors = [row["evaluation"]["calibration"]["after"]["error"]["value"] for row in found]
    held = max(errors) <= CLAIM
    print(f"\ncalibration error after scaling: largest {max(errors):.3f} of {len(errors)}; claim (at most {CLAIM}) "
          f"{'holds' if held else 'FAILS'}\n")  # fmt: skip
    leans = [(f["model"], f["seed"], lean["feature"], said(lean["raw"]), said(lean["within"]), said(lean["reviewers"]))
             for f in found for lean in f["evaluation"]["leans"] if lean["flagged"]]  # fmt: skip
    record.table(("leans on", "seed", "feature", "raw", "within a prompt", "reviewers"), leans)
    record.write(args.json, about | {"rows": found, "worst_error_after": max(errors), "claim_holds": held})


def row(kind: str, seed: int, parts: Parts, prompts: int, one: PreferenceEvaluation) -> tuple[object, ...]:
    """One line of the table."""
    calibration, best = one.calibration, one.best_of_n
    assert calibration is not None
    return (
        kind, seed, len(parts.training), f"{len(parts.held_out)} ({prompts})", said(one.accuracy),
        one.longer_wins.value, said(calibration.before.error), said(calibration.after.error),
        calibration.after.by_chance, calibration.temperature,
        f"{calibration.log_loss_before:.3f} > {calibration.log_loss_after:.3f}",
        said(best.accuracy) if best else "-", best.chance if best else None,
    )  # fmt: skip


if __name__ == "__main__":
    main()
