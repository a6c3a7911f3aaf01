"""Does herding climb what people like, and do its alarms ring? (PAPER sections 4 and 8, DESIGN section 7)

    python benchmarks/herding.py --work FOLDER [--seeds 1 2 3 4 5] [--arms grpo online_dpo ...] [--minutes M]
        [--json FILE]

The target is known here: the hidden utility of the embedded world, which no stage reads. Every seed has a world of its
own (people, traffic, annotators, reward model, SFT model: `herding_world`). From its SFT model each arm runs the
product's `train_rl` on as many rollouts; then all models answer the same held-out prompts of people who met the SFT
model, and the world says what the replies are worth.

| arm | prompts | chosen by | learns by |
| --- | --- | --- | --- |
| sft | - | - | nothing: where all begin |
| grpo | near the policy | variance of candidates' rewards | GRPO |
| online_dpo | near the policy | variance | online DPO |
| random | near the policy | chance | GRPO |
| stale | of people who met the base model | variance | GRPO |
| pushed | near the policy | variance | GRPO, far too hard: the alarms ought to ring |

The claims: grpo over sft, over online_dpo, over stale (near-policy prompts), over random (selection); the alarms ring
on every pushed run whose utility falls, before it has fallen for good, and stop no other. An interval is Student's over
the seeds; beside it stands each seed's difference, paired by prompt. Learning rates were chosen on seed 0, which is not
among the five. Everything is kept in `--work`; `--minutes` begins nothing new after so many.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

import bench
import record
from characterflywheel import intervals, tables
from characterflywheel.config import RLConfig
from characterflywheel.ids import derive_seed
from characterflywheel.pipeline import Work
from characterflywheel.records import Estimate, Prompt, Rollout
from characterflywheel.safety.policy import SafetyPolicy
from characterflywheel.training.rl import train_rl
from characterflywheel.training.rl.prompts import By, choose
from herding_world import Numbers, Start, Truth, answers, opened, prepare

ANSWERS = 4
PROMPTS_TO_LEARN = 32  # chosen of those there are; each is met twice


class Arm(NamedTuple):
    """One way to go on from SFT: which prompts, how chosen, and what differs from `RL`."""

    stale: bool = False
    by: By = "variance"
    changes: Mapping[str, object] = MappingProxyType({})


RL = RLConfig(
    steps=16, prompts_per_step=4, group=8, learning_rate=3e-5, train_layers=16, ordinary_share=0.25, temperature=0.8
)
ARMS = {
    "grpo": Arm(),
    "online_dpo": Arm(changes={"algorithm": "online_dpo", "learning_rate": 1e-4}),
    "random": Arm(by="random"),
    "stale": Arm(stale=True),
    "pushed": Arm(changes={"learning_rate": 3e-4, "steps": 24}),
}
CLAIMS = (("grpo", "sft"), ("grpo", "online_dpo"), ("grpo", "stale"), ("grpo", "random"), ("online_dpo", "sft"))


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    began, about = time.perf_counter(), record.circumstances(args, bench.VERSIONS)
    runs: dict[str, dict[int, Run]] = {}
    for seed in args.seeds:
        start = prepare(args.work, seed, args.threads)
        for name in ("sft", *args.arms):
            file = args.work / f"{name}{seed}{args.tag}.json"
            if not file.exists() and time.perf_counter() - began > 60 * args.minutes:
                print(f"{args.minutes:g} minutes are over before {name}, seed {seed}: run again to go on")
                continue
            runs.setdefault(name, {})[seed] = kept(file, name, start, args)
    record.show(about, ("arm", *(f"seed {s}" for s in args.seeds), "mean", "reward up by", "words", "alarms"),
                [row(name, found, args.seeds) for name, found in runs.items()])  # fmt: skip
    print()
    gains = {f"{a} over {b}": gain(runs[a], runs[b]) for a, b in CLAIMS if a in runs and b in runs}
    record.table(("utility", "difference [95%]", "seeds", "by seed"), [
        (name, said(mean), mean.n, " ".join(f"{v:+.3f}" for v in each)) for name, (mean, each) in gains.items()
    ])  # fmt: skip
    figures: dict[str, object] = {
        "runs": {name: {seed: run._asdict() for seed, run in found.items()} for name, found in runs.items()},
        "gains": {name: {**mean.model_dump(), "by_seed": each} for name, (mean, each) in gains.items()},
    }
    record.write(args.json, about | figures)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where worlds and finished runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=(1, 2, 3, 4, 5))
    parser.add_argument("--arms", nargs="*", choices=tuple(ARMS), default=tuple(ARMS))
    parser.add_argument("--learning-rate", type=float, help="of every arm, to choose one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing new after so many")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    args.tag = "" if args.learning_rate is None else f"-{args.learning_rate:g}"
    return args


class Run(NamedTuple):
    """What became of an arm. `utility`: mean of each judged prompt's replies, by prompt id. `by_step`: of each step's
    rollouts (reward, utility, words). `alarms`: their step and kind."""

    utility: dict[str, float]
    words: float
    by_step: list[tuple[float, float, float]]
    alarms: list[tuple[int, str, str]]
    seconds: float

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.utility.values())))


def kept(file: Path, name: str, start: Start, args: argparse.Namespace) -> Run:
    """The arm's run, from `file` if it was done."""
    if not file.exists():
        found = run(name, start, args, file.with_suffix(""))
        file.write_text(json.dumps(found._asdict()), encoding="utf-8")
        print(f"seed {start.seed} {name}: utility {found.mean:+.3f}, {found.seconds:.0f} s", flush=True)
    read = json.loads(file.read_text(encoding="utf-8"))
    return Run(**read | {"by_step": [tuple(r) for r in read["by_step"]], "alarms": [tuple(a) for a in read["alarms"]]})


