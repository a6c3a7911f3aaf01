"""Train the small safety model on DiaSafety and say honestly what it is worth (docs/decisions/052).

    python scripts/train_safety.py DATA [--out FILE.npz] [--json FILE]

DATA is a folder with diasafety.parquet (Apache-2.0), and to judge with xstest_completions.parquet and three sets of
ordinary chat. Chat from the package chitchat-dataset (MIT) sets the threshold, and other conversations of it check it.
Training data: DiaSafety's training split without contexts that its validation split has too; judged on the validation
split. The strength of regularisation is chosen by cross-validation inside the training split. Repeatable: nothing is
drawn but bootstraps.
"""

import argparse
import importlib.metadata
import itertools
import json
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from characterflywheel import intervals
from characterflywheel.records import Estimate
from characterflywheel.reward.evaluate import area_under_curve, auc_by_group
from characterflywheel.safety.classifiers import normalise
from characterflywheel.safety.policy import SafetyPolicy
from characterflywheel.safety.small_model import BITS, WEIGHTS, WINDOW, SmallModel, ngrams

ABOUT = "Linear weights on hashed character n-grams, trained on DiaSafety (thu-coai, Apache-2.0). Licence: Apache-2.0."
ORDINARY_REFUSED = 0.01
STRENGTHS = (0.01, 0.03, 0.1, 0.3)
RARE = 3
Floats = NDArray[np.float64]


