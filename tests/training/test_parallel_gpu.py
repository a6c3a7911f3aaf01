"""What of training by many GPUs needs GPUs: the plan against what CUDA allocated, and two processes over NCCL."""

from pathlib import Path

import pytest
import torch
from processes import together
from test_parallel_stages import WAYS, _train_all
from training_fixture import weights

from characterflywheel.llm.shared_prefix import reply_logprobs
from characterflywheel.training.footprint import Example
from characterflywheel.training.learner import Learner
from characterflywheel.training.plan import Machine, Setting, plan
from characterflywheel.training.shape import read_shape
from tiny_model import tiny_llama, tiny_tokenizer

EXAMPLE = Example(192, 64, 1)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 million parameters: enough to see activations and weights."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    tiny_llama(hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8,
               num_key_value_heads=4, vocab_size=32_000).save_pretrained(folder)  # fmt: skip
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora_rank", [None, 8])
def test_the_plan_is_what_is_allocated(lora_rank: int | None, checkpointing: bool, wide: Path) -> None:
    """Within a quarter, for two steps of two full micro-batches."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    learner = Learner(
        wide, learning_rate=1e-5, steps=2, max_prompt_tokens=192, threads=4, device="cuda", lora_rank=lora_rank,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    paths = [path for number in range(6) for path in EXAMPLE.paths(number)]
    for _ in learner.remaining_steps():
        for _ in range(2):
            with learner.autocast():
                loss = -reply_logprobs(learner.model, paths, device="cuda").logprobs.mean() / 2
            loss.backward()  # type: ignore[no-untyped-call]
        learner.update(loss=float(loss.detach()))
    held = torch.cuda.max_memory_allocated() - before
    setting = Setting("sft", EXAMPLE, 12, 2, 1536, None, lora_rank, 1, "none", checkpointing)
    assert plan(read_shape(wide), setting, Machine(80e9, 989e12, True)).memory.total == pytest.approx(held, rel=0.25)


@pytest.mark.gpu
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_gpus_take_the_steps_of_one_process(sharding: str, tiny_folder: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    first, second = together(_train_all, tmp_path, tiny_folder, sharding=sharding, device="cuda")
    assert first == second
    for name in WAYS:
        after, before = weights(tmp_path / name / "model"), weights(tiny_folder)
        assert max(float((after[k] - before[k]).abs().max()) for k in after) > 1e-4
