"""Preferences of real people (PAPER section 3): how often does a small reward model agree with them?

    python benchmarks/preferences_real.py --work FOLDER [--data ../shared/data] [--seeds 3] [--json FILE]
        [--do read train report] [--sets hh llmbar] [--models pointwise pairwise minilm] [--minutes M]

hh: which of two replies to a harassing or dangerous conversation is less harmful (HH-RLHF, harmless-base, test part,
1,423 pairs). llmbar: which of two answers follows the instruction better (three sets with majority votes, 466 pairs).
Beside our models stand the rule that the longer reply wins, a frozen backbone under a linear Bradley-Terry head
(layer, pooling and penalty chosen inside the training part), and the backbone's own log-likelihood.

Everything is judged on prompts that did not train it: two folds by prompt, another way for every seed. Intervals are
clustered by prompt. `similar length`: pairs whose longer reply has at most 1.25 times the words. Networks train for one
epoch at the product's settings. Finished pieces stay in `--work`, and a killed run goes on with the next one;
`--minutes` stops before a new piece is begun.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pyarrow import parquet
from transformers import AutoTokenizer

import bench
import frozen
import judges
import record
from characterflywheel import intervals
from characterflywheel.config import RewardConfig
from characterflywheel.llm.chat_format import ChatFormat
from characterflywheel.records import ChatMessage, Estimate, Preference
from characterflywheel.reward.evaluate import length_match

SETS = {"hh": "pref_hh_harmless", "llmbar": "pref_llmbar"}
CHUNK, PAIRS_AT_ONCE, FOLDS = 32, 8, 2
Margins = NDArray[np.float64]


class Model(NamedTuple):
    """A network of ours: its kind, and what it starts from (the base model if None)."""

    kind: str
    backbone: str | None = None


MODELS = {
    "pointwise": Model("pointwise"), "pairwise": Model("pairwise"),
    "minilm pointwise": Model("pointwise", judges.ENCODER), "minilm pairwise": Model("pairwise", judges.ENCODER),
}  # fmt: skip


class Data(NamedTuple):
    """Pairs as the reward models take them, the subset of each, and what could not be used."""

    pairs: list[Preference]
    subsets: list[str]
    skipped: Counter[str]


def load(folder: Path, name: str) -> Data:
    """A pair counts if both replies say something, say different things, and answer the same context once."""
    rows = parquet.read_table(folder / f"{SETS[name]}.parquet").to_pylist()
    pairs, subsets, skipped = [], [], Counter[str]()
    for row in rows:
        if name == "hh":
            context, chosen, rejected = (json.loads(row[key]) for key in ("context", "chosen", "rejected"))
            if len(chosen) != 1 or len(rejected) != 1:
                skipped["several turns differ"] += 1
                continue
            texts, group, subset = (chosen[0]["content"], rejected[0]["content"]), context[0]["content"], "harmless"
        else:
            context = [{"role": "user", "content": row["prompt"]}]
            order = ("response_a", "response_b") if row["label"] == "a" else ("response_b", "response_a")
            texts, group, subset = tuple(row[key] for key in order), row["prompt"], row["subset"]
        if not all(text.strip() for text in texts):
            skipped["empty reply"] += 1
            continue
        if texts[0].split() == texts[1].split():
            skipped["equal replies"] += 1
            continue
        one, two = ((ChatMessage(role="assistant", content=text.strip()),) for text in texts)
        messages = tuple(ChatMessage(**message) for message in context)
        pairs.append(
            Preference(
                id=row["id"], prompt_id=group, user_id=group, character_id="none", source="user", prompt=messages,
                chosen=one, rejected=two, chosen_policy="people", rejected_policy="people", reviewers=1, label=1.0,
            )
        )  # fmt: skip
        subsets.append(subset)
    return Data(pairs, subsets, skipped)


def chat_form(args: argparse.Namespace) -> ChatFormat:
    """The base model's tokenizer."""
    return ChatFormat(AutoTokenizer.from_pretrained(args.base), args.max_prompt_tokens)


def halves(pairs: Sequence[Preference], seed: int) -> NDArray[np.int64]:
    """The fold of every pair, dealt by prompt."""
    prompts = sorted({pair.prompt_id for pair in pairs})
    place = {prompts[i]: n % FOLDS for n, i in enumerate(np.random.default_rng(seed).permutation(len(prompts)))}
    return np.array([place[pair.prompt_id] for pair in pairs])


def how(args: argparse.Namespace) -> dict[str, object]:
    """The settings that what is kept in `--work` depends on, beside what its name says."""
    names = ("layers", "epochs", "max_prompt_tokens", "max_reply_tokens")
    return {"model": str(args.model)} | {name: getattr(args, name) for name in names}


