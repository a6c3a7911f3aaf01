"""The style stage from records to Parquet."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from characterflywheel import tables
from characterflywheel.errors import FlywheelError
from characterflywheel.pipeline import Work
from characterflywheel.records import Candidate, ChatMessage, Example, Preference, Prompt, Rollout
from characterflywheel.style.features import FEATURES
from characterflywheel.style.monitor import Difference
from characterflywheel.style.stage import Learning, by_steps, watch_style

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
    for name in "ab":
        _watch(tmp_path / name, phrases=("tale",), counts={"waves": "🌊+"}, learning=_learning())
    assert (tmp_path / "a/style.parquet").read_bytes() == (tmp_path / "b/style.parquet").read_bytes()
    rows = {(row.comparison, row.feature): row for row in tables.read(tmp_path / "a/style.parquet", Difference)}
    assert rows["old to new", "says: tale"].binary
    waves = rows["old to new", "waves"]
    assert (waves.first_mean, waves.second_mean, waves.alarm) == (0, pytest.approx(4 / 3), True)


def _rollout(step: int, i: int, text: str) -> Rollout:
    return Rollout(step=step, prompt_id=f"p{i}", text=text, token_ids=(1,), logprobs=(-1.0,), score=0.0, reward=0.0)


def _learning(steps: int = 10, per_step: int = 3) -> Learning:
    """RL takes to waves in its second half; SFT learns from questions, while the model asks none of its own."""
    rollouts = [
        _rollout(step, i, "A tale." + " 🌊" * (step > steps / 2) + "." * (reply + i % 3))
        for step in range(1, steps + 1)
        for i in range(per_step * (step - 1), per_step * step)
        for reply in range(2)
    ]
    learnt = [
        Example(
            id=f"{source}-{i}", prompt_id=f"p{i}" if source == "user" else f"set-{i}",
            user_id=f"u{i}" if source == "user" else None, character_id=None, source=source,
            messages=(*PROMPTS[f"p{i}"].messages, *_say("A tale of the sea, would you?" + "." * (i % 2))),
        )
        for source in ("user", "safety") for i in range(N)
    ]  # fmt: skip
    own = [_candidate(i, "A tale of the sea" + "." * (i % 3)) for i in range(N)]
    return Learning(own=own, learnt=learnt, rollouts=rollouts, windows=3)


def test_what_sft_learnt_and_what_rl_drew_are_compared(tmp_path: Path) -> None:
    """Of the set of safety nobody knows the user, nor shares it a prompt with the model's own replies: two samples."""
    summary = _watch(tmp_path / "a", learning=_learning())
    rows = tables.read(tmp_path / "a" / "style.parquet", Difference)
    found = {(row.comparison, row.feature): row for row in rows}
    assert summary.comparisons[2:4] == ("own replies to learnt from safety", "own replies to learnt from user")
    assert summary.comparisons[-2:] == ("RL steps 1 to 3 to RL steps 4 to 7", "RL steps 1 to 3 to RL steps 8 to 10")
    assert found["own replies to learnt from user", "questions"].method == "paired"
    assert found["own replies to learnt from safety", "questions"].method == "welch"
    late = found["RL steps 1 to 3 to RL steps 8 to 10", "emojis"]
    assert (late.first_mean, late.second_mean, late.alarm, late.kind, late.n) == (0, 1, True, "rl", 9)
    assert not found["RL steps 1 to 3 to RL steps 8 to 10", "stage_directions"].alarm


def test_what_rides_along_with_the_reward_is_named(tmp_path: Path) -> None:
    """The new model uses more emoji, and so do the replies that SFT learnt; nobody preferred them."""
    learning = _learning()
    waves = [
        one.model_copy(update={"messages": (*one.messages[:-1], *_say("A tale 🌊" + "." * (i % 3)))})
        for i, one in enumerate(learning.learnt)
    ]
    summary = _watch(tmp_path / "a", learning=learning._replace(learnt=waves))
    drift = {shift.feature: shift for shift in summary.drift}
    learnt = ("own replies to learnt from safety", "own replies to learnt from user")
    assert (drift["emojis"].rides, drift["emojis"].alarm) == (learnt, True)
    assert "rejected to chosen" not in drift["ends_with_question"].rides  # preferred, and not what the model took to


@pytest.mark.parametrize(
    ("steps", "prompts", "windows", "names"),
    [
        (10, 8, 4, ["RL steps 1 to 2", "RL steps 3 to 5", "RL steps 6 to 8", "RL steps 9 to 10"]),
        (4, 4, 4, ["RL steps 1 to 2", "RL steps 3 to 4"]),
        (2, 8, 4, ["RL step 1", "RL step 2"]),
        (3, 4, 4, []),
        (1, 64, 4, []),
        (0, 0, 4, []),
    ],
)
def test_stretches_of_rl(steps: int, prompts: int, windows: int, names: list[str]) -> None:
    """Every step is in one stretch, and a stretch has 8 prompts or there is none."""
    rollouts = [_rollout(step + 1, i, f"{step}") for step in range(steps) for i in range(prompts)]
    found = by_steps(rollouts, windows)
    assert list(found) == names
    if names:
        assert [text for replies in found.values() for _, text in replies] == [one.text for one in rollouts]


def test_one_checkpoint_has_no_drift(tmp_path: Path) -> None:
    summary = _watch(tmp_path / "a", checkpoints={"old": CHECKPOINTS["old"]})
    assert (summary.drift, len(summary.comparisons)) == ((), 2)


def test_a_reply_to_an_unknown_prompt_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match="answers prompt lost"):
        _watch(tmp_path / "a", checkpoints={"old": [("lost", "hi")]})
