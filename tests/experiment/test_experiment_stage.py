"""The bank, and whole analyses of exports: no effect, a real one, a broken randomisation."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from experiment_exports import START, Events, crowd

from characterflywheel import tables
from characterflywheel.config import ExperimentConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.experiment import stage
from characterflywheel.experiment.analysis import Lift
from characterflywheel.experiment.metrics import DayRow
from characterflywheel.experiment.stage import ArmRow, BankSummary, ExperimentSummary, analyse, load_bank, make_bank
from characterflywheel.llm.base import Completion, Sampling
from characterflywheel.pipeline import Work
from characterflywheel.records import Character, ChatMessage, Instruction, Prompt

CONFIG = ExperimentConfig(contexts=12, replies=3)
PIRATE = Character(
    id="pirate", name="Pirate", category="adventure", traits=("bold",), greeting="Ahoy!",
    instructions=(Instruction(text="Speak like a pirate."),),
)  # fmt: skip


class Parrot:
    """A chat model that repeats words of the conversation, drawn by the seed; counts its calls."""

    def __init__(self, name: str, fail_at: int | None = None) -> None:
        self.name, self.calls, self.fail_at = name, 0, fail_at

    def complete(
        self,
        conversations: Sequence[Sequence[ChatMessage]],
        *,
        n: int = 1,
        sampling: Sampling = Sampling(),
        seeds: Sequence[int],
    ) -> list[list[Completion]]:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        replies = []
        for conversation, seed in zip(conversations, seeds, strict=True):
            rng, said = random.Random(seed), conversation[-1].content.split()
            texts = [" ".join(rng.choices(said, k=sampling.max_tokens // 8)) for _ in range(n)]
            replies.append([Completion(text, (), (), "stop") for text in texts])
        return replies


def prompts(count: int) -> list[Prompt]:
    """Prompts of production users, two a user, and one of a tester for each three."""
    return [
        Prompt(
            id=f"p{i}", conversation_id=f"c{i}", user_id=f"u{i // 2}", source="internal" if i % 3 == 0 else "user",
            character_id="pirate", split="experiment", cluster=0, turn=1, created_at=START,
            messages=(ChatMessage(role="user", content=f"tell me of island {i} and its treasure"),),
        )
        for i in range(count)
    ]  # fmt: skip


def bank(folder: Path, control: Parrot, treatment: Parrot, count: int = 40) -> BankSummary:
    folder.mkdir(exist_ok=True)
    return make_bank(Work(folder, 7), CONFIG, "g1", prompts(count), control, treatment, {"pirate": PIRATE}, START)


def test_bank_round_trip(tmp_path: Path) -> None:
    summary = bank(tmp_path, Parrot("old"), Parrot("new"))
    loaded = load_bank(tmp_path, {"pirate": PIRATE, "other": PIRATE})
    assert (summary.contexts, summary.replies_per_arm, summary.users) == (12, 36, 12)
    assert loaded.models == {"control": "old", "treatment": "new"}
    assert (loaded.starts, loaded.days, loaded.arm_share) == (START, 7, 0.1)
    assert {prompt.source for prompt in loaded.contexts} == {"user"}
    assert loaded.characters == {"pirate": PIRATE}
    for arm, model in loaded.models.items():
        for context, replies in zip(loaded.contexts, loaded.replies[arm], strict=True):
            assert [(reply.prompt_id, reply.policy) for reply in replies] == [(context.id, model)] * 3
    texts = {arm: [[r.text for r in replies] for replies in rows] for arm, rows in loaded.replies.items()}
    assert texts["control"] == texts["treatment"]  # equal models, equal seeds
    ids = [reply.id for rows in loaded.replies.values() for replies in rows for reply in replies]
    assert len(set(ids)) == 72


def test_killed_bank_goes_on_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "CONTEXTS_A_CHUNK", 8)
    bank(tmp_path / "whole", Parrot("old"), Parrot("new"))
    with pytest.raises(KeyboardInterrupt):
        bank(tmp_path / "killed", Parrot("old"), Parrot("new", fail_at=2))
    again = Parrot("old"), Parrot("new")
    bank(tmp_path / "killed", *again)
    assert (again[0].calls, again[1].calls) == (0, 1)
    for name in ("bank.json", "contexts.parquet", "replies_control.parquet", "replies_treatment.parquet"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_bank_needs_production_users_and_known_characters(tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match="no production user's among 1 prompts"):
        bank(tmp_path, Parrot("old"), Parrot("new"), count=1)
    with pytest.raises(FlywheelError, match="no character pirate"):
        make_bank(Work(tmp_path, 7), CONFIG, "g1", prompts(9), Parrot("old"), Parrot("new"), {}, START)


def run(folder: Path, export: Path) -> ExperimentSummary:
    folder.mkdir(exist_ok=True)
    return analyse(Work(folder, 7), CONFIG, "g1", export)


def test_equal_arms_are_kept(tmp_path: Path) -> None:
    summary = run(tmp_path, crowd(tmp_path / "export", 4000, seed=1))
    assert summary.verdict == "keep"
    assert summary.line().startswith("keep: no difference shown: breadth ")
    assert summary.srm_p.value is not None
    assert summary.srm_p.value > 0.01
    for lift in (summary.breadth_lift, summary.depth_lift, summary.balance):
        assert lift.low is not None
        assert lift.high is not None
        assert lift.low < 0 < lift.high
    assert summary.detectable.depth.value is not None
    assert 0 < summary.detectable.depth.value < 0.3


def test_more_messages_are_promoted(tmp_path: Path) -> None:
    summary = run(tmp_path, crowd(tmp_path / "export", 4000, seed=2, depth=1.25))
    assert summary.verdict == "promote"
    assert summary.depth_lift.low is not None
    assert summary.depth_lift.low > 0
    arms = {row.arm: row for row in tables.read(tmp_path / "arms.parquet", ArmRow)}
    assert tuple(arms.values()) == summary.arms
    assert sum(row.users for row in arms.values()) == summary.users == summary.depth_lift.n
    rows = {row.metric: row for row in tables.read(tmp_path / "lifts.parquet", Lift)}
    assert rows["depth"].estimate() == summary.depth_lift
    daily = tables.read(tmp_path / "daily.parquet", DayRow)
    assert max(row.users for row in daily if row.arm == "control") == arms["control"].users


def test_lost_exposures_stop_the_verdict(tmp_path: Path) -> None:
    summary = run(tmp_path, crowd(tmp_path / "export", 4000, seed=3, depth=1.25, drop_treatment=0.15))
    assert summary.verdict == "keep"
    assert "sample ratio mismatch" in summary.reason


def test_the_same_export_gives_the_same_bytes(tmp_path: Path) -> None:
    export = crowd(tmp_path / "export", 3000, seed=4)
    assert run(tmp_path / "a", export) == run(tmp_path / "b", export)
    for name in ("lifts.parquet", "arms.parquet", "daily.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_few_users_get_no_lift(tmp_path: Path) -> None:
    events = Events()
    for number in range(40):
        events.user(f"u{number}", "control" if number % 2 else "treatment", number)
        events.say(f"u{number}", number)
    events.write(tmp_path / "export")
    summary = run(tmp_path, tmp_path / "export")
    assert summary.breadth_lift.value is None
    assert summary.breadth_lift.reason == "20 users in control, fewer than 500"
    assert summary.verdict == "keep"
    assert "fewer than 500" in summary.reason
