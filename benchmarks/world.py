"""Preference data of the embedded world, at a size at which calibration can be measured (DESIGN section 7).

Prompts are what curation made of a workspace's traffic, of every generation and split. The product's annotate stage
does the rest: its pool of policies proposes replies (CTranslate2, int8), the world's annotators judge them through its
tasks, each prompt by several. A killed call goes on where it was; a workspace that somebody else made is only read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from characterflywheel import commands, tables, worlds
from characterflywheel import workspace as workspaces
from characterflywheel.annotation.candidates import RewritePolicy
from characterflywheel.annotation.pairs import Reviewed, make_pairs
from characterflywheel.annotation.pairs import held_out_users as apart
from characterflywheel.annotation.stage import annotate
from characterflywheel.characters import load_characters
from characterflywheel.config import AnnotateConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.llm.ct2 import CTranslate2Model
from characterflywheel.llm.models import base_model_folder
from characterflywheel.pipeline import Work
from characterflywheel.progress import announce, progress
from characterflywheel.records import Candidate, Judgement, Preference, Prompt
from characterflywheel.store import EventStore
from characterflywheel.workspace import Workspace

SETTINGS = """\
preset = "quick"
seed = {seed}

[models]
backend = "ctranslate2"
threads = {threads}

[world]
user_conversations = {users}
internal_conversations = {testers}
"""
ANNOTATORS = 40  # nobody gets more tired than in the pipeline, where each has a few dozen tasks


class World(NamedTuple):
    """Prompts with their candidates and judgements, and the settings of the annotate stage that made them."""

    prompts: tuple[Prompt, ...]
    candidates: tuple[Candidate, ...]
    judgements: tuple[Judgement, ...]
    config: AnnotateConfig


def make(
    work: Path, workspace: Path | None, *, prompts: int, candidates: int, reviewers: int, seed: int, threads: int
) -> World:
    """Everything, kept in `work`. Without a `workspace`, one is made there for about that many prompts."""
    work.mkdir(parents=True, exist_ok=True)
    root = workspace or _traffic(work / "workspace", prompts, seed, threads)
    asked = {p.id: p for f in sorted(root.glob("artifacts/curate-*/prompts.parquet")) for p in tables.read(f, Prompt)}
    if not asked:
        raise FlywheelError(f"{root} has no curated prompts: give the workspace of a finished generation.")
    order = np.random.default_rng(seed).permutation(len(asked))[:prompts]
    chosen = [asked[name].model_copy(update={"split": "annotate"}) for name in np.array(sorted(asked))[order]]
    config = AnnotateConfig(prompts=len(chosen), candidates=candidates, reviewers=reviewers)
    folder = work / f"annotate-{len(chosen)}-{candidates}-{reviewers}"
    if not (folder / "done").exists():
        _annotate(folder, root, chosen, config, seed, threads)
        (folder / "done").touch()
    judgements = tuple(tables.read_jsonl(folder / "judgements.jsonl", Judgement))
    return World(tuple(chosen), tuple(tables.read(folder / "candidates.parquet", Candidate)), judgements, config)


def pairs(world: World, reviewers: int, *, share: float, seed: int) -> list[Preference]:
    """Pairs as the annotate stage makes them, from `reviewers` of each prompt's judgements, drawn by seed.

    `share` of the prompts, whole users, are held out, another way for every seed.
    """
    rng = np.random.default_rng([seed, reviewers])
    mine: dict[str, list[Judgement]] = {}
    for judgement in world.judgements:
        mine.setdefault(judgement.prompt_id, []).append(judgement)
    drawn = {name: [all_of[i] for i in rng.permutation(len(all_of))[:reviewers]] for name, all_of in mine.items()}
    config = world.config.model_copy(update={"held_out_share": share})
    return list(make_pairs(_reviewed(world, drawn), config, seed).kept)


def held_out_users(world: World, share: float, seed: int) -> set[str]:
    """The users whose pairs only evaluate in `pairs` of the same share and seed."""
    return apart(world.prompts, share, seed)


def _reviewed(world: World, judgements: dict[str, list[Judgement]]) -> list[Reviewed]:
    alternatives: dict[str, dict[str, Candidate]] = {}
    for candidate in world.candidates:
        alternatives.setdefault(candidate.prompt_id, {})[candidate.id] = candidate
    return [
        Reviewed(prompt, alternatives[prompt.id], judgements[prompt.id])
        for prompt in world.prompts
        if prompt.id in judgements
    ]


def _traffic(folder: Path, prompts: int, seed: int, threads: int) -> Path:
    """A workspace whose crowd has chatted long enough for so many prompts (two a conversation are kept)."""
    if not list(folder.glob("artifacts/curate-*/artifact.json")):
        if not (folder / "flywheel.toml").exists():
            workspaces.init(folder, "quick")
        users, testers = round(0.38 * prompts), round(0.13 * prompts)
        text = SETTINGS.format(seed=seed, threads=threads, users=users, testers=testers)
        (folder / "flywheel.toml").write_text(text, encoding="utf-8")
        meet = commands.Meet(worlds.people_of, worlds.oracle_of)
        commands.run(Workspace.open(folder), 1, "curate", meet)
    return folder


def _annotate(
    folder: Path, root: Path, prompts: Sequence[Prompt], config: AnnotateConfig, seed: int, threads: int
) -> None:
    """The annotate stage, with the base model and the same told how to write as its pool."""
    settings = Workspace.open(root).config()
    if settings.world is None:
        raise FlywheelError(f"{root} has no simulated people: give a workspace of the embedded world.")
    limits = {"max_prompt_tokens": settings.models.max_prompt_tokens, "batch_replies": settings.models.batch_replies}
    model = CTranslate2Model.load(base_model_folder(settings.models.base), "base", threads=threads, **limits)
    settings = settings.model_copy(update={"models": settings.models.model_copy(update={"threads": threads})})
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"annotator-{i + 1}" for i in range(ANNOTATORS)]
    characters = load_characters(Workspace.open(root).characters)
    with EventStore.open(folder / "empty.db") as store:  # where people would talk; judging writes nothing there
        people = worlds.people_of(Workspace.open(root), settings, store)
        pool = {"parent": model, "coached": RewritePolicy(model)}
        with progress("annotate") as advance:
            summary = annotate(Work(folder, seed), config, prompts, pool, characters, people, names, advance)
    announce("annotate", summary.line())
