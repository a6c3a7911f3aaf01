"""SFT and DPO in two processes: the steps, measures and files of one process.

With whole weights only the order of sums differs; split ones are gathered in bfloat16, embeddings and norms too.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import together
from training_fixture import example, pair, weights

from characterflywheel.config import DPOConfig, SFTConfig
from characterflywheel.pipeline import Work
from characterflywheel.records import Record
from characterflywheel.training.dpo import DPOSummary, train_dpo
from characterflywheel.training.parallel import Parallel, Sharding
from characterflywheel.training.sft import TrainingSummary, train_sft

EXAMPLES = [example(i, f"the sea is {i}, is it not? " * (i % 3 + 1)) for i in range(12)]
PAIRS = [pair(i, f"I like {i}. Do you?", f"I like {i}.", held_out=i % 3 == 2) for i in range(12)]


def sft(parallel: Parallel, folder: Path, parent: Path, lora: bool) -> TrainingSummary:
    config = SFTConfig(
        epochs=2, examples_per_step=5, learning_rate=1e-3, evaluation_share=0.25, evaluate_every=2, patience=5,
        lora_rank=2 if lora else None, micro_batch_tokens=100, near_duplicates=None,
    )  # fmt: skip
    return train_sft(Work(folder, 3), config, parent, EXAMPLES, threads=1, parallel=parallel)


def dpo(parallel: Parallel, folder: Path, parent: Path, lora: bool) -> DPOSummary:
    config = DPOConfig(
        pairs=8, pairs_per_step=3, learning_rate=1e-3, evaluate_every=1, lora_rank=2 if lora else None,
        micro_batch_tokens=100, sft_weight=0.1,
    )  # fmt: skip
    return train_dpo(Work(folder, 3), config, parent, PAIRS, threads=1, parallel=parallel)


CASES = [(sft, "none", True), (sft, "full", False), (dpo, "none", False), (dpo, "full", True)]


def _numbers(value: object, name: str = "") -> dict[str, object]:
    """The leaves of a summary by their place."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in _numbers(part, f"{name}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, part in enumerate(value) for k, v in _numbers(part, f"{name}[{i}]").items()}
    return {name: value}


@pytest.mark.parametrize(("stage", "sharding", "lora"), CASES)
def test_two_processes_do_what_one_does(
    stage: Callable[..., Record], sharding: Sharding, lora: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    alone = stage(Parallel.alone(), tmp_path / "one", tiny_folder, lora)
    summaries = together(stage, tmp_path / "two", tiny_folder, lora, world=2, sharding=sharding)
    for summary in summaries:
        one, two = _numbers(alone.model_dump()), _numbers(summary.model_dump())
        assert {name: v for name, v in one.items() if not isinstance(v, float)} == {
            name: v for name, v in two.items() if not isinstance(v, float)
        }
        for name, value in one.items():
            if isinstance(value, float) and not (sharding == "full" and "evaluation_" in name):
                assert two[name] == pytest.approx(value, rel=1e-2), name
    whole, cut = weights(tmp_path / "one" / "model"), weights(tmp_path / "two" / "model")
    assert whole.keys() == cut.keys()
    parent = weights(tiny_folder)
    moved, apart = (
        torch.cat([(one[name] - two[name]).flatten() for name in parent]).norm()
        for one, two in ((whole, parent), (whole, cut))
    )
    assert apart < (0.2 if sharding == "full" else 0.01) * moved, (
        "split weights are gathered in bfloat16; Adam's steps follow the sign"
    )
    names = [{p.name for p in (tmp_path / where).iterdir()} for where in ("one", "two")]
    assert names[0] == names[1]
    lines = [(tmp_path / where / "metrics.jsonl").read_text("utf-8").count("\n") for where in ("one", "two")]
    assert lines[0] == lines[1]
