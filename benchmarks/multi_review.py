"""One review or several (PAPER section 3, Multi-review): on which test set does a trained reward model look better?

    python benchmarks/multi_review.py --work FOLDER [--sets world satisfaction] [--seeds 3] [--do read train report]
        [--workspace DIR] [--data ../shared/data] [--minutes M] [--json FILE]

The paper: on a test set with one random review an item, trained and untrained models look alike; where several
reviewers agree, the trained one is clearly better. So: the gap between trained and untrained on the consensus set less
the gap on the single-review set, with an interval by user (world) or dialog (satisfaction).

world: pairs of one prompt's replies, each prompt judged by 7 of the embedded world's annotators. Single: one of the 7,
drawn. Consensus: at least 6 agree. satisfaction: people rated every user turn of a dialog, 3 or more people each
(`uss_turns.parquet`); a turn's ratings are taken as said of the reply before it. A pair is two replies of one dialog,
and a rater prefers the one that was rated higher. Single: one rater, drawn, pairs that tie for that rater left out.
Consensus: two or more have a preference and nobody the opposite one.

Untrained: `random head` (random weights on the states of the layer where the trained head stands), `likelihood` (the
base model's log-probability a token), `old` (the same kind of model trained on a sixth of the prompts). Trained: `one
review` (each prompt's labels are one reviewer's), `majority of 3` (a third of the prompts, hard majority labels: as
many reviews) and, three times as dear, `3 reviews` (soft labels on all prompts). Heads are linear Bradley-Terry on the
frozen base model; `network` is the product's pointwise model, world only, once it was trained (`--do train`).
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import bench
import frozen
import judges
import record
import reward_world
import satisfaction
import world
from characterflywheel import intervals
from characterflywheel.records import Estimate, Preference

Ints = NDArray[np.int64]
DRAWS, PROMPTS_AT_ONCE = 4000, 8
TRAINED, NETWORK = ("one review", "majority of 3", "3 reviews"), "network, "


class Reviewed(NamedTuple):
    """Pairs of replies with all their reviews. `first`, `second`: places of the replies. `votes`: (pairs, reviewers),
    1 for the first, -1 for the second, 0 for neither. `item`: what a review covers (a prompt, a dialog). `unit`: what
    is split and resampled (a user, a dialog). `names`: each reply's name."""

    first: Ints
    second: Ints
    votes: NDArray[np.int8]
    item: NDArray[Any]
    unit: NDArray[Any]
    names: tuple[str, ...]


class Tests(NamedTuple):
    """The test sets of a seed: rows of the pairs and their outcome, 1 where the first reply is the better one."""

    single: tuple[Ints, Ints]
    consensus: tuple[Ints, Ints]
    majority: tuple[Ints, Ints]


class Gains(NamedTuple):
    """What one model is better than another on each test set; `apart`: on the consensus more than on single reviews."""

    single: Estimate
    consensus: Estimate
    majority: Estimate
    apart: Estimate


def reviewed_world(data: world.World) -> Reviewed:
    """All pairs of each prompt's replies that differ, and what every reviewer's ranking says of them."""
    names = tuple(candidate.id for candidate in data.candidates)
    place = {name: i for i, name in enumerate(names)}
    rankings: dict[str, list[dict[str, int]]] = {}
    for judgement in data.judgements:
        rankings.setdefault(judgement.prompt_id, []).append({name: n for n, name in enumerate(judgement.ranking)})
    firsts, seconds, votes, items, units = [], [], [], [], []
    for prompt in data.prompts:
        ranks = rankings.get(prompt.id, [])
        mine = sorted(ranks[0]) if ranks else []
        for i, a in enumerate(mine):
            for b in mine[i + 1 :]:
                firsts.append(place[a])
                seconds.append(place[b])
                votes.append([1 if rank[a] < rank[b] else -1 for rank in ranks])
                items.append(prompt.id)
                units.append(prompt.user_id)
    return Reviewed(
        np.array(firsts), np.array(seconds), np.array(votes, dtype=np.int8), np.array(items), np.array(units), names
    )


