"""The offline stage from prompts to Parquet: a better model wins, the same model ties, a killed run resumes."""

from pathlib import Path

import pytest
from evaluation_fixture import CHARACTER, Scripted, WarmthJudge, prompt

from characterflywheel import tables
from characterflywheel.config import OfflineConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.evaluation import stage
from characterflywheel.evaluation.stage import OfflineSummary, Reply, evaluate_offline
from characterflywheel.ledger import Sample
from characterflywheel.pipeline import Work
from characterflywheel.records import Prompt

PROMPTS = [prompt(i, "internal" if i % 3 == 0 else "user", user=f"u{i // 2}") for i in range(60)]
CONFIG = OfflineConfig(prompts=40)


def _dull(said: str, seed: int) -> str:
    return f"It is important to note {seed % 97} things that I will now go on to list for you here"


def _warm(said: str, seed: int) -> str:
    return f"Lovely, friend {seed % 97}! Which star do you like?"


def _evaluate(folder: Path, new: Scripted, prompts: list[Prompt] = PROMPTS) -> OfflineSummary:
    folder.mkdir(exist_ok=True)
    characters = {"ada": CHARACTER}
    return evaluate_offline(Work(folder, 5), CONFIG, prompts, Scripted("old", _dull), new, WarmthJudge(), characters)


def test_a_better_model_wins_by_every_measure(tmp_path: Path) -> None:
    summary = _evaluate(tmp_path, Scripted("new", _warm))
    for judged in (summary.win_rate.user, summary.win_rate.internal):
        assert judged.pointwise.value == judged.pairwise.value == 1
        assert judged.pointwise.low is not None
        assert judged.pointwise.low > 0.5
    assert summary.judges_agree.value == 1
    assert summary.win_rate.user.pointwise.n + summary.win_rate.internal.pointwise.n == summary.prompts == 40
    assert (summary.production["preachy"].before.value, summary.production["preachy"].value) == (1, 0)
    assert summary.steerability.instruction_following.value == 1
    assert summary.steerability.instruction_violation.before.value == 1
    assert set(summary.change) == {*summary.production, "instruction_following", "instruction_violation"}
    assert "win rate pointwise/pairwise user 100%/100%" in summary.line()


def test_the_same_model_ties_with_itself(tmp_path: Path) -> None:
    summary = _evaluate(tmp_path, Scripted("same", _dull))
    assert summary.win_rate.user.pointwise.value == summary.win_rate.internal.pairwise.value == 0.5
    assert all(change.value == 0 for change in summary.change.values())


def test_rows_and_samples(tmp_path: Path) -> None:
    _evaluate(tmp_path, Scripted("new", _warm))
    rows = tables.read(tmp_path / "replies.parquet", Reply)
    assert [(row.prompt_id, row.policy) for row in rows] == sorted((row.prompt_id, row.policy) for row in rows)
    assert len(rows) == 80
    assert all("instruction_violation" in row.flags for row in rows if row.policy == "old")
    assert {row.violates for row in rows if row.policy == "old"} == {(0, 1)}
    samples = list(tables.read_jsonl(tmp_path / "samples.jsonl", Sample))
    assert len(samples) == 10
    assert {sample.source for sample in samples} == {"internal", "user"}
    texts = {(row.prompt_id, row.policy): row.text for row in rows}
    assert all(sample.new.text == texts[sample.prompt_id, "new"] for sample in samples)
    assert all(message.role != "system" for sample in samples for message in sample.history)


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "BATCH", 16)
    whole = _evaluate(tmp_path / "whole", Scripted("new", _warm))
    calls = 0

    def dies(said: str, seed: int) -> str:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise KeyboardInterrupt
        return _warm(said, seed)

    with pytest.raises(KeyboardInterrupt):
        _evaluate(tmp_path / "killed", Scripted("new", dies))
    again = Scripted("new", _warm)
    assert _evaluate(tmp_path / "killed", again) == whole
    assert again.asked == 40 - 16  # the first batch had been kept
    for name in ("replies.parquet", "samples.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_one_source_alone_leaves_the_other_unmeasured(tmp_path: Path) -> None:
    summary = _evaluate(tmp_path, Scripted("new", _warm), [p for p in PROMPTS if p.source == "user"])
    assert summary.win_rate.internal.pointwise.value is None
    assert summary.win_rate.internal.pointwise.reason == "nothing to measure"
    assert "internal not measured" in summary.line()


def test_training_prompts_and_unknown_characters_are_refused(tmp_path: Path) -> None:
    new = Scripted("new", _warm)
    with pytest.raises(FlywheelError, match="must be 'evaluate'"):
        _evaluate(tmp_path, new, [PROMPTS[0].model_copy(update={"split": "train"})])
    with pytest.raises(FlywheelError, match="unknown character 'bob'"):
        _evaluate(tmp_path, new, [PROMPTS[0].model_copy(update={"character_id": "bob"})])
    with pytest.raises(FlywheelError, match="0 prompts"):
        _evaluate(tmp_path, new, [])
