"""Over-optimisation in the embedded world: does the proxy's choice still please the gold model?

    python benchmarks/overoptimisation.py --work FOLDER --workspace DIR [--proxy-prompts 6 24] [--seeds 2]
        [--questions 60] [--candidates 64] [--minutes M] [--json FILE]

Best-of-n with exact order statistics and the forms of Gao, Schulman, Hilton (2022), by the product's own functions. The
policy is the workspace's base model (CTranslate2, int8). The world's annotators review the replies that the workspace's
stages made. The users of those prompts are split: a few prompts' pairs train a proxy, all others' the gold model, with
another seed; once on the proxy's own backbone, as the product does, and once on an encoder. Candidates are drawn for
prompts of users who are in neither. Beside the gold models stands the world's truth, the mean utility of the replies to
a crowd that no model learnt from: a check of gold itself that only a simulated world allows. Nothing is chosen by these
curves.

Finished pieces stay in `--work` and a killed run goes on. After `--minutes` no more prompts are answered, and the
curves are over those that were. The workspace is only read.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import bench
import judges
import record
import reward_world
import world
from characterflywheel import intervals, tables, worlds
from characterflywheel.characters import load_characters
from characterflywheel.config import RewardConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.ids import derive_seed
from characterflywheel.ledger import OptimisationCurve
from characterflywheel.llm.base import Sampling
from characterflywheel.llm.ct2 import CTranslate2Model
from characterflywheel.llm.identity import identity
from characterflywheel.llm.models import base_model_folder
from characterflywheel.records import Estimate, Preference, Prompt
from characterflywheel.reward import format, screen
from characterflywheel.reward.network import backbone_folder
from characterflywheel.reward.overoptimisation import best_of_n
from characterflywheel.reward.overoptimisation.bootstrap import At, Numbers, resampled
from characterflywheel.reward.overoptimisation.curve import curve, said
from characterflywheel.reward.pointwise import Pointwise
from characterflywheel.simulation.reactions import utility
from characterflywheel.simulation.senses import Scene
from characterflywheel.simulation.users import draw_crowd
from characterflywheel.simulation.world import SimulatedPeople
from characterflywheel.store import EventStore
from characterflywheel.workspace import Workspace

CHUNK = 6
CROWD = 200
GOLD_SEED = 1000  # no proxy's
GOLDS = {"gold": None, "gold on an encoder": judges.ENCODER}  # None: the proxy's own backbone


class Sides(NamedTuple):
    """Pairs by whom they train."""

    proxy: dict[int, list[Preference]]
    gold: list[Preference]
    held_out: list[Preference]


def kept(path: Path, make: Callable[[], Numbers]) -> Numbers:
    """An array that is made once."""
    if not path.exists():
        with path.with_suffix(".partial").open("wb") as file:
            np.save(file, make())
        path.with_suffix(".partial").replace(path)
    return np.asarray(np.load(path))


def asked(root: Path, data: world.World, most: int, seed: int) -> list[Prompt]:
    """Prompts of users whom no annotator read, drawn by seed."""
    every = {p.id: p for f in sorted(root.glob("artifacts/curate-*/prompts.parquet")) for p in tables.read(f, Prompt)}
    read = {p.user_id for p in data.prompts}
    fresh = sorted((p for p in every.values() if p.user_id not in read), key=lambda p: p.id)
    if len(fresh) < 2:
        raise FlywheelError(f"{root} has {len(fresh)} prompts of other users, must be two or more.")
    order = np.random.default_rng(seed).permutation(len(fresh))[:most]
    return [fresh[i] for i in sorted(order)]


def sides(pairs: Sequence[Preference], sizes: Sequence[int], held_out: int, seed: int) -> Sides:
    """Whole users apart: `held_out` prompts judge, the largest of `sizes` prompts are the proxies' (a smaller proxy
    learns from the first of them), all others train the gold model.
    """
    by_user: dict[str, list[Preference]] = {}
    for pair in pairs:
        by_user.setdefault(pair.user_id, []).append(pair)
    line: list[list[Preference]] = []
    for user in sorted(by_user, key=lambda name: derive_seed(seed, name)):
        by_prompt: dict[str, list[Preference]] = {}
        for pair in by_user[user]:
            by_prompt.setdefault(pair.prompt_id, []).append(pair)
        line += by_prompt.values()
    judged, cut = line[:held_out], held_out + max(sizes)
    users = {p.user_id for mine in line[:cut] for p in mine}
    judges_of = {p.user_id for mine in judged for p in mine}
    mine = [prompt for prompt in line[held_out:cut] if prompt[0].user_id not in judges_of]
    gold = [p for prompt in line[cut:] for p in prompt if p.user_id not in users]
    return Sides({n: [p for prompt in mine[:n] for p in prompt] for n in sizes}, gold, [p for j in judged for p in j])


def drawn(args: argparse.Namespace, prompts: Sequence[Prompt]) -> dict[str, list[str]]:
    """`--candidates` replies to each prompt, sampled in chunks of prompts; those answered in `--minutes`, by id."""
    settings = Workspace.open(args.workspace).config()
    began, found = time.perf_counter(), dict[str, list[str]]()
    model: CTranslate2Model | None = None
    for at in range(0, len(prompts), CHUNK):
        file = args.work / f"replies-{args.candidates}-{at:03d}.json"
        record.made_with(
            file, base=identity(settings.models.base), temperature=args.temperature, max_tokens=args.max_tokens,
            max_prompt_tokens=settings.models.max_prompt_tokens, seed=args.seed,
            prompts=record.digest((p.id, p.messages) for p in prompts[at : at + CHUNK]),
        )  # fmt: skip
        if not file.exists():
            if time.perf_counter() - began > 60 * args.minutes:
                break
            model = model or CTranslate2Model.load(
                base_model_folder(settings.models.base), "base", threads=args.threads, batch_replies=args.candidates,
                max_prompt_tokens=settings.models.max_prompt_tokens,
            )  # fmt: skip
            some = prompts[at : at + CHUNK]
            sampling = Sampling(temperature=args.temperature, max_tokens=args.max_tokens)
            replies = model.complete(
                [p.messages for p in some], n=args.candidates, sampling=sampling,
                seeds=[derive_seed(args.seed, "candidates", p.id) for p in some],
            )  # fmt: skip
            texts = {p.id: [one.text for one in several] for p, several in zip(some, replies, strict=True)}
            file.write_text(json.dumps(texts), encoding="utf-8")
            print(f"{at + len(some)} of {len(prompts)} prompts answered, {time.perf_counter() - began:.0f} s")
        found |= json.loads(file.read_text(encoding="utf-8"))
    return found


def truth(args: argparse.Namespace, prompts: Sequence[Prompt], replies: Sequence[Sequence[str]]) -> Numbers:
    """Mean utility of every reply to a crowd of its own, (prompts, replies)."""
    space = Workspace.open(args.workspace)
    config = space.config().model_copy(update={"seed": args.seed})
    config = config.model_copy(update={"models": config.models.model_copy(update={"threads": args.threads})})
    characters = load_characters(space.characters)
    with EventStore.open(args.work / "empty.db") as store:
        people = worlds.people_of(space, config, store)
    if not isinstance(people, SimulatedPeople):
        raise FlywheelError(f"{space.root} has no simulated people: give a workspace of the embedded world.")
    lore = people.lore
    crowd = draw_crowd(lore.real.fits, CROWD, args.seed, "over-optimisation")
    rows = []
    for prompt, texts in zip(prompts, replies, strict=True):
        seen = lore.senses.observe([Scene(characters[prompt.character_id], prompt.messages, text) for text in texts])
        each = [utility(np.repeat(row[None], CROWD, 0), crowd, lore.anchor).mean() for row in seen]
        rows.append(each)
    return np.array(rows)


def judged_pairs(model: Pointwise, pairs: Sequence[Preference]) -> Numbers:
    """Log-odds of the chosen reply of every pair."""
    return np.array(judges.margins(model, pairs))


def scored(model: Pointwise, prompts: Sequence[Prompt], replies: Sequence[Sequence[str]]) -> Numbers:
    """(prompts, replies)."""
    return np.array(model.score([prompt.messages for prompt in prompts], replies))


def arguments() -> argparse.Namespace:
    """The settings, see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where finished pieces are kept")
    parser.add_argument("--workspace", type=Path, required=True, help="of the embedded world, with curated prompts")
    parser.add_argument("--held-out", type=int, default=24, help="prompts whose pairs only judge")
    parser.add_argument("--proxy-prompts", type=int, nargs="+", default=[6, 24], help="prompts a proxy learns from")
    parser.add_argument("--seeds", type=int, default=2, help="starts of each proxy's training")
    parser.add_argument("--pairs", type=int, default=4, help="at most so many of a prompt train or judge")
    parser.add_argument("--reviewers", type=int, default=5, help="reviews of each prompt")
    parser.add_argument("--questions", type=int, default=60, help="prompts to answer for the curves")
    parser.add_argument("--candidates", type=int, default=64, help="N, replies to each of them")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9, help="draw no more replies after so many")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    about = record.circumstances(args, bench.VERSIONS)
    data = world.make(args.work, args.workspace, reviewers=args.reviewers, seed=args.seed, threads=args.threads)
    wanted = asked(args.workspace, data, args.questions, args.seed)
    texts = drawn(args, wanted)
    questions = [prompt for prompt in wanted if prompt.id in texts]
    replies = [texts[prompt.id] for prompt in questions]
    size = f"{len(questions)}-{args.candidates}"
    answers = record.digest(zip((prompt.id for prompt in questions), replies, strict=True))
    record.made_with(args.work / f"truth-{size}.npy", seed=args.seed, crowd=CROWD, answers=answers)
    true = kept(args.work / f"truth-{size}.npy", partial(truth, args, questions, replies))
    config = RewardConfig()
    form = format.make(backbone_folder(judges.BASE), config.max_prompt_tokens, config.max_reply_tokens)
    pairs = screen.screen(world.pairs(data, args.reviewers, share=0.1, seed=args.seed), form).kept
    parts = sides(reward_world.thin(pairs, args.pairs, args.seed), args.proxy_prompts, args.held_out, args.seed)
    judged, accuracy = {}, {}
    contenders = {
        f"proxy-{n}-seed{seed}": (parts.proxy[n], seed, config)
        for n in args.proxy_prompts
        for seed in range(args.seeds)
    } | {name: (parts.gold, GOLD_SEED, RewardConfig(backbone=backbone)) for name, backbone in GOLDS.items()}
    for name, (mine, seed, how) in contenders.items():
        file = f"{name.replace(' ', '-')}-{len(mine)}-pairs"
        right, scores = (args.work / f"{file}-{what}.npy" for what in ("accuracy", f"scores-{size}"))
        taught = reward_world.taught(mine)
        record.made_with(right, config=how.model_dump(), taught=taught, judged=reward_world.taught(parts.held_out))
        record.made_with(scores, config=how.model_dump(), taught=taught, answers=answers)
        if not (right.exists() and scores.exists()):
            model = judges.trained("pointwise", mine, how, seed, args.threads, args.work / f"{file}.weights")
            assert isinstance(model, Pointwise)
            found = kept(right, partial(judged_pairs, model, parts.held_out))
            print(f"{name}: {len(mine)} pairs, right on {np.mean(found > 0):.0%} of {len(parts.held_out)} held out")
            kept(scores, partial(scored, model, questions, replies))
        judged[name] = np.load(scores)
        accuracy[name] = intervals.share((np.sign(np.load(right)) + 1) / 2, [p.user_id for p in parts.held_out])
    asking = [prompt.user_id for prompt in questions]
    weights, people = resampled(asking, 1000, args.seed), len(set(asking))
    where = [At(len(questions), people, n=n + 1) for n in range(args.candidates)]

    def measured(proxy: Numbers, gold: Numbers) -> OptimisationCurve:
        return curve("best_of_n", where, best_of_n.measure(proxy, gold, weights), prompts=len(questions),
                     users=people, replies=proxy.size, ties=best_of_n.ties(proxy))  # fmt: skip

    curves: dict[str, dict[str, OptimisationCurve]] = {
        name: {by: measured(scores, judged[by]) for by in GOLDS if name not in GOLDS}
        | {"truth": measured(scores, true)}
        for name, scores in judged.items()
    }
    sizes = {name: len(mine) for name, (mine, _, _) in contenders.items()}
    show(about, args, curves, accuracy, sizes)
    record.write(args.json, about | {
        "prompts": len(questions), "pairs": sizes,
        "held_out_pairs": len(parts.held_out),
        "accuracy": {name: one.model_dump() for name, one in accuracy.items()},
        "curves": {f"{name}, {by}": one.model_dump(mode="json") for name, both in curves.items()
                   for by, one in both.items()},
    })  # fmt: skip