def run(name: str, start: Start, args: argparse.Namespace, folder: Path) -> Run:
    """Train the arm and let the world judge its answers."""
    began, truth = time.perf_counter(), Truth(start, args.threads)
    by_step: list[tuple[float, float, float]] = []
    alarms: list[tuple[int, str, str]] = []
    model = start.model
    if name != "sft":
        arm = ARMS[name]
        config = RL.model_copy(update=dict(arm.changes))
        if args.learning_rate is not None:
            config = config.model_copy(update={"learning_rate": args.learning_rate})
        prompts = choose(
            start.stale if arm.stale else start.near, start.candidates, PROMPTS_TO_LEARN, by=arm.by,
            ordinary_share=config.ordinary_share, seed=derive_seed(start.seed, "choose"),
        ).prompts  # fmt: skip
        summary = train_rl(
            Work(folder, start.seed), config, start.model, prompts, start.scorer(args.threads), SafetyPolicy(),
            threads=args.threads, batch_replies=64,
        )  # fmt: skip
        alarms = [(a.step, a.kind, a.action) for a in summary.alarms]
        model, by_step = folder / "model", stepwise(folder, prompts, truth)
    texts = answers(opened(model, args.threads), start.judged, ANSWERS, 48, derive_seed(start.seed, "judged"))
    worth = truth.of(start.judged, texts)
    words = float(np.mean([len(text.split()) for several in texts for text in several]))
    utility = {p.id: float(values.mean()) for p, values in zip(start.judged, worth, strict=True)}
    return Run(utility, words, by_step, alarms, time.perf_counter() - began)


def stepwise(folder: Path, prompts: Sequence[Prompt], truth: Truth) -> list[tuple[float, float, float]]:
    """Mean reward, utility and words of each step's rollouts."""
    asked = {p.id: p for p in prompts}
    rollouts = tables.read(folder / "rollouts.parquet", Rollout)
    out = []
    for step in sorted({r.step for r in rollouts}):
        mine = [r for r in rollouts if r.step == step]
        worth: list[Numbers] = truth.of([asked[r.prompt_id] for r in mine], [[r.text] for r in mine])
        words = [len(r.text.split()) for r in mine]
        out.append((float(np.mean([r.score for r in mine])), float(np.mean(worth)), float(np.mean(words))))
    return out


def row(name: str, found: dict[int, Run], seeds: list[int]) -> tuple[object, ...]:
    """One line of the table; the reward's rise is from the first to the last quarter of the steps."""
    each = list(found.values())
    quarter = max(1, len(each[0].by_step) // 4)
    up = [np.mean([s[0] for s in r.by_step[-quarter:]]) - np.mean([s[0] for s in r.by_step[:quarter]])
          for r in each if r.by_step]  # fmt: skip
    return (
        name, *(found[s].mean if s in found else None for s in seeds), float(np.mean([r.mean for r in each])),
        float(np.mean(up)) if up else None, float(np.mean([r.words for r in each])),
        " ".join(f"{step}:{kind}" for r in each for step, kind, _ in r.alarms) or "-",
    )  # fmt: skip


def gain(a: dict[int, Run], b: dict[int, Run]) -> tuple[Estimate, list[float]]:
    """What `a` is worth more than `b` on the same prompts: mean over seeds with Student's interval, and by seed."""
    both = sorted(a.keys() & b.keys())
    each = [float(np.mean([a[s].utility[p] - b[s].utility[p] for p in a[s].utility])) for s in both]
    return intervals.mean(each), each


def said(estimate: Estimate) -> str:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "-"
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


if __name__ == "__main__":
    main()
