"""Preference data of the embedded world, at a size at which calibration can be measured (DESIGN section 7).

Prompts and replies are those that the stages of a workspace made: curation's prompts, and what the pool of policies
proposed for annotation and for rejection sampling. The world's annotators judge them through the product's tasks, each
prompt by several, and the annotate stage's functions make the pairs. A workspace that somebody else made is only read;
without one, a new one is turned as far as annotation, and a killed call goes on where it was.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from characterflywheel import commands, tables, worlds
from characterflywheel import workspace as workspaces
from characterflywheel.annotation.pairs import Reviewed, make_pairs
from characterflywheel.annotation.tasks import check_judgements, make_tasks
from characterflywheel.characters import load_characters
from characterflywheel.config import AnnotateConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.people import People
from characterflywheel.records import Candidate, Judgement, Preference, Prompt
from characterflywheel.store import EventStore
from characterflywheel.workspace import Workspace

SETTINGS = """\
preset = "quick"
seed = {seed}

[models]
backend = "{backend}"
threads = {threads}

[world]
user_conversations = {users}
internal_conversations = {testers}

[curate]
annotate_share = 0.94
train_share = 0.02
evaluate_share = 0.02

[annotate]
prompts = {prompts}
candidates = {candidates}
"""
ANNOTATORS, PROMPTS_A_DAY = 10, 20  # nobody gets more tired than in the pipeline, where each has a few dozen tasks


class World(NamedTuple):
    """Prompts with their candidates, and every judgement of them."""

    prompts: tuple[Prompt, ...]
    candidates: tuple[Candidate, ...]
    judgements: tuple[Judgement, ...]


def make(work: Path, workspace: Path | None, *, reviewers: int, seed: int, threads: int, **sizes: int) -> World:
    """The replies of a workspace, judged by `reviewers` annotators a prompt; judgements are kept in `work`.

    Without a `workspace`, one is made in `work`; `sizes` are its `prompts` and `candidates` (replies a prompt).
    """
    work.mkdir(parents=True, exist_ok=True)
    root = workspace or _turned(work / "workspace", seed, threads, **sizes)
    prompts, candidates = gathered(root)
    if not prompts:
        raise FlywheelError(f"{root} has no prompt with two replies: give the workspace of a finished generation.")
    names = [f"annotator-{i + 1}" for i in range(max(ANNOTATORS, reviewers))]
    tasks = make_tasks(prompts, candidates, load_characters(root / "characters"), reviewers, names, seed)
    place = {prompt.id: i // PROMPTS_A_DAY for i, prompt in enumerate(prompts)}
    days = [[t for t in tasks if place[t.prompt_id] == day] for day in range(max(place.values()) + 1)]
    judged: list[Judgement] = []
    with ExitStack() as opened:
        people: People | None = None
        for day, mine in enumerate(days):
            file = work / f"judged-{len(prompts)}-{len(candidates)}-{reviewers}-{seed}-{day}.jsonl"
            if not file.exists():
                people = people or _people(root, work, opened)
                tables.write_jsonl(file.with_suffix(".partial"), people.judge(mine))
                file.with_suffix(".partial").replace(file)
            judged += check_judgements(mine, list(tables.read_jsonl(file, Judgement)))
    return World(tuple(prompts), tuple(candidates), tuple(judged))


def _people(root: Path, work: Path, opened: ExitStack) -> People:
    """The crowd of the workspace in `root`; judging writes nothing into the store where they would talk."""
    workspace = Workspace.open(root)
    if workspace.config().world is None:
        raise FlywheelError(f"{root} has no simulated people: give a workspace of the embedded world.")
    return worlds.people_of(workspace, workspace.config(), opened.enter_context(EventStore.open(work / "empty.db")))


def gathered(root: Path) -> tuple[list[Prompt], list[Candidate]]:
    """Prompts that were answered at least twice, and the replies that differ in more than case and spaces."""
    asked = {p.id: p for f in sorted(root.glob("artifacts/curate-*/prompts.parquet")) for p in tables.read(f, Prompt)}
    stages = ("annotate-*/candidates", "rejection_sampling-*/accepted", "rejection_sampling-*/rejected")
    files = [file for name in stages for file in sorted(root.glob(f"artifacts/{name}.parquet"))]
    kept: dict[tuple[str, str], Candidate] = {}
    for candidate in (c for file in files for c in tables.read(file, Candidate)):
        text = " ".join(candidate.text.casefold().split())
        if text and candidate.prompt_id in asked:
            kept.setdefault((candidate.prompt_id, text), candidate.model_copy(update={"score": None}))
    by_prompt: dict[str, list[Candidate]] = {}
    for candidate in sorted(kept.values(), key=lambda c: (c.prompt_id, c.id)):
        by_prompt.setdefault(candidate.prompt_id, []).append(candidate)
    several = {name: mine for name, mine in by_prompt.items() if len(mine) > 1}
    return [asked[name] for name in several], [one for mine in several.values() for one in mine]


def pairs(world: World, reviewers: int, *, share: float, seed: int) -> list[Preference]:
    """Pairs as the annotate stage makes them, from `reviewers` of each prompt's judgements, drawn by seed.

    `share` of the prompts, whole users, are held out, another way for every seed.
    """
    rng = np.random.default_rng([seed, reviewers])
    mine: dict[str, list[Judgement]] = {}
    for judgement in world.judgements:
        mine.setdefault(judgement.prompt_id, []).append(judgement)
    drawn = {name: [all_of[i] for i in rng.permutation(len(all_of))[:reviewers]] for name, all_of in mine.items()}
    return list(make_pairs(_reviewed(world, drawn), AnnotateConfig(held_out_share=share), seed).kept)


def _reviewed(world: World, judgements: dict[str, list[Judgement]]) -> Sequence[Reviewed]:
    alternatives: dict[str, dict[str, Candidate]] = {}
    for candidate in world.candidates:
        alternatives.setdefault(candidate.prompt_id, {})[candidate.id] = candidate
    return [Reviewed(prompt, alternatives[prompt.id], judgements[prompt.id]) for prompt in world.prompts]


def _turned(folder: Path, seed: int, threads: int, *, prompts: int, candidates: int, backend: str = "native") -> Path:
    """A workspace whose crowd has chatted long enough for so many prompts (about two a conversation are kept)."""
    if not list(folder.glob("artifacts/annotate-*/artifact.json")):
        if not (folder / "flywheel.toml").exists():
            workspaces.init(folder, "quick")
        settings = {"users": round(0.4 * prompts), "testers": round(0.13 * prompts), "prompts": prompts,
                    "candidates": candidates, "seed": seed, "threads": threads, "backend": backend}  # fmt: skip
        (folder / "flywheel.toml").write_text(SETTINGS.format(**settings), encoding="utf-8")
        commands.run(Workspace.open(folder), 1, "annotate", commands.Meet(worlds.people_of, worlds.oracle_of))
    return folder
