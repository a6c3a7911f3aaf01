"""SFT and DPO in two processes: whole stages end in the weights of one process, also after a worker's death.

Weights are compared to 1e-5 in float32. The learning rate is 1e-4: AdamW's step is as large as that however small a
gradient is, so that gradients within rounding of 0 would move weights by it in either direction.
"""

import functools
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import together
from training_fixture import example, pair, weights

from characterflywheel.config import DPOConfig, ParallelConfig, SFTConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.llm import native
from characterflywheel.pipeline import Work
from characterflywheel.training import learner, sharding
from characterflywheel.training.dpo import train_dpo
from characterflywheel.training.launch import spread
from characterflywheel.training.parallel import Parallel, Sharding
from characterflywheel.training.sft import train_sft

REPLIES = ("the sea is cold.", "tea, and stars!", "no", "ask me tomorrow", "bread and the sea", "why not?")
EXAMPLES = [example(i, text) for i, text in enumerate(REPLIES)]
PAIRS = [pair(i, text, "go away") for i, text in enumerate(REPLIES)]
SFT = SFTConfig(
    epochs=3, examples_per_step=4, learning_rate=1e-4, evaluation_share=0.2, micro_batch_tokens=90, extra=(),
    patience=100, evaluate_every=1,
)  # fmt: skip
DPO = DPOConfig(pairs=6, pairs_per_step=3, learning_rate=1e-4, micro_batch_tokens=90)
WAYS: dict[str, tuple[Any, ...]] = {
    "sft": (train_sft, SFT, EXAMPLES),
    "sft adapters": (train_sft, SFT.model_copy(update={"lora_rank": 4}), EXAMPLES),
    "dpo": (train_dpo, DPO, PAIRS),
}


def _float32(device: str = "cpu") -> torch.dtype:
    return torch.float32


def _train_all(parallel: Parallel, root: Path, parent: Path) -> dict[str, Any]:
    """Every stage's summary; its files are in `root/WAY`."""
    real = [(module, module.fast_dtype) for module in (native, learner, sharding)]
    for module, _ in real:
        module.fast_dtype = _float32
    done = {}
    for name, (train, config, rows) in WAYS.items():
        work = Work(root / name, 3)
        work.folder.mkdir(parents=True, exist_ok=True)
        done[name] = train(
            work,
            config,
            parent,
            rows,
            threads=1,
            parallel=parallel,
            device=parallel.device or "cpu",
            gradient_checkpointing=True,
        )
    for module, kind in real:
        module.fast_dtype = kind
    return done


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, _train_all(Parallel.alone(), folder, tiny_folder)


@pytest.mark.parametrize("how", ["none", "full"])
def test_stages_end_where_one_process_does(
    how: Sharding, alone: tuple[Path, dict[str, Any]], tiny_folder: Path, tmp_path: Path
) -> None:
    first, second = together(_train_all, tmp_path, tiny_folder, sharding=how)
    folder, expected = alone
    for name, summary in expected.items():
        assert first[name] == second[name], name
        assert first[name].steps == summary.steps
        assert first[name].last_loss == pytest.approx(summary.last_loss, abs=1e-5)
        one, two, before = (
            weights(place) for place in (folder / name / "model", tmp_path / name / "model", tiny_folder)
        )
        assert one.keys() == two.keys() == before.keys()
        assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-5, name
        assert max(float((one[k] - before[k]).abs().max()) for k in one) > 1e-4, "something was learnt"
        files = [{p.relative_to(place).as_posix() for p in place.rglob("*") if ".partial" not in p.parts}
                 for place in (folder / name, tmp_path / name)]  # fmt: skip
        assert files[0] == files[1], "the same files"


def _kill_worker(folder: Path, rank: int, after: int) -> None:
    """Kill the worker of this rank as soon as a checkpoint of at least `after` steps is there."""
    log = folder / ".partial" / "learner.pt"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if log.exists():
            for entry in Path("/proc").glob("[0-9]*/environ"):
                try:
                    words = entry.read_bytes().split(b"\0")
                    said = (entry.parent / "cmdline").read_bytes()
                except OSError:
                    continue
                if f"RANK={rank}".encode() in words and str(folder).encode() in said and b"worker" in said:
                    os.kill(int(entry.parent.name), signal.SIGKILL)
                    return
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["none", "full"])
def test_a_killed_worker_s_stage_goes_on(
    how: Sharding, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of one of two real workers: the error says so, and the same command ends in the same bytes."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, Path(__file__).parents[:2])))
    config = SFT.model_copy(update={"epochs": 60, "learning_rate": 1e-3})
    two = ParallelConfig(processes=2, sharding=how)
    run = functools.partial(spread, two, slowly, threads=1, device="cpu", on_progress=lambda done, total: None)
    whole, killed = Work(tmp_path / "whole", 3), Work(tmp_path / "killed", 3)
    for work in (whole, killed):
        work.folder.mkdir()
    expected = run(whole, config, tiny_folder, EXAMPLES)
    killer = threading.Thread(target=_kill_worker, args=(killed.folder, 1, 2))
    killer.start()
    with pytest.raises(FlywheelError, match="training worker 1 was ended by SIGKILL"):
        run(killed, config, tiny_folder, EXAMPLES)
    killer.join()
    assert run(killed, config, tiny_folder, EXAMPLES) == expected
    a, b = (work.folder / "model" / "model.safetensors" for work in (whole, killed))
    assert a.read_bytes() == b.read_bytes()
    rows = [json.loads(line) for line in (killed.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert max(row["step"] for row in rows) == expected.steps


def slowly(work: Work, *arguments: Any, **settings: Any) -> Any:
    """`train_sft` with a checkpoint after every step, so that there is something to go on from."""
    learner.CHECKPOINT_SECONDS, learner.SAVING_SECONDS = -1.0, 1e9
    return train_sft(work, *arguments, **settings)
