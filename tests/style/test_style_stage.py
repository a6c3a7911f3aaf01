"""The style stage from records to Parquet."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from characterflywheel import tables
from characterflywheel.errors import FlywheelError
from characterflywheel.pipeline import Work
from characterflywheel.records import Candidate, ChatMessage, Preference, Prompt
from characterflywheel.style.features import FEATURES
from characterflywheel.style.monitor import Difference
from characterflywheel.style.stage import watch_style

N = 30
PROMPTS = {
    f"p{i}": Prompt(
        id=f"p{i}",
        conversation_id=f"c{i}",
        user_id=f"u{i}",
        source="user",
        character_id="ada",
        messages=(ChatMessage(role="user", content=f"tell me {i} things"),),
        split="train",
        cluster=0,
        turn=1,
        created_at=datetime(2026, 1, 5, tzinfo=UTC),
    )
    for i in range(N)
}


def _candidate(i: int, text: str) -> Candidate:
    return Candidate(id=f"{i}-{text}", prompt_id=f"p{i}", policy="base", text=text, finish_reason="stop")


def _say(text: str) -> tuple[ChatMessage, ...]:
    return (ChatMessage(role="assistant", content=text),)


PAIRS = [
    Preference(
        id=str(i),
        prompt_id=p.id,
        user_id=p.user_id,
        character_id="ada",
        source="user",
        prompt=p.messages,
        chosen=_say("A tale of the sea, would you like it?"),
        rejected=_say("A tale of the sea, as you like it" + "." * (i % 2)),
        chosen_policy="base",
        rejected_policy="base",
        reviewers=1,
        label=1.0,
    )
    for i, p in enumerate(PROMPTS.values())
]
CHECKPOINTS = {
    name: [(f"p{i}", "A tale." + " 🌊" * (step if i % 3 else 0)) for i in range(N)]
    for step, name in enumerate(("old", "sft", "new"))
}


def _watch(folder: Path, **changes: object):
    folder.mkdir(exist_ok=True)
    accepted = [_candidate(i, "A longer tale of the sea and of the moon above it.") for i in range(N)]
    rejected = [_candidate(i, text) for i in range(N) for text in ("A tale.", "No tale." + "." * (i % 2))]
    given = {"checkpoints": CHECKPOINTS, **changes}
    return watch_style(Work(folder, 1), PAIRS, accepted, rejected, PROMPTS, **given)  # type: ignore[arg-type]


def test_tables_alarms_and_drift(tmp_path: Path) -> None:
    summary = _watch(tmp_path / "a")
    rows = tables.read(tmp_path / "a" / "style.parquet", Difference)
    assert len(rows) == len(summary.comparisons) * len(FEATURES)
    assert summary.comparisons == (
        "rejected to chosen", "not accepted to accepted", "old to sft", "sft to new", "old to new",
    )  # fmt: skip
    drift = {shift.feature: shift for shift in summary.drift}
    assert set(drift) == set(FEATURES)
    assert (drift["emojis"].before, drift["emojis"].after, drift["emojis"].alarm) == (0, pytest.approx(4 / 3), True)
    assert drift["ends_with_question"].preferred is not None
    assert drift["ends_with_question"].preferred.value == 1
    assert any(line.startswith("not accepted to accepted: words") for line in summary.alarms)
    assert "drift in" in summary.line()


def test_same_input_same_bytes_and_phrases_are_watched(tmp_path: Path) -> None:
    _watch(tmp_path / "a", phrases=("tale",))
    _watch(tmp_path / "b", phrases=("tale",))
    assert (tmp_path / "a/style.parquet").read_bytes() == (tmp_path / "b/style.parquet").read_bytes()
    assert "says: tale" in {row.feature for row in tables.read(tmp_path / "a/style.parquet", Difference)}


def test_one_checkpoint_has_no_drift(tmp_path: Path) -> None:
    summary = _watch(tmp_path / "a", checkpoints={"old": CHECKPOINTS["old"]})
    assert (summary.drift, len(summary.comparisons)) == ((), 2)


def test_a_reply_to_an_unknown_prompt_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match="answers prompt lost"):
        _watch(tmp_path / "a", checkpoints={"old": [("lost", "hi")]})