def training_units(data: Reviewed, share: float, seed: int) -> NDArray[np.bool_]:
    """Whether each pair trains: whole users (dialogs), in an order drawn by seed, about `share` of them."""
    units = np.unique(data.unit)
    chosen = units[np.random.default_rng([seed, 1]).permutation(len(units))[: round(share * len(units))]]
    return np.isin(data.unit, chosen)


def tests(data: Reviewed, held_out: Ints, agree: Callable[[NDArray[np.int8]], NDArray[np.bool_]], seed: int) -> Tests:
    """The three test sets among the pairs `held_out`."""
    votes = data.votes[held_out]
    drawn = np.random.default_rng([seed, 2]).integers(votes.shape[1], size=len(votes))
    one, total = votes[np.arange(len(votes)), drawn], votes.sum(1, dtype=int)

    def those(rows: NDArray[np.bool_], sign: NDArray[Any]) -> tuple[Ints, Ints]:
        return held_out[rows], (sign[rows] > 0).astype(int)

    return Tests(those(one != 0, one), those(agree(votes), total), those(total != 0, total))


def labels(data: Reviewed, rows: Ints, reviewers: int, hard: bool, seed: int) -> frozen.Pairs:
    """Pairs to train on: share of `reviewers` who prefer the first, the same reviewers for all pairs of an item.

    Where nobody has a preference there is nothing to learn; with `hard`, half against half is left out too.
    """
    items, member = np.unique(data.item[rows], return_inverse=True)
    rng = np.random.default_rng([seed, 3])
    orders = np.array([rng.permutation(data.votes.shape[1])[:reviewers] for _ in items])
    votes = np.take_along_axis(data.votes[rows], orders[member], axis=1).astype(int)
    total, said = votes.sum(1), (votes != 0).sum(1)
    label = np.where(said > 0, (1 + total / np.maximum(said, 1)) / 2, 0.5)
    told = (total != 0) if hard else said > 0
    label = (total > 0).astype(float) if hard else label
    kept = rows[told]
    return frozen.Pairs(data.first[kept], data.second[kept], label[told].astype(np.float32), data.item[kept])


def some_items(data: Reviewed, rows: Ints, share: float, seed: int) -> Ints:
    """The rows of a share of the items, drawn by seed."""
    items = np.unique(data.item[rows])
    chosen = items[np.random.default_rng([seed, 4]).permutation(len(items))[: max(4, round(share * len(items)))]]
    return rows[np.isin(data.item[rows], chosen)]


def batches(data: Reviewed, rows: Ints, seed: int) -> dict[str, frozen.Pairs]:
    """What each trained model learns from: pairs, labels and what the reviews cost."""
    return {
        "old": labels(data, some_items(data, rows, 1 / 6, seed), 1, True, seed),
        "one review": labels(data, rows, 1, True, seed),
        "majority of 3": labels(data, some_items(data, rows, 1 / 3, seed), 3, True, seed),
        "3 reviews": labels(data, rows, 3, False, seed),
    }


def head_scores(data: Reviewed, reads: frozen.Reads, rows: Ints, seed: int) -> dict[str, NDArray[np.float64]]:
    """A score of every reply from every model that stands on the frozen base model."""
    found, choice = {"likelihood": reads.logprob.astype(float)}, 0
    for name, pairs in batches(data, rows, seed).items():
        head = frozen.fit_head(reads, pairs)
        found["old head" if name == "old" else name] = frozen.scores(reads, head)
        choice = head.choice[1]
    return found | {"random head": frozen.random_scores(reads, choice, seed)}


