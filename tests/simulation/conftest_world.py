"""A world with a small encoder: a hashed bag of words, so that texts that share words are close and nothing is slow."""

import shutil
import zlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from characterflywheel.characters import bundled_characters, system_prompt
from characterflywheel.config import WorldConfig
from characterflywheel.llm.models import cache_folder
from characterflywheel.people import Bank
from characterflywheel.records import Candidate, ChatMessage, Prompt
from characterflywheel.simulation.chitchat import real_people
from characterflywheel.simulation.lore import Lore, gather
from characterflywheel.simulation.world import SimulatedPeople
from characterflywheel.store import EventStore
from characterflywheel.text import folded

STARTS = datetime(2026, 1, 12, tzinfo=UTC)
GOOD = "Ha, that is a lovely thing to hear! What did you like best about it?"
BAD = (
    "As an AI language model I cannot answer that. It is important to remember that\n- one\n- two\n- three\n- four\n"
    "and so on and on and on and on and on and on and on and on and on and on and on and on and on and on and the"
)


class BagOfWords:
    """Unit vectors from hashed words, 64 wide."""

    threads = 1

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        out = np.full((len(texts), 64), 1e-3, dtype=np.float32)
        for row, text in zip(out, texts, strict=True):
            for word in folded(text):
                row[zlib.crc32(word.encode()) % 64] += 1
        return np.asarray(out / np.linalg.norm(out, axis=1, keepdims=True))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of its own for embeddings, with the fitted real conversations, which cost seconds, from the usual one."""
    real_people(cache_folder())
    folder = tmp_path_factory.mktemp("cache")
    for path in cache_folder().glob("chitchat-*.json"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def lore(cache: Path) -> Lore:
    return gather(BagOfWords(), cache)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EventStore]:
    with EventStore.open(tmp_path / "flywheel.db") as opened:
        yield opened


@pytest.fixture
def people(store: EventStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> SimulatedPeople:
    monkeypatch.setenv("FLYWHEEL_CACHE", str(cache))
    config = WorldConfig(user_conversations=6, internal_conversations=3, max_turns=2, population=400)
    return SimulatedPeople(config, 7, store, BagOfWords(), 1)


def make_bank(treatment: str, control: str = BAD, arm_share: float = 0.5, days: int = 7, contexts: int = 6) -> Bank:
    """A bank whose arms each say one thing, two replies a context."""
    characters = list(bundled_characters().values())[:3]
    prompts = tuple(
        Prompt(
            id=f"p{i}", conversation_id=f"c{i}", user_id=f"u{i}", source="user", character_id=characters[i % 3].id,
            messages=(
                ChatMessage(role="system", content=system_prompt(characters[i % 3])),
                ChatMessage(role="user", content=f"I had a lovely day with {i} cats, what did you like best?"),
            ),
            split="experiment", cluster=0, turn=0, created_at=STARTS - timedelta(days=1),
        )
        for i in range(contexts)
    )  # fmt: skip
    texts = {"control": control, "treatment": treatment}
    replies = {
        arm: tuple(
            tuple(
                Candidate(id=f"{arm}{p.id}{k}", prompt_id=p.id, policy=arm, text=text, finish_reason="stop")
                for k in range(2)
            )
            for p in prompts
        )
        for arm, text in texts.items()
    }
    return Bank(
        experiment="test", contexts=prompts, replies=replies, models={"control": "old", "treatment": "new"},
        characters={c.id: c for c in characters}, starts=STARTS, days=days, arm_share=arm_share,
    )  # fmt: skip
