"""`flywheel score`: which reward models are found, and the command as a person gives it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reward_fixture import Letters, asks, tiny_policy
from safetensors.numpy import save_file
from scoring_fixture import card, loaded, outputs, served, shared_artifact
from typer.testing import CliRunner

from characterflywheel import generation, score_commands
from characterflywheel.cli import app
from characterflywheel.errors import FlywheelError
from characterflywheel.pipeline import Artifact, ArtifactRecord, Work
from characterflywheel.reward.composite import RewardModels, precision_of
from characterflywheel.reward.remote import RemoteRewards, connect
from characterflywheel.reward.wire import Limits, content_of
from characterflywheel.workshop import Workshop
from characterflywheel.workspace import Workspace, init


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_artifact(tmp_path_factory)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return init(tmp_path / "shop", "tiny")


def trained(workspace: Workspace, models: Path) -> Path:
    """Put the models where generation 1 keeps its own."""
    stage = next(s for s in generation.plan(workspace, workspace.config(), 1) if s.name == "reward")
    folder = workspace.artifacts / stage.folder_name
    shutil.copytree(models, folder)
    record = json.loads((folder / "artifact.json").read_text())
    (folder / "artifact.json").write_text(json.dumps(record | {"hash": stage.hash}))
    return folder


def test_the_generation_being_turned_is_found_once_its_reward_stage_is_complete(workspace: Workspace, models: Path):
    config = workspace.config()
    assert score_commands.newest(workspace, config) == (0, None)
    folder = trained(workspace, models)
    assert score_commands.newest(workspace, config) == (1, folder.name)
    assert score_commands.folder_of(workspace, config, 1) == folder.name
    assert score_commands.folder_of(workspace, config, 2) is None
    (folder / "artifact.json").unlink()
    assert score_commands.newest(workspace, config) == (0, None)


def test_without_reward_models_the_remedy_is_said(workspace: Workspace):
    with pytest.raises(FlywheelError, match="no generation has reward models: `flywheel run"):
        score_commands.score(workspace, None, "127.0.0.1", 0)
    with pytest.raises(FlywheelError, match="generation 4 has no reward models: `flywheel run"):
        score_commands.score(workspace, 4, "127.0.0.1", 0)


def test_who_computes_is_no_part_of_what_is_made(workspace: Workspace):
    config = workspace.config()
    reward = config.reward.model_copy(update={"server": "http://elsewhere:8766"})
    shared = config.model_copy(update={"reward": reward})
    assert [s.hash for s in generation.plan(workspace, config, 1)] == [
        s.hash for s in generation.plan(workspace, shared, 1)
    ]


def test_vllm_is_part_of_what_it_scores(workspace: Workspace):
    config = workspace.config()
    shared = config.model_copy(update={"reward": config.reward.model_copy(update={"server": "vllm+http://a:8000"})})
    here, there = (generation.plan(workspace, one, 1) for one in (config, shared))
    other = [a.name for a, b in zip(here, there, strict=True) if a.hash != b.hash]
    assert other == [a.name for a in here[[a.name for a in here].index("rejection_sampling") :]]
    asks = [s for s in there if s.inputs.keys() >= {"judge", "prompts"} and s.name != "sft"]  # SFT reads whom to spare
    assert all(stage.external["scores"] == "vllm" for stage in asks)


def test_who_computed_the_scores_is_noted(workspace: Workspace, models: Path, monkeypatch: pytest.MonkeyPatch):
    folder = trained(workspace, models)
    record = ArtifactRecord.model_validate_json((folder / "artifact.json").read_text())
    work = Work(folder, 1, {"judge": Artifact("reward", folder, None, record)})  # type: ignore[dict-item]
    monkeypatch.setattr(Workshop, "encoder", Letters())
    rewards = Workshop(workspace, workspace.config(), None, None, 1).rewards(work)
    assert isinstance(rewards, RewardModels)
    assert work.notes == {"scores": f"here, {precision_of(rewards.pointwise)}"}
    with served(rewards, folder) as address:
        ask(workspace, folder, address)


def test_a_backbone_is_told_by_its_weights_and_not_by_its_place(workspace: Workspace, tmp_path: Path):
    def reward(backbone: Path) -> str:
        config = workspace.config()
        own = config.model_copy(update={"reward": config.reward.model_copy(update={"backbone": str(backbone)})})
        return next(stage.hash for stage in generation.plan(workspace, own, 1) if stage.name == "reward")

    folder = tiny_policy(tmp_path / "one" / "backbone")
    before = reward(folder)
    assert reward(Path(shutil.copytree(folder, tmp_path / "two" / "backbone"))) == before
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert reward(folder) != before


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (
            "reward.json",
            lambda old: {"max_prompt_tokens": 224, "signal_weight": 0.25},
            "signal_weights: Field required",
        ),
        ("pointwise/pointwise.json", lambda old: {"mean": 0.5}, "max_prompt_tokens: Field required"),
        ("signals.json", lambda old: {"kinds": ["love"], "reports": {"love": {"auc": 0.6}}}, "reports.love.auc: Input"),
        ("signals.json", lambda old: {"kinds": []}, "reports: Field required"),
        ("artifact.json", lambda old: old | {"colour": "red"}, "colour: Extra inputs are not permitted"),
    ],
)
def test_reward_models_of_another_version_are_said_in_one_sentence(  # type: ignore[no-untyped-def]
    file: str, change, said: str, workspace: Workspace, models: Path
):
    folder = trained(workspace, models)
    old = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps(change(old)), encoding="utf-8")
    with pytest.raises(FlywheelError, match=rf"{file} was written by another version \({said}.*\): use that version"):
        score_commands.score(workspace, None, "127.0.0.1", 0)


def test_signal_weights_of_other_names_are_said_in_one_sentence(workspace: Workspace, models: Path):
    folder = trained(workspace, models)
    save_file({"coefficients": np.zeros(3)}, folder / "signals.safetensors")
    with pytest.raises(FlywheelError, match=r"signals.safetensors was written by another version \(.*coefficients"):
        score_commands.score(workspace, None, "127.0.0.1", 0)


def test_limits_are_those_of_the_command_line(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    """What is not said stays at the default; what a server cannot keep to is refused before models are loaded."""
    told: list[Limits] = []
    monkeypatch.setattr(score_commands, "score", lambda *given: told.append(given[-1]))
    command = ["score", str(workspace.root)]
    assert CliRunner().invoke(app, [*command, "--max-waiting", "3", "--max-joined", "7"]).exit_code == 0
    assert CliRunner().invoke(app, command).exit_code == 0
    assert told == [Limits(max_waiting=3, max_joined=7), Limits()]
    assert CliRunner().invoke(app, [*command, "--max-replies", "1"]).exit_code == 2


@pytest.mark.slow
def test_the_command_serves_a_run_and_ends_when_told(workspace: Workspace, models: Path):
    """Started as a process on a free port; a workshop whose config names it gets the same scores as from the files."""
    folder = trained(workspace, models)
    command = [sys.executable, "-m", "characterflywheel.cli", "score", str(workspace.root), "--port", "0"]
    command += ["--max-replies", "12", "--max-wait-s", "2.5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            found = re.fullmatch(
                rf"scoring with {folder.name}@{content_of(outputs(folder))} of generation 1 on (http://127.0.0.1:\d+) "
                "without a key, for this machine only; stop with Ctrl-C\n",
                line,
            )
            assert found, line
            assert card(found[1]).limits == Limits(max_replies=12, max_wait_s=2.5)
            ask(workspace, folder, found[1])
        finally:
            server.send_signal(signal.SIGTERM)
            _, said = server.communicate(timeout=20)
    assert "Traceback" not in said
    assert server.returncode in (0, -signal.SIGTERM)


def ask(workspace: Workspace, folder: Path, address: str) -> None:
    """As a stage does, with the server in the workspace's configuration."""
    config = workspace.config()
    config = config.model_copy(update={"reward": config.reward.model_copy(update={"server": address})})
    record = ArtifactRecord.model_validate_json((folder / "artifact.json").read_text())
    artifact = Artifact("reward", folder, None, record)
    work = Work(folder, 1, {"judge": artifact})  # type: ignore[dict-item]
    rewards = Workshop(workspace, config, None, None, 1).rewards(work)
    assert work.notes == {"scores": f"flywheel score, {precision_of(loaded(folder).pointwise)}"}
    assert isinstance(rewards, RemoteRewards)
    prompts, replies = [asks("Hi"), asks("Ho")], [["tea", "rain"], ["A longer reply?"]]
    here = loaded(folder).pointwise.score(prompts, replies)
    for told, expected in zip(rewards.pointwise.score(prompts, replies), here, strict=True):
        assert told == pytest.approx(expected, abs=1e-6)
    rewards.close()
    with pytest.raises(FlywheelError, match="this stage was planned with reward-another@"):
        connect(address, "reward-another", "0")