def right(score: NDArray[np.float64], data: Reviewed, test: tuple[Ints, Ints]) -> NDArray[np.float64]:
    """1 where the better reply scores higher, 0.5 where both score the same."""
    rows, outcome = test
    apart = (score[data.first[rows]] - score[data.second[rows]]) * (2 * outcome - 1)
    return np.asarray((apart > 0) + 0.5 * (apart == 0), dtype=float)


def gains(data: Reviewed, sets: Tests, new: NDArray[np.float64], old: NDArray[np.float64], seed: int) -> Gains:
    """Accuracy of `new` less that of `old`, paired, percentile bootstrap by unit."""
    units, member = np.unique(data.unit, return_inverse=True)
    times = np.random.default_rng([seed, 5]).multinomial(len(units), np.full(len(units), 1 / len(units)), size=DRAWS)
    values, draws = {}, {}
    for name, test in sets._asdict().items():
        gain = right(new, data, test) - right(old, data, test)
        sums = np.bincount(member[test[0]], gain, len(units)), np.bincount(member[test[0]], minlength=len(units))
        values[name], draws[name] = float(gain.mean()), (times @ sums[0]) / np.maximum(times @ sums[1], 1)

    def estimate(value: float, drawn: NDArray[np.float64], n: int) -> Estimate:
        low, high = np.quantile(drawn, [0.025, 0.975])
        return Estimate(value=value, low=float(low), high=float(high), n=n)

    each = {name: estimate(values[name], draws[name], len(test[0])) for name, test in sets._asdict().items()}
    apart = values["consensus"] - values["single"], draws["consensus"] - draws["single"]
    return Gains(**each, apart=estimate(*apart, len(sets.consensus[0])))


def compare(
    data: Reviewed, sets: Tests, score: dict[str, NDArray[np.float64]], seed: int
) -> tuple[dict[str, dict[str, Estimate]], dict[str, dict[str, Gains]]]:
    """Accuracy of each model on each test set; what each trained one gains over each untrained one, and one review
    over as many reviews spent on a majority of three."""
    accuracy = {
        name: {
            test: intervals.share(right(mine, data, rows), data.unit[rows[0]].tolist())
            for test, rows in sets._asdict().items()
        }
        for name, mine in score.items()
    }
    trained = [name for name in score if name.removeprefix(NETWORK) in TRAINED]
    untrained = [name for name in score if name not in trained]
    duels = [(a, b) for a in trained for b in untrained]
    duels += [(f"{kind}one review", f"{kind}majority of 3") for kind in ("", NETWORK)]
    gained: dict[str, dict[str, Gains]] = {}
    for a, b in duels:
        if a in score and b in score:
            gained.setdefault(a, {})[b] = gains(data, sets, score[a], score[b], seed)
    return accuracy, gained


def network_scores(
    data: Reviewed, source: world.World, rows: Ints, seed: int, args: Any, train: bool
) -> dict[str, NDArray[np.float64]]:
    """The product's pointwise model trained on the same labels; scores of every reply, kept in `--work`."""
    found: dict[str, NDArray[np.float64]] = {}
    for name, pairs in batches(data, rows, seed).items():
        file: Path = args.work / f"network-{name.replace(' ', '-')}-{args.epochs}-seed{seed}.json"
        config = reward_world.reward_config(args)
        learned = reward_world.thin(preferences(data, source, pairs), args.train_pairs, seed)
        scored_too = record.digest((c.id, c.text) for c in source.candidates)
        record.made_with(file, config=config.model_dump(), taught=reward_world.taught(learned), scored=scored_too)
        if not file.exists():
            if not train or time.perf_counter() > args.until:
                continue
            judge = judges.trained("pointwise", learned, config, seed, args.threads, file.with_suffix(".weights"))
            prompts = {prompt.id: prompt for prompt in source.prompts}
            by_prompt: dict[str, list[int]] = {}
            for i, candidate in enumerate(source.candidates):
                by_prompt.setdefault(candidate.prompt_id, []).append(i)
            scored = judge.score(  # type: ignore[union-attr]
                [prompts[p].messages for p in by_prompt],
                [[source.candidates[i].text for i in mine] for mine in by_prompt.values()],
            )
            flat = dict(zip((i for m in by_prompt.values() for i in m), (s for m in scored for s in m), strict=True))
            file.write_text(json.dumps([flat[i] for i in range(len(data.names))]), encoding="utf-8")
            file.with_suffix(".weights").unlink(missing_ok=True)
        found[f"{NETWORK}{name}"] = np.array(json.loads(file.read_text(encoding="utf-8")))
    return found


