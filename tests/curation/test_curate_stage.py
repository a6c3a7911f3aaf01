"""From conversations to prompts: reasons, histories, disjoint splits, the same bytes twice."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from characterflywheel import tables
from characterflywheel.characters import bundled_characters, system_prompt
from characterflywheel.config import CurateConfig
from characterflywheel.curation.filter import TurnFilter, turns_of
from characterflywheel.curation.stage import CurateSummary, curate_conversations
from characterflywheel.errors import FlywheelError
from characterflywheel.pipeline import Work
from characterflywheel.records import Conversation, Dropped, Message, Prompt
from characterflywheel.safety import SafetyPolicy, find_identifiers

CHARACTERS = bundled_characters()
START = datetime(2026, 1, 5, tzinfo=UTC)
TOPICS = ("the sea", "old bread", "a red moon", "my cat", "jazz records", "mountain trains", "rain", "chess", "tea")


class HashedWords:
    """A real, small embedding: counts of hashed words, length one. Texts that share words lie close."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        rows = np.full((len(texts), 64), 1e-3, dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().split():
                row[int(hashlib.md5(word.encode()).hexdigest(), 16) % 64] += 1
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def conversation(number: int, said: Sequence[str], source: str = "user") -> Conversation:
    """A conversation of one user: each line of `said` answered."""
    name = f"{source}-{number}"
    at = START + timedelta(minutes=number)
    messages = []
    for turn, text in enumerate(said):
        for role, content in (("user", text), ("assistant", f"Tell me more about {text.split()[-1]}.")):
            messages.append(
                Message(
                    id=f"{name}-{turn}-{role}", conversation_id=name, user_id=f"person-{name}", content=content,
                    role=role, created_at=at + timedelta(seconds=turn),
                )
            )  # fmt: skip
    return Conversation(
        id=name, user_id=f"person-{name}", character_id=sorted(CHARACTERS)[number % 3], character_version=1,
        source=source, created_at=at, messages=tuple(messages),
    )  # fmt: skip


def traffic() -> list[Conversation]:
    lines = [f"I was thinking of {topic} and number {i} again" for i in range(8) for topic in TOPICS]
    users = [conversation(i, lines[3 * i : 3 * i + 3]) for i in range(16)]
    return users + [conversation(i, lines[48 + 3 * i : 51 + 3 * i], "internal") for i in range(8)]


def run(folder: Path, conversations: Sequence[Conversation], config: CurateConfig | None = None) -> CurateSummary:
    folder.mkdir()
    return curate_conversations(Work(folder, 7), config or CurateConfig(), conversations, HashedWords(), CHARACTERS)


def test_keeps_and_drops_every_turn_once(tmp_path: Path) -> None:
    summary = run(tmp_path / "a", traffic())
    prompts = tables.read(tmp_path / "a" / "prompts.parquet", Prompt)
    dropped = tables.read(tmp_path / "a" / "dropped.parquet", Dropped)
    assert summary.turns == 72
    assert len(prompts) + len(dropped) == 72
    assert not {p.id for p in prompts} & {d.id for d in dropped}
    assert summary.reasons == Counter(d.reason for d in dropped)
    assert all(p.messages[-1].role == "user" for p in prompts)
    assert all(p.messages[0].content == system_prompt(CHARACTERS[p.character_id]) for p in prompts)
    assert "turns kept" in summary.line()


def test_splits_are_disjoint_by_user_and_have_both_sources(tmp_path: Path) -> None:
    run(tmp_path / "a", traffic())
    prompts = tables.read(tmp_path / "a" / "prompts.parquet", Prompt)
    assert all(len({p.split for p in prompts if p.user_id == user}) == 1 for user in {p.user_id for p in prompts})
    assert len({(p.split, p.source) for p in prompts}) == 8


def test_constrained_shares_match_the_traffic(tmp_path: Path) -> None:
    rows = run(tmp_path / "a", traffic(), CurateConfig(keep_share=0.5)).strata
    assert {row.dimension for row in rows if row.constrained} == {"source", "character", "turn"}
    assert max(abs(row.before - row.after) for row in rows if row.constrained) < 0.03


def test_same_input_same_bytes(tmp_path: Path) -> None:
    assert run(tmp_path / "a", traffic()) == run(tmp_path / "b", traffic())
    for name in ("prompts.parquet", "dropped.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_reasons() -> None:
    said = {
        "unsafe": "I will kill you",
        "identifying": "write to jane@example.org please",
        "too_short": "?",
        "language": "ich möchte heute gerne über das Wetter in Hamburg sprechen, denn es regnet",
    }
    turns, none = turns_of([conversation(n, [text]) for n, text in enumerate(said.values())], CHARACTERS)
    filters = TurnFilter(SafetyPolicy().check, find_identifiers, ("en",))
    kept, dropped = filters.apply(turns)
    assert (kept, none) == ((), ())
    assert [row.reason for row in dropped] == list(said)


def test_duplicates_and_what_follows_an_identifier() -> None:
    twice = [conversation(0, ["do you like the sea"]), conversation(3, ["Do you like  the sea"])]
    after = conversation(1, ["my name is anna", "and I like tea"])
    turns, _ = turns_of([*twice, after], CHARACTERS)
    kept, dropped = TurnFilter(SafetyPolicy().check, find_identifiers, ("en",)).apply(turns)
    assert len(kept) == 1
    assert Counter(row.reason for row in dropped) == {"duplicate": 1, "identifying": 2}


def test_a_broken_classifier_drops_everything() -> None:
    def broken(text: str, context: str) -> tuple[str, ...]:
        raise RuntimeError

    turns, _ = turns_of(traffic(), CHARACTERS)
    kept, dropped = TurnFilter(SafetyPolicy((broken,)).check, find_identifiers, ("en",)).apply(turns)
    assert not kept
    assert {row.detail for row in dropped} == {"unchecked"}


def test_empty_traffic_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match="serve or import traffic"):
        run(tmp_path / "a", [])
    with pytest.raises(FlywheelError, match="dropped all 1 turns"):
        run(tmp_path / "b", [conversation(0, ["I will kill you"])])