class Said(NamedTuple):
    """A message after another, whether it is harmful, and its kind."""

    text: str
    context: str
    unsafe: bool = False
    kind: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    learn, judge = diasafety(args.data)
    strength, tried = best_strength(learn)
    train(learn, strength, args.out)
    tune, ordinary = chitchat()
    figures: dict[str, Any] = {
        "train": len(learn),
        "strength": strength,
        "cross_validated": tried,
        "bytes": args.out.stat().st_size,
    }
    model = SmallModel(0.5, args.out)
    figures |= worth(model, judge, tune, ordinary, xstest(args.data))
    figures["refused_elsewhere"] = {
        name: shown(intervals.share(scored(model, rows) >= figures["threshold"]))
        for name, rows in elsewhere(args.data).items()
    }
    text = json.dumps(figures, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


def diasafety(data: Path) -> tuple[list[Said], list[Said]]:
    """What to learn from and what to judge on; no context is in both."""
    rows = pq.read_table(data / "diasafety.parquet").to_pylist()
    sides: dict[bool, list[Said]] = {True: [], False: []}
    for row in rows:
        said = Said(row["response"], row["context"], row["label"] == "unsafe", row["category"])
        sides[row["split"] == "train"].append(said)
    held = {normalise(said.context) for said in sides[False]}
    return [said for said in sides[True] if normalise(said.context) not in held], sides[False]


def chitchat() -> tuple[list[Said], list[Said]]:
    """Ordinary messages, each after the one before: those that set the threshold, and those that check it."""
    (file,) = (f for f in importlib.metadata.files("chitchat-dataset") or () if f.name == "dataset.json")
    sides: tuple[list[Said], list[Said]] = ([], [])
    for id, conversation in sorted(json.loads(Path(str(file.locate())).read_text(encoding="utf-8")).items()):
        turns = [" ".join(part["text"] for part in burst).strip() for burst in conversation["messages"]]
        side = sides[zlib.crc32(id.encode()) % 2]
        side += [Said(text, before) for before, text in itertools.pairwise(["", *turns]) if text]
    return sides[0][::6], sides[1][::6]


def elsewhere(data: Path) -> dict[str, list[Said]]:
    """Ordinary chat from other places: did the threshold only fit one crowd?"""
    convai = pq.read_table(data / "convai2_dialogs.parquet", columns=["turns"])["turns"].to_pylist()
    persona = pq.read_table(data / "spc.parquet", columns=["turns"])["turns"].to_pylist()
    topical = pq.read_table(data / "topical_chat_turns.parquet").to_pylist()
    topical.sort(key=lambda turn: (turn["conversation_id"], turn["turn"]))
    talks = {
        "convai2, people": [[(turn["text"], turn["role"] == "user") for turn in json.loads(turns)] for turns in convai],
        "topical chat": [
            [(turn["message"], True) for turn in turns]
            for _, turns in itertools.groupby(topical, lambda turn: turn["conversation_id"])
        ],
        "synthetic persona chat": [[(turn["content"], True) for turn in json.loads(turns)] for turns in persona],
    }
    return {
        name: [
            Said(text, before)
            for turns in conversations
            for (before, _), (text, person) in itertools.pairwise([("", False), *turns])
            if text and person
        ]
        for name, conversations in talks.items()
    }


def xstest(data: Path) -> list[Said]:
    """Prompts that only sound harmful (safe), and ones that are."""
    rows = pq.read_table(data / "xstest_completions.parquet", columns=["prompt", "type"]).to_pylist()
    kinds = {row["prompt"]: row["type"] for row in rows}
    return [Said(prompt, "", kind.startswith("contrast")) for prompt, kind in kinds.items()]


def counted(rows: Sequence[Said]) -> sparse.csr_matrix:
    """One row a message: counts of its n-grams over the root of their number, then the same for its context."""
    sides = []
    for field in ("text", "context"):
        ends, where, values = [0], [], []
        for said in rows:
            found = ngrams(normalise(getattr(said, field))[:WINDOW], field)
            columns, counts = np.unique(found, return_counts=True)
            where.append(columns)
            values.append(counts / np.sqrt(max(len(found), 1)))
            ends.append(ends[-1] + len(columns))
        flat = (np.concatenate(values), np.concatenate(where), ends)
        sides.append(sparse.csr_matrix(flat, shape=(len(rows), 1 << BITS)))
    return sparse.hstack(sides).tocsr()


def rarity(matrix: sparse.csr_matrix) -> Floats:
    """Inverse document frequency, as scikit-learn smooths it; 0 for what fewer than three messages have."""
    seen = np.asarray((matrix > 0).sum(axis=0)).ravel()
    scale = np.log((1 + matrix.shape[0]) / (1 + seen)) + 1
    return np.where(seen < RARE, 0.0, scale)


def fit(matrix: sparse.csr_matrix, labels: NDArray[np.bool_], strength: float) -> tuple[Floats, float]:
    """Weights of raw counts, and the bias."""
    scale = rarity(matrix)
    model = LogisticRegression(C=strength, solver="liblinear", max_iter=300, random_state=0)
    model.fit(matrix.multiply(scale).tocsr(), labels)
    return model.coef_[0] * scale, float(model.intercept_[0])


def best_strength(rows: Sequence[Said]) -> tuple[float, dict[str, float]]:
    """The inverse regularisation with the best AUC over five folds, no context in two of them."""
    matrix, labels = counted(rows), np.array([said.unsafe for said in rows])
    groups = [normalise(said.context) for said in rows]
    tried = {}
    for strength in STRENGTHS:
        scores = np.zeros(len(rows))
        for learn, judge in GroupKFold(5).split(labels, labels, groups):
            weights, bias = fit(matrix[learn], labels[learn], strength)
            scores[judge] = matrix[judge] @ weights + bias
        tried[strength] = area_under_curve(labels, scores)
    return max(tried, key=lambda strength: tried[strength]), {f"{s:g}": round(auc, 4) for s, auc in tried.items()}


def train(rows: Sequence[Said], strength: float, out: Path) -> None:
    """Fit on all rows and write the weights, half precision."""
    weights, bias = fit(counted(rows), np.array([said.unsafe for said in rows]), strength)
    text, context = weights.astype(np.float16).reshape(2, -1)
    np.savez_compressed(out, text=text, context=context, bias=np.float32(bias), about=np.array(ABOUT))


def worth(
    model: SmallModel, judge: Sequence[Said], tune: Sequence[Said], ordinary: Sequence[Said], prompts: Sequence[Said]
) -> dict[str, object]:
    """Everything the decision page quotes."""
    scores = {name: scored(model, rows) for name, rows in
              (("judge", judge), ("tune", tune), ("ordinary", ordinary), ("prompts", prompts))}  # fmt: skip
    threshold = float(np.ceil(np.quantile(scores["tune"], 1 - ORDINARY_REFUSED) * 100) / 100)
    policy = SafetyPolicy()
    kinds = {"all": [True] * len(judge)} | {
        kind: [said.kind == kind for said in judge] for kind in sorted({said.kind for said in judge})
    }
    return {
        "threshold": threshold,
        "ordinary_refused": shown(intervals.share(scores["ordinary"] >= threshold)),
        "ordinary_refused_by_rules": shown(refused(policy, ordinary)),
        "harmless_prompts_refused": shown(above(scores["prompts"], prompts, threshold, unsafe=False)),
        "harmful_prompts_refused": shown(above(scores["prompts"], prompts, threshold, unsafe=True)),
        "prompts_auc": shown(area(prompts, scores["prompts"])),
        "diasafety": {
            kind: at(np.flatnonzero(chosen), judge, scores["judge"], threshold, policy)
            for kind, chosen in kinds.items()
        },
        "microseconds": timed(model, ordinary[:2000]),
        "microseconds_rules": timed(lambda text, context: policy.check(text, context=context), ordinary[:2000]),
        "mean_characters": float(np.mean([len(said.text) for said in ordinary[:2000]])),
    }


def at(
    which: NDArray[np.int64], judge: Sequence[Said], every: Floats, threshold: float, policy: SafetyPolicy
) -> object:
    """One category: ranking, recall where 5% of its own safe replies are refused, and at the default threshold."""
    rows, scores = [judge[i] for i in which], every[which]
    return {
        "safe": sum(not said.unsafe for said in rows),
        "unsafe": sum(said.unsafe for said in rows),
        "auc": shown(area(rows, scores)),
        "recall_at_5_percent": shown(recall_at(rows, scores, 0.05)),
        "recall_at_threshold": shown(above(scores, rows, threshold, unsafe=True)),
        "safe_refused_at_threshold": shown(above(scores, rows, threshold, unsafe=False)),
        "recall_of_rules": shown(refused(policy, [said for said in rows if said.unsafe])),
    }


def scored(model: SmallModel, rows: Sequence[Said]) -> Floats:
    return np.array([model.probability(said.text, said.context) for said in rows])


def area(rows: Sequence[Said], scores: Floats) -> Estimate:
    """AUC, bootstrapped by context."""
    groups = [said.context or said.text for said in rows]
    return auc_by_group([said.unsafe for said in rows], scores, groups, seed=0)


def above(scores: Floats, rows: Sequence[Said], threshold: float, *, unsafe: bool) -> Estimate:
    """Share refused among the harmful, or the harmless."""
    return intervals.share(
        [score >= threshold for score, said in zip(scores, rows, strict=True) if said.unsafe == unsafe]
    )


def refused(policy: SafetyPolicy, rows: Sequence[Said]) -> Estimate:
    return intervals.share([not policy.check(said.text, context=said.context).allowed for said in rows])


def recall_at(rows: Sequence[Said], scores: Floats, false_positives: float) -> Estimate:
    """Recall where so many of the safe are refused; percentile bootstrap of rows, the cut found anew in each draw."""
    unsafe = np.array([said.unsafe for said in rows])
    bad, good = scores[unsafe], scores[~unsafe]
    rng = np.random.default_rng(0)

    def recall(bad: Floats, good: Floats) -> float:
        return float((bad > np.quantile(good, 1 - false_positives)).mean())

    draws = [recall(rng.choice(bad, len(bad)), rng.choice(good, len(good))) for _ in range(1000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(value=recall(bad, good), low=float(low), high=float(high), n=len(bad))


def timed(classifier: object, rows: Sequence[Said]) -> float:
    """Median of five rounds: microseconds of CPU time a message."""
    rounds = []
    for _ in range(5):
        start = time.process_time()
        for said in rows:
            classifier(said.text, said.context)  # type: ignore[operator]
        rounds.append((time.process_time() - start) / len(rows) * 1e6)
    return float(np.median(rounds))


def shown(estimate: Estimate) -> dict[str, object]:
    """Value, interval and n, three digits."""
    digits = {k: round(v, 4) if isinstance(v, float) else v for k, v in estimate.model_dump().items()}
    return {name: digits[name] for name in ("value", "low", "high", "n")}


if __name__ == "__main__":
    main()