def preferences(data: Reviewed, source: world.World, pairs: frozen.Pairs) -> list[Preference]:
    """The pairs as the product's networks take them; undecided ones with label 0.5."""
    prompts = {prompt.id: prompt for prompt in source.prompts}
    out = []
    for a, b, label in zip(pairs.first, pairs.second, pairs.label, strict=True):
        best, rest = (source.candidates[i] for i in ((a, b) if label >= 0.5 else (b, a)))
        prompt = prompts[best.prompt_id]
        sides = {
            name: ({"role": "assistant", "content": side.text},)
            for name, side in (("chosen", best), ("rejected", rest))
        }
        out.append(
            Preference.model_validate(
                sides
                | {"id": f"{best.id} {rest.id}", "prompt_id": prompt.id, "user_id": prompt.user_id,
                   "character_id": prompt.character_id, "source": prompt.source, "prompt": prompt.messages,
                   "chosen_policy": best.policy, "rejected_policy": rest.policy, "reviewers": 1,
                   "label": float(max(label, 1 - label))}
            )
        )  # fmt: skip
    return out


def read_world(source: world.World, args: Any, make: bool) -> frozen.Reads | None:
    """The frozen base model's reads of all candidates, in their order; None while pieces are missing."""
    config, loaded = reward_world.reward_config(args), None
    by_prompt: dict[str, list[int]] = {}
    for i, candidate in enumerate(source.candidates):
        by_prompt.setdefault(candidate.prompt_id, []).append(i)
    prompts = [prompt for prompt in source.prompts if prompt.id in by_prompt]
    files = []
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        file: Path = args.work / f"read-world-{start:05d}.npz"
        if not file.exists():
            if not make or time.perf_counter() > args.until:
                return None
            loaded = loaded or (bench.model(judges.BASE), satisfaction.chat_form(config.max_prompt_tokens))
            some = prompts[start : start + PROMPTS_AT_ONCE]
            texts = [[source.candidates[i].text for i in by_prompt[p.id]] for p in some]
            frozen.save(file, frozen.read(*loaded, [p.messages for p in some], texts, config.max_reply_tokens))
        files.append(file)
    order = [i for prompt in prompts for i in by_prompt[prompt.id]]
    reads = frozen.load(files)
    return frozen.Reads(*(column[np.argsort(order)] for column in reads))


def main() -> None:
    parser = reward_world.arguments(__doc__)
    parser.add_argument("--sets", nargs="+", choices=("world", "satisfaction"), default=("world", "satisfaction"))
    parser.add_argument("--do", nargs="+", choices=("read", "train", "report"), default=("read", "train", "report"))
    parser.add_argument("--network-seeds", type=int, default=3, help="seeds that the product's networks train on")
    parser.add_argument("--train-pairs", type=int, default=6, help="at most so many of a prompt train a network")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument(
        "--dialogs", type=int, default=360, help="dialogs of the satisfaction set, a third of each source"
    )
    parser.set_defaults(train_share=0.4)
    args = parser.parse_args()
    args.until = time.perf_counter() + 60 * args.minutes
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    about = record.circumstances(args, bench.VERSIONS)
    figures: dict[str, Any] = {}
    for name in args.sets:
        reads: frozen.Reads | None
        source: world.World | None = None
        if name == "world":
            source = reward_world.the_world(args)
            data, reads = reviewed_world(source), read_world(source, args, "read" in args.do)
            agree = consensus_of_seven
        else:
            dialogs = satisfaction.load(args.data, args.dialogs, args.world_seed)
            reads = satisfaction.read(dialogs, args, "read" in args.do)
            data, agree = Reviewed(*satisfaction.pairs(dialogs)), consensus_of_raters
        if reads is None or not {"report", "train"} & set(args.do):
            print(f"{name}: {'not read yet: run again' if reads is None else 'read'}")
            continue
        figures[name] = measured(name, data, reads, source, agree, args)
    if "report" in args.do:
        show(about, figures)
        record.write(args.json, about | figures)


