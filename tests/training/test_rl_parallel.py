"""RL in two processes: each draws, scores and learns from a share of the prompts, and both end where one would."""

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import together
from rl_fixture import Judged, letters, metrics, train
from training_fixture import weights

from characterflywheel import tables
from characterflywheel.config import RLAlarmsConfig, RLConfig
from characterflywheel.llm import native
from characterflywheel.llm.native import load_model
from characterflywheel.records import Rollout
from characterflywheel.training import learner, sharding
from characterflywheel.training.adapters import attach
from characterflywheel.training.parallel import Parallel, Sharding
from characterflywheel.training.rl import samplers
from characterflywheel.training.rl.step import without_adapters

CONFIG = RLConfig(
    steps=2, prompts_per_step=3, group=4, learning_rate=1e-3, temperature=1.0, max_tokens=6, updates_per_step=2,
    kl_weight=0.1, micro_batch_tokens=60, alarms=RLAlarmsConfig(every=1, kl_max=1e-9, stop=("gold",)),
)  # fmt: skip
MODULES: tuple[Any, ...] = (native, learner, sharding, samplers)


def _float32(device: str = "cpu") -> torch.dtype:
    return torch.float32


def _train(parallel: Parallel, folder: Path, parent: Path) -> tuple[int, Any]:
    for module in MODULES:
        module.fast_dtype = _float32
    asked = Judged(letters)
    summary = train(folder, parent, CONFIG, asked, gold=Judged(letters), parallel=parallel)
    return asked.asked, summary


def _with_adapters(parallel: Parallel, folder: Path, parent: Path) -> list[float]:
    """A step of each algorithm that asks for the start before its first update; the norms of their gradients."""
    norms = []
    for config in (
        RLConfig(kl_weight=0.1, lora_rank=2, steps=1, group=4, prompts_per_step=2, max_tokens=4),
        RLConfig(algorithm="online_dpo", lora_rank=2, steps=1, group=4, prompts_per_step=2, max_tokens=4),
    ):
        train(folder / config.algorithm, parent, config, Judged(letters), parallel=parallel)
        norms += [row.get("gradient_norm", 0.0) for row in metrics(folder / config.algorithm)]
    return norms


def test_adapters_in_shards_learn_beside_the_start_that_they_hide(tiny_folder: Path, tmp_path: Path) -> None:
    """FSDP makes a parameter of its shards once: were its gradient away then, it would be for good."""
    norms, again = together(_with_adapters, tmp_path, tiny_folder, sharding="full")
    assert norms == again
    assert all(norm > 0 for norm in norms)


def test_adapters_keep_their_gradient_where_they_are_put_aside(tiny_folder: Path) -> None:
    model = load_model(tiny_folder, torch.float32)[0]
    attach(model, 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    asked = torch.arange(5)[None]
    before, trained = model(asked).logits, [p.requires_grad for p in model.parameters()]
    with without_adapters(model):
        assert [p.requires_grad for p in model.parameters()] == trained
        plain = model(asked).logits
    torch.testing.assert_close(plain, load_model(tiny_folder, torch.float32)[0](asked).logits)
    assert torch.equal(model(asked).logits, before)
    assert not torch.allclose(plain, before)


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, real = tmp_path_factory.mktemp("alone"), native.fast_dtype
    _train(Parallel.alone(), folder, tiny_folder)
    for module in MODULES:
        module.fast_dtype = real
    return folder


@pytest.mark.parametrize("sharding_", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_two_processes_end_where_one_does(sharding_: Sharding, alone: Path, tiny_folder: Path, tmp_path: Path) -> None:
    (first, summary), (second, again) = together(_train, tmp_path, tiny_folder, world=2, sharding=sharding_)
    assert summary == again
    assert 0 < first < second, "of three prompts one process has one"
    mine, theirs = (tables.read(folder / "rollouts.parquet", Rollout) for folder in (alone, tmp_path))
    assert [r.token_ids for r in mine] == [r.token_ids for r in theirs]
    for one, two in zip(metrics(alone), metrics(tmp_path), strict=True):
        assert one.keys() == two.keys()
        assert list(one.values()) == pytest.approx(list(two.values()), rel=1e-3, abs=1e-5)
    before, a, b = (weights(folder) for folder in (tiny_folder, alone / "model", tmp_path / "model"))
    moved = max(float((a[name] - before[name]).abs().max()) for name in a)
    apart = max(float((a[name] - b[name]).abs().max()) for name in a)
    assert apart < 0.02 * moved
    for name in ("alarms.jsonl", "looks.parquet", "timing.jsonl", "dropped.parquet"):
        assert (tmp_path / name).exists()
