"""RL with each sampler: the correction sees who drew, and a server that dies in the middle costs nothing but time."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from rl_fixture import UNWATCHED, metrics, train

from characterflywheel import tables
from characterflywheel.config import RLConfig, SamplerConfig
from characterflywheel.errors import SamplerGone
from characterflywheel.records import Rollout
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