def show(about: dict[str, object], args: argparse.Namespace, curves: dict[str, dict[str, OptimisationCurve]],
         accuracy: dict[str, Estimate], pairs: dict[str, int]) -> None:  # fmt: skip
    """The curves at powers of two, and what is said of them."""
    number = partial(record.said, digits=2, why=True)
    at = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= args.candidates]
    rows = []
    for name, both in curves.items():
        first = next(iter(both.values()))
        rows.append((f"{name} ({pairs[name]} pairs)", "itself", *(number(first.points[n - 1].proxy) for n in at)))
        rows += [("", by, *(number(one.points[n - 1].gold) for n in at)) for by, one in both.items()]
    record.show(about, ("best by", "judged by", *(f"n = {n}" for n in at)), rows)
    print(f"\nstandard deviations of the policy's replies to one prompt; ties {first.ties:.1%} of pairs\n")
    for name, both in curves.items():
        for by, one in both.items():
            fit = one.gold
            print(f"{name}, {by}: {said(one)}; alpha {number(fit.alpha)}, beta {number(fit.beta)}, R2 {fit.r2:.3f}, "
                  f"turn {number(fit.turn)}; gap grows by {number(one.gap_growth)}")  # fmt: skip
    for name, right in accuracy.items():
        print(f"accuracy of {name} on held-out pairs: {number(right)}")


if __name__ == "__main__":
    main()
