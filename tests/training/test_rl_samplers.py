"""RL with each sampler: the correction sees who drew, and a server that dies in the middle costs nothing but time."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rl_fixture import UNWATCHED, metrics, train

from characterflywheel import tables
from characterflywheel.config import RLConfig, SamplerConfig
from characterflywheel.errors import SamplerGone
from characterflywheel.records import Rollout
from characterflywheel.training.paths import open_format
from characterflywheel.training.rl import samplers
from token_server import TokenServer, listening

STEPS = 3


def config(**sampler: Any) -> RLConfig:
    return RLConfig(
        steps=STEPS, prompts_per_step=2, group=4, max_tokens=8, learning_rate=1e-2, temperature=1.0,
        alarms=UNWATCHED, sampler=SamplerConfig(**sampler),
    )  # fmt: skip


def outputs(folder: Path) -> dict[str, str]:
    names = ("model/model.safetensors", "metrics.jsonl", "rollouts.parquet")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


@pytest.mark.parametrize("kind", ["native", "transformers", "ctranslate2"])
def test_rollouts_come_from_the_weights_of_their_step(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    """The weights move by a hundredth a step, so a sampler with those of the step before would lose samples."""
    if kind == "ctranslate2":
        pytest.importorskip("ctranslate2", reason="the optional package ctranslate2 is not installed")
    train(tmp_path / "one", tiny_folder, config(kind=kind))
    rollouts = tables.read(tmp_path / "one" / "rollouts.parquet", Rollout)
    assert {(r.step, r.version) for r in rollouts} == {(step, step - 1) for step in range(1, STEPS + 1)}
    assert all(row["effective_share"] > 0.95 for row in metrics(tmp_path / "one") if "effective_share" in row)
    train(tmp_path / "two", tiny_folder, config(kind=kind))
    assert outputs(tmp_path / "one") == outputs(tmp_path / "two"), "the same run again gives the same bytes"


def test_rollouts_of_older_weights_are_counted(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last push does not arrive. What drew is kept with each rollout, so a resumed run counts alike."""
    real = samplers.InMemory._load

    def lost(self: samplers.InMemory, model: Any, version: int) -> None:
        if version < STEPS - 1:
            real(self, model, version)

    monkeypatch.setattr(samplers.InMemory, "_load", lost)
    monkeypatch.setattr(samplers.InMemory, "rest", lambda self: None)  # as engines do that keep their weights
    summary = train(tmp_path, tiny_folder, config())
    assert [row["stale_share"] for row in metrics(tmp_path)] == [0.0, 0.0, 1.0]
    assert summary.stale_rollouts == 2 * 4


def test_an_end_token_of_the_folder_s_own_is_no_text(tiny_folder: Path, tmp_path: Path) -> None:
    """generation_config.json may name ends that the tokenizer does not call special: here every letter does."""
    parent = shutil.copytree(tiny_folder, tmp_path / "parent")
    form = open_format(parent, 192)
    letters = [i for i in range(3, 256) if form.decode([i]).isalpha()]
    (parent / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, *letters]}), encoding="utf-8")
    train(tmp_path / "run", parent, config())
    rollouts = tables.read(tmp_path / "run" / "rollouts.parquet", Rollout)
    ended = [r for r in rollouts if r.token_ids[-1] in letters]
    assert ended
    for r in ended:
        assert not r.cut_off
        assert r.text == form.decode(r.token_ids[:-1]).strip()


def test_a_server_that_dies_in_the_middle_costs_only_time(tiny_folder: Path, tmp_path: Path) -> None:
    """It answers for a step and is gone; another one takes its place, at another address, and the end is the same."""

    def run(name: str, address: str) -> None:
        train(tmp_path / name, tiny_folder, config(
            kind="endpoint", address=address, weights_folder=str(tmp_path / "weights"), precision="float32",
            reload="/reload", patience_s=0.3,
        ))  # fmt: skip

    with listening(TokenServer(tiny_folder, says_version=True)) as address:
        run("whole", address)
    dying = TokenServer(tiny_folder)
    with listening(dying) as address:
        dying.lives = 2 + 2  # answers: to the check of temperatures, and to the first step's prompts
        with pytest.raises(SamplerGone):
            run("killed", address)
    assert (tmp_path / "killed" / ".partial" / "learnt-000001.jsonl").exists()
    with listening(TokenServer(tiny_folder)) as address:
        run("killed", address)
    assert outputs(tmp_path / "whole") == outputs(tmp_path / "killed")
    rollouts = tables.read(tmp_path / "whole" / "rollouts.parquet", Rollout)
    assert {(r.step, r.version) for r in rollouts} == {(step, step - 1) for step in range(1, STEPS + 1)}
