"""`kill -9` anywhere in SFT or DPO, run again: the same bytes (the same device). Every step is checkpointed."""

from collections.abc import Callable
from pathlib import Path

import pytest
from killed import At, kill
from random_kills import run, same_files, survive
from training_fixture import example, pair, weights

from characterflywheel.config import DPOConfig, SFTConfig
from characterflywheel.pipeline import Work
from characterflywheel.training import dpo, learner
from characterflywheel.training.dpo import train_dpo
from characterflywheel.training.sft import train_sft

REPLIES = ("the sea is cold.", "tea, and stars!", "no", "ask me tomorrow", "why not?", "in the morning", "rain", "yes")
EXAMPLES = [example(i, text) for i, text in enumerate(REPLIES)]
PAIRS = [
    pair(i, f"I like {word}. Do you?", f"I like {word}.", held_out=i % 4 == 3)
    for i, word in enumerate(("tea", "rain", "sea", "bread", "stars", "milk", "snow", "salt") * 3)
]


def sft(folder: Path, parent: Path, lora: bool) -> None:
    """With an early stop: a learning rate so high that the held-out loss rises at once."""
    learner.CHECKPOINT_SECONDS = -1.0
    config = SFTConfig(
        epochs=8, examples_per_step=2, learning_rate=3e-2, evaluation_share=0.25, evaluate_every=2, patience=6,
        lora_rank=2 if lora else None, micro_batch_tokens=60,
    )  # fmt: skip
    summary = train_sft(Work(folder, 3), config, parent, EXAMPLES, threads=1)
    (folder / "summary.json").write_text(summary.model_dump_json(), encoding="utf-8")


def preferences(folder: Path, parent: Path, lora: bool) -> None:
    learner.CHECKPOINT_SECONDS = dpo.CHECKPOINT_SECONDS = -1.0
    config = DPOConfig(
        pairs=24, pairs_per_step=2, learning_rate=1e-2, evaluate_every=3, lora_rank=2 if lora else None,
        sft_weight=0.1, micro_batch_tokens=100,
    )  # fmt: skip
    summary = train_dpo(Work(folder, 3), config, parent, PAIRS, threads=1)
    (folder / "summary.json").write_text(summary.model_dump_json(), encoding="utf-8")


slow = pytest.mark.slow
CASES = [
    (sft, True), (preferences, False), pytest.param(sft, False, marks=slow), pytest.param(preferences, True, marks=slow)
]  # fmt: skip


@pytest.mark.parametrize(("job", "lora"), CASES)
def test_a_job_killed_at_random_ends_in_the_same_bytes(
    job: Callable[..., None], lora: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    code, seconds = run(job, whole, tiny_folder, lora)
    assert code == 0
    assert survive(job, killed, tiny_folder, lora, kills=4, seconds=seconds * 0.6, seed=lora) >= 2
    files = same_files(whole, killed)
    assert {"model/model.safetensors", "metrics.jsonl", "summary.json", "dropped.parquet"} <= files
    assert ("adapter/adapter_model.safetensors" in files) is lora
    assert weights(whole / "model").keys() == weights(tiny_folder).keys()


@pytest.mark.parametrize("job", [sft, pytest.param(preferences, marks=slow)])
def test_a_job_killed_as_a_file_is_written_or_takes_its_place_ends_in_the_same_bytes(
    job: Callable[..., None], tiny_folder: Path, tmp_path: Path
) -> None:
    """The held-out losses or the reference first, then checkpoints, then the model that is saved."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert run(job, whole, tiny_folder, False)[0] == 0
    points = [
        At("torch:save", when="halfway"), At("os:replace", 2), At("torch:save", 3, "halfway"),
        At("transformers:PreTrainedModel.save_pretrained", 1, "after"),
    ]  # fmt: skip
    for point in points:
        kill(point, job, killed, tiny_folder, False)
    assert run(job, killed, tiny_folder, False)[0] == 0
    same_files(whole, killed)