def reading(data: Data, name: str, args: argparse.Namespace) -> Iterator[Path]:
    """The frozen backbone's reads in chunks; each is made when it is asked for and not there yet."""
    loaded: Any = None
    for start in range(0, len(data.pairs), CHUNK):
        file = args.work / f"read-{name}-{start:05d}.npz"
        record.made_with(file, **(how(args) | {"layers": None, "epochs": None}))
        if not file.exists():
            if loaded is None:
                loaded = bench.model(str(args.base)), chat_form(args)
            model, form = loaded
            some = data.pairs[start : start + CHUNK]
            batches = [some[i : i + PAIRS_AT_ONCE] for i in range(0, len(some), PAIRS_AT_ONCE)]
            reads = [
                frozen.read(
                    model, form, [p.prompt for p in batch],
                    [(p.chosen[-1].content, p.rejected[-1].content) for p in batch], args.max_reply_tokens,
                )
                for batch in batches
            ]  # fmt: skip
            frozen.save(file, frozen.join(reads))
        yield file


def network_file(args: argparse.Namespace, model_name: str, name: str, seed: int, fold: int) -> Path:
    """Where a network's margins on one fold are kept."""
    size = f"-{args.train_pairs}-pairs" if args.train_pairs else ""
    return Path(args.work / f"{model_name}-{name}{size}-seed{seed}-fold{fold}.json")


def trained(data: Data, name: str, model_name: str, seed: int, fold: int, args: argparse.Namespace) -> Path:
    """Margins of a network trained on the other fold, on this one."""
    file = network_file(args, model_name, name, seed, fold)
    record.made_with(file, **how(args))
    if not file.exists():
        side = halves(data.pairs, seed)
        inside = [pair for pair, f in zip(data.pairs, side, strict=True) if f != fold]
        outside = [pair for pair, f in zip(data.pairs, side, strict=True) if f == fold]
        if args.train_pairs:
            drawn = np.random.default_rng([seed, fold]).permutation(len(inside))[: args.train_pairs]
            inside = [inside[i] for i in sorted(drawn)]
        model, began = MODELS[model_name], time.perf_counter()
        config = RewardConfig(
            backbone=model.backbone or str(args.base), layers=args.layers, epochs=args.epochs,
            max_prompt_tokens=args.max_prompt_tokens, max_reply_tokens=args.max_reply_tokens,
        )  # fmt: skip
        judge = judges.trained(model.kind, inside, config, seed, args.threads, file.with_suffix(".weights"))
        spent = time.perf_counter() - began
        found = dict(zip((p.id for p in outside), judges.margins(judge, outside), strict=True))
        file.write_text(json.dumps({"margins": found, "trained": len(inside), "seconds": spent}), encoding="utf-8")
        file.with_suffix(".weights").unlink(missing_ok=True)
    return file


def judged(data: Data, margins: Margins, seen: NDArray[np.bool_]) -> dict[str, dict[str, Estimate]]:
    """Accuracy on all pairs that were judged, on those of similar length, on the others, and by subset."""
    right = np.where(margins == 0, 0.5, margins > 0).astype(float)
    match = np.array([length_match(pair) for pair in data.pairs])
    groups = np.array([pair.prompt_id for pair in data.pairs])

    def share(rows: NDArray[np.bool_]) -> Estimate:
        rows = rows & seen
        return intervals.share(right[rows], groups[rows].tolist())

    everything = np.ones(len(match), dtype=bool)
    views = {"all": everything} | {kind: match == kind for kind in ("similar", "chosen longer", "chosen shorter")}
    names = sorted(set(data.subsets)) if len(set(data.subsets)) > 1 else []
    views |= {subset: np.array(data.subsets) == subset for subset in names}
    return {"accuracy": {view: share(rows) for view, rows in views.items()}}


def heads(data: Data, reads: frozen.Reads, seed: int) -> tuple[Margins, list[tuple[str, int, float]]]:
    """The frozen backbone's linear head, cross-fitted over the folds of a seed, and what was chosen in each."""
    side, rows = halves(data.pairs, seed), np.arange(len(data.pairs))
    groups = np.array([pair.prompt_id for pair in data.pairs])
    pairs = frozen.Pairs(2 * rows, 2 * rows + 1, np.ones(len(rows), dtype=np.float32), groups)
    out, choices = np.zeros(len(rows)), []
    for fold in range(FOLDS):
        head = frozen.fit_head(reads, pairs.at(side != fold))
        score = frozen.scores(reads, head)
        out[side == fold] = (score[0::2] - score[1::2])[side == fold]
        choices.append(head.choice)
    return out, choices