def consensus_of_seven(votes: NDArray[np.int8]) -> NDArray[np.bool_]:
    """At least six of seven reviewers agree."""
    return np.asarray(np.abs(votes.sum(1, dtype=int)) >= votes.shape[1] - 2)


def consensus_of_raters(votes: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Two or more have a preference, nobody the opposite one."""
    said = (votes != 0).sum(1)
    return np.asarray((said >= 2) & (np.abs(votes.sum(1, dtype=int)) == said))


def measured(
    name: str, data: Reviewed, reads: frozen.Reads, source: world.World | None, agree: Any, args: Any
) -> list[dict[str, Any]]:
    """Every seed: sizes, accuracies and gaps."""
    out = []
    for seed in range(args.seeds):
        inside = training_units(data, args.train_share if name == "world" else 0.5, seed)
        rows, sets = np.flatnonzero(inside), tests(data, np.flatnonzero(~inside), agree, seed)
        score = {}
        if source is not None and seed < args.network_seeds:
            score = network_scores(data, source, rows, seed, args, "train" in args.do)
        if "report" not in args.do:
            continue
        score = head_scores(data, reads, rows, seed) | score
        accuracy, gained = compare(data, sets, score, seed)
        out.append(
            {"seed": seed, "trained_items": len(set(data.item[rows])), "units": len(set(data.unit[~inside])),
             "pairs": {test: len(found[0]) for test, found in sets._asdict().items()},
             "learned": {batch: len(pairs.first) for batch, pairs in batches(data, rows, seed).items()},
             "accuracy": accuracy,
             "gains": {a: {b: gain._asdict() for b, gain in mine.items()} for a, mine in gained.items()}}
        )  # fmt: skip
    return out


def show(about: dict[str, Any], figures: dict[str, Any]) -> None:
    """The tables."""
    said = record.said
    sizes = [
        (name, one["seed"], one["trained_items"], one["units"], *one["pairs"].values(), str(one["learned"]))
        for name, seeds in figures.items() for one in seeds
    ]  # fmt: skip
    record.show(about, ("set", "seed", "items train", "units judge", *Tests._fields, "pairs learned"), sizes)
    for name, seeds in figures.items():
        print(f"\n{name}: accuracy")
        rows = [
            (model, one["seed"], *(said(mine[test]) for test in Tests._fields))
            for one in seeds for model, mine in one["accuracy"].items()
        ]  # fmt: skip
        record.table(("model", "seed", *Tests._fields), sorted(rows))
        print(f"\n{name}: what the first is better than the second; apart: on consensus more than on single reviews")
        rows = [
            (a, b, one["seed"], *(said(gain[part]) for part in ("single", "consensus", "apart")),
             side_of_zero(gain["apart"]))
            for one in seeds for a, mine in one["gains"].items() for b, gain in mine.items()
        ]  # fmt: skip
        record.table(("first", "second", "seed", "single", "consensus", "apart", "apart > 0"), sorted(rows))


def side_of_zero(gap: Estimate) -> str:
    """Whether the interval lies above zero, below it, or on both sides."""
    if gap.low is None or gap.high is None:
        return "-"
    return "yes" if gap.low > 0 else "no" if gap.high < 0 else "cannot tell"


if __name__ == "__main__":
    main()
