import json
import math
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from training_fixture import Killed, dies_at, pair, same_weights

from characterflywheel.config import DPOConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.pipeline import Work
from characterflywheel.records import Preference
from characterflywheel.training import learner
from characterflywheel.training.dpo import DPOSummary, choose_pairs, train_dpo

CONFIG = DPOConfig(pairs=4, pairs_per_step=4, learning_rate=1e-3, beta=0.1)
PAIRS = [
    pair(i, f"I like {word}. Do you?", f"I like {word}.") for i, word in enumerate(("tea", "rain", "sea", "bread"))
]


def train(
    folder: Path, parent: Path, config: DPOConfig = CONFIG, rows: list[Preference] = PAIRS, **more: object
) -> DPOSummary:
    return train_dpo(Work(folder, 3), config, parent, rows, threads=1, **more)  # type: ignore[arg-type]


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def epochs(times: int) -> tuple[DPOConfig, list[Preference]]:
    """DPO makes one pass; for more, the same pairs under other ids."""
    rows = [p.model_copy(update={"id": f"{p.id}-{i}"}) for i in range(times) for p in PAIRS]
    ordered = [r.model_copy(update={"id": f"{n:03}"}) for n, r in enumerate(rows)]
    return CONFIG.model_copy(update={"pairs": len(ordered)}), ordered


def test_the_loss_starts_at_log_two_and_falls(tiny_folder: Path, tmp_path: Path) -> None:
    config, rows = epochs(15)
    summary = train(tmp_path, tiny_folder, config, rows)
    assert (summary.steps, summary.pairs) == (15, 60)
    assert summary.first_loss == pytest.approx(math.log(2), abs=0.01), "the policy is its own reference"
    assert summary.last_loss < 0.4
    assert summary.last_accuracy == 1.0
    assert len(metrics(tmp_path)) == 15


def test_held_out_pairs_are_never_used(tiny_folder: Path, tmp_path: Path) -> None:
    held_out = [p.model_copy(update={"held_out": True}) for p in PAIRS[:2]]
    assert train(tmp_path / "a", tiny_folder, rows=[*held_out, *PAIRS[2:]]).pairs == 2
    train(tmp_path / "b", tiny_folder, rows=PAIRS[2:])
    assert same_weights(tmp_path / "a" / "model", tmp_path / "b" / "model")
    with pytest.raises(FlywheelError, match="none of 2 preference pairs is for training"):
        train(tmp_path / "c", tiny_folder, rows=held_out)


def test_the_pairs_that_reviewers_agreed_on_come_first(tiny_folder: Path, tmp_path: Path) -> None:
    doubtful = [pair(i, "zzz", "the sea", label=0.6) for i in (7, 8)]
    few = CONFIG.model_copy(update={"pairs": 4})
    train(tmp_path / "a", tiny_folder, few, [*doubtful, *PAIRS])
    train(tmp_path / "b", tiny_folder, few, PAIRS)
    assert same_weights(tmp_path / "a" / "model", tmp_path / "b" / "model")


def test_a_killed_run_ends_in_the_same_bytes(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference stays the parent, whatever the checkpoint holds."""
    config, rows = epochs(5)
    whole = train(tmp_path / "whole", tiny_folder, config, rows)
    monkeypatch.setattr(learner, "CHECKPOINT_SECONDS", -1.0)
    with pytest.raises(Killed):
        train(tmp_path / "killed", tiny_folder, config, rows, on_progress=dies_at(4))
    heard: list[int] = []
    resumed = train(tmp_path / "killed", tiny_folder, config, rows, on_progress=lambda done, total: heard.append(done))
    assert heard == [4, 5]
    assert resumed == whole
    assert same_weights(tmp_path / "whole" / "model", tmp_path / "killed" / "model")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")


def test_a_kill_while_the_reference_is_written_costs_only_time(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def dies(value: object, file: BinaryIO) -> None:
        file.write(b"half a ten")
        raise Killed

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(Killed):
        train(tmp_path / "killed", tiny_folder)
    monkeypatch.setattr(torch, "save", save)
    assert train(tmp_path / "killed", tiny_folder) == train(tmp_path / "whole", tiny_folder)


def test_pairs_are_chosen_by_clarity_and_from_every_prompt_before_any_twice() -> None:
    several = [pair(n % 5, f"good {n}", "bad", label=1.0 if n < 20 else 0.75).model_copy(update={"id": f"p{n:02}"})
               for n in range(30)]  # fmt: skip
    chosen = choose_pairs(several, 10, seed=1)
    assert sorted(p.prompt_id for p in chosen[:5]) == [f"prompt-{n:02}" for n in range(5)]
    assert all(p.label == 1.0 for p in chosen)
    assert choose_pairs(several[::-1], 10, seed=1) == chosen
    assert choose_pairs(several, 10, seed=2) != chosen