def report(data: Data, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Every model that has been run, seed by seed."""
    pairs, all_of = data.pairs, np.ones(len(data.pairs), dtype=bool)
    sides = [(p.chosen[-1].content, p.rejected[-1].content) for p in pairs]
    longer = {"words": [float(len(a.split()) - len(b.split())) for a, b in sides],
              "characters": [float(len(a) - len(b)) for a, b in sides]}  # fmt: skip
    found: dict[str, Any] = {
        f"longer wins, {unit}": [judged(data, np.array(margins), all_of)] for unit, margins in longer.items()
    }
    files = [args.work / f"read-{name}-{start:05d}.npz" for start in range(0, len(pairs), CHUNK)]
    done = list(takewhile(Path.exists, files))
    if done:
        reads = frozen.load(done)
        part = Data(pairs[: len(reads.last) // 2], data.subsets[: len(reads.last) // 2], data.skipped)
        seen = np.ones(len(part.pairs), dtype=bool)
        for title, score in (("per token", reads.logprob), ("sum", reads.total)):
            found[f"log-likelihood, {title}"] = [judged(part, (score[0::2] - score[1::2]).astype(float), seen)]
        found["frozen, linear head"] = []
        for seed in range(args.seeds):
            margins, choices = heads(part, reads, seed)
            found["frozen, linear head"].append(judged(part, margins, seen) | {"seed": seed, "chosen": choices})
    for kind in MODELS:
        for seed in range(args.seeds):
            done = [network_file(args, kind, name, seed, fold) for fold in range(FOLDS)]
            for file in filter(Path.exists, done):
                record.made_with(file, **how(args))
            parts = [json.loads(file.read_text(encoding="utf-8")) for file in done if file.exists()]
            margin = {key: value for part in parts for key, value in part["margins"].items()}
            if margin:
                seen = np.array([pair.id in margin for pair in pairs])
                margins = np.array([margin.get(pair.id, 0.0) for pair in pairs])
                found.setdefault(kind, []).append(
                    judged(data, margins, seen)
                    | {"seed": seed, "folds": len(parts), "trained": [part["trained"] for part in parts]}
                )
    return found


def cuts(data: Data, form: ChatFormat, args: argparse.Namespace) -> dict[str, int]:
    """How much of the texts the limits leave out."""
    long = [len(form.tokenizer(side[-1].content)["input_ids"]) >= args.max_reply_tokens
            for p in data.pairs for side in (p.chosen, p.rejected)]  # fmt: skip
    free = ChatFormat(form.tokenizer, 10**6)
    deep = [sum(map(len, free.prompt(p.prompt))) > args.max_prompt_tokens for p in data.pairs]
    return {"contexts": len(deep), "contexts_cut": sum(deep), "replies": len(long), "replies_cut": sum(long)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where finished pieces are kept")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--do", nargs="+", choices=("read", "train", "report"), default=("read", "train", "report"))
    parser.add_argument("--sets", nargs="+", choices=tuple(SETS), default=tuple(SETS))
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=("pointwise", "pairwise"))
    parser.add_argument("--model", default=judges.BASE, help=f"the base model: {bench.MODELS}")
    parser.add_argument("--layers", type=int, default=6, help="of it that our networks keep")
    parser.add_argument("--seeds", type=int, default=3, help="how many splits by prompt")
    parser.add_argument("--trained-seeds", type=int, default=1, help="how many of them networks are trained on")
    parser.add_argument("--trained-folds", type=int, default=FOLDS, help="on how many of the two folds they are judged")
    parser.add_argument(
        "--train-pairs", type=int, help="of a fold that a network learns from, drawn by seed; all if absent"
    )
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-prompt-tokens", type=int, default=224)
    parser.add_argument("--max-reply-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no new piece after so many")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if not (args.data / f"{SETS['hh']}.parquet").exists():
        raise SystemExit(
            f"{args.data} holds no {SETS['hh']}.parquet: the data of real people are not in the repository."
        )
    (args.work / "model").mkdir(parents=True, exist_ok=True)
    args.base = bench.folder(args.model, args.work / "model")
    torch.set_num_threads(args.threads)
    about = record.circumstances(args, bench.VERSIONS)
    sets = {name: load(args.data, name) for name in args.sets}
    began = time.perf_counter()
    for name, data in sets.items():
        if "read" in args.do:
            for _ in reading(data, name, args):
                if time.perf_counter() - began > 60 * args.minutes:
                    return
    plan = [(name, kind, seed, fold) for seed in range(args.trained_seeds) for fold in range(args.trained_folds)
            for kind in args.models for name in args.sets]  # fmt: skip
    for name, kind, seed, fold in plan if "train" in args.do else []:
        if time.perf_counter() - began > 60 * args.minutes:
            return
        trained(sets[name], name, kind, seed, fold, args)
    if "report" not in args.do:
        return
    figures: dict[str, Any] = dict(about)
    form = chat_form(args)
    for name, data in sets.items():
        found, limits = report(data, name, args), cuts(data, form, args)
        skipped = dict(data.skipped)
        figures[name] = {"pairs": len(data.pairs), "skipped": skipped, "cuts": limits, "models": found}
        print(f"\n{name}: {len(data.pairs)} pairs; skipped: {skipped or 'none'}")
        print(f"contexts cut {limits['contexts_cut']}, replies cut {limits['replies_cut']} of {limits['replies']}\n")
        views = list(found["longer wins, words"][0]["accuracy"])
        rows = [
            (model, one.get("seed"), *(record.said(one["accuracy"][view], n=True) for view in views))
            for model, several in found.items() for one in several
        ]  # fmt: skip
        record.table(("model", "seed", *views), rows)
    record.write(args.json, figures)


if __name__ == "__main__":
    main()
