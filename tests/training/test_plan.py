"""The plan's arithmetic: counts against transformers, memory by hand and against what a run held."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from characterflywheel import config
from characterflywheel.config import FlywheelConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.training import adapters
from characterflywheel.training.footprint import Example, Footprint, measure
from characterflywheel.training.plan import GIB, Machine, Setting, plan, settings_of
from characterflywheel.training.plan import _memory as memory_of
from characterflywheel.training.shape import SHAPES, Shape, read_shape, shape_of

TINY = Shape(2, 32, 64, 2, 1, 16, 320, True, 0)
SMALL = Example(12, 4, 2)
SEVENTY, EIGHT = read_shape(Path("Llama-3.1-70B-Instruct")), read_shape(Path("Llama-3.1-8B"))
H100 = Machine(80e9, 989e12, True)


def on_meta(values: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))


@pytest.mark.parametrize(
    "values",
    [
        json.loads((SHAPES / "llama-3.1-8b.json").read_text("utf-8")),
        json.loads((SHAPES / "llama-3.1-70b.json").read_text("utf-8")),
        {"model_type": "qwen2", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99, "tie_word_embeddings": True},
        {"model_type": "mistral", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 99, "head_dim": 16},
        {"model_type": "llama", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99, "attention_bias": True,
         "mlp_bias": True},
    ],
    ids=["8b", "70b", "qwen2", "mistral", "biases"],
)  # fmt: skip
def test_parameters_are_those_of_transformers(values: dict[str, Any]) -> None:
    model, shape = on_meta(values), shape_of(values)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.layer == sum(p.numel() for p in model.model.layers[0].parameters())


def test_published_counts() -> None:
    """70,553,706,496 and 8,030,261,248, as their model cards have them."""
    assert (SEVENTY.parameters, EIGHT.parameters) == (70_553_706_496, 8_030_261_248)


def test_adapters_are_counted_as_attached() -> None:
    from tiny_model import tiny_llama  # noqa: PLC0415

    model = tiny_llama()
    adapters.attach(model, 4, layers=1)
    assert TINY.trained(1, 4) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("values", "says"),
    [({"model_type": "gpt2"}, "'gpt2' is not of the Llama family"), ({"model_type": "llama"}, "no 'hid")],
)
def test_a_shape_that_cannot_be_read(values: dict[str, Any], says: str) -> None:
    with pytest.raises(FlywheelError, match=says):
        shape_of(values)


def test_an_unknown_folder_names_the_known_shapes() -> None:
    with pytest.raises(FlywheelError, match=r"not of a known shape .llama-3.1-70b, llama-3.1-8b"):
        read_shape(Path("/models/other"))


def setting(**changes: Any) -> Setting:
    return Setting("sft", Example(1000, 24, 1), 64, 10, 2048, None, None, 8, "full", True)._replace(**changes)


def test_memory_worked_by_hand() -> None:
    """8B over 8 GPUs: weights and gradients 4 bytes, AdamW 8, an eighth of each here.

    In use: two layers of 218,112,000 and a head of 525,336,576 in bfloat16; a gradient arrives in bfloat16 and float32,
    the head's the largest. Two examples keep 32 inputs of 1024 x 4096 float32 and, in one layer, 3 + 4 bytes.
    """
    held = memory_of(EIGHT, setting(), H100, Footprint(3.0, 4.0, 5.0))
    p = 8_030_261_248
    assert held.weights == 4 * p / 8
    assert held.optimiser == 8 * p / 8
    assert held.gathered == 2 * (2 * 218_112_000 + 525_336_576)
    assert held.gradients == 4 * p / 8 + 6 * 525_336_576
    assert held.activations == 2 * (32 * 4 * 1024 * 4096 + 7)
    assert (held.copies, held.decoding) == (0, 0)


def test_decoding_and_copies_worked_by_hand() -> None:
    """4 prompts of 1000 with 8 replies of 24: 4768 tokens of 2 x 32 x 8 x 128 numbers of 2 bytes; 32 logits."""
    rl = setting(stage="rl", example=Example(1000, 24, 8), sampled=(4, 8), copies=2)
    held = memory_of(EIGHT, rl, H100, Footprint(0, 0, 0))
    assert held.decoding == 4768 * 2 * 32 * 8 * 128 * 2 + 32 * 128_256 * 4
    assert held.copies == 2 * 2 * 8_030_261_248
    anchored = memory_of(EIGHT, rl._replace(copies=0, reference=True), H100, Footprint(0, 0, 0))
    assert anchored.copies == 4 * 8_030_261_248 / 8, "float32, split over 8 as the learner's"
    judged = memory_of(EIGHT, rl._replace(judges=1e9), H100, Footprint(0, 0, 0))
    assert judged.total - held.total == judged.judges == 4e9
    assert held.total == pytest.approx(held.weights + held.optimiser + held.copies + max(
        held.gathered + held.gradients + held.activations, held.decoding))  # fmt: skip
    rests = memory_of(EIGHT, rl._replace(copies=0, rested=1), H100, Footprint(0, 0, 0))
    assert rests.decoding - held.decoding == 2 * 8_030_261_248
    assert rests.copies == 0


def test_micro_batches_and_what_is_sent() -> None:
    """64 examples of 1024 tokens, two at once, on 8 processes: four rounds, each with two gathers and one sum."""
    found = plan(EIGHT, setting(), H100)
    assert (found.micro_batch_examples, found.micro_batches, found.tokens_per_step) == (2, 4, 65_536)
    assert found.sent_per_step == 4 * (2 * 2 + 4) * 8_030_261_248
    assert found.fits
    assert found.remedy is None
    # 2 operations a weight and token, thrice for learning and once more for the checkpoints; attention and head less
    assert found.operations_per_step == pytest.approx(8 * 6.98e9 * 65_536, rel=0.05)
    assert 0 < found.seconds[0] < found.seconds[1]


def test_what_does_not_fit_says_what_would() -> None:
    alone = plan(EIGHT, setting(processes=1, sharding="none", checkpointing=False), H100)
    assert not alone.fits
    assert alone.remedy == "parallel.gradient_checkpointing = true, sft.micro_batch_tokens = 1024, sft.lora_rank = 16"


def test_activations_grow_with_width_and_checkpoints_keep_inputs() -> None:
    """What the narrow models say of a tiny one is what the tiny one itself holds (heads of 16, measured at 4 and 8)."""
    at_sixteen = measure(TINY, SMALL)
    wide = measure(Shape(2, 64, 128, 2, 1, 32, 320, True, 0), SMALL)
    assert 1.5 < wide.kept / at_sixteen.kept < 2
    assert wide.passing > 0
    assert wide.head > 320 * 8 * 2, "logits of eight tokens"


@pytest.mark.parametrize("name", ["gpu", "cluster"], ids=["8b", "70b"])
def test_presets_fit_what_they_are_made_for(name: str, tmp_path: Path) -> None:
    (tmp_path / "flywheel.toml").write_text(f'preset = "{name}"', "utf-8")
    loaded = config.load(tmp_path / "flywheel.toml")
    shape = read_shape(Path(loaded.models.base))
    for one in settings_of(loaded, shape):
        assert one.example.rows <= one.micro_batch_tokens
        # by a footprint above what was measured of either shape: 600 kB a layer and token at most
        generous = Footprint(*(one.example.rows * 2**19 for _ in range(3)))
        held = memory_of(shape, one, H100, generous)
        assert held.total < 0.9 * 80e9, f"{one.stage}: {held.total / GIB:.1f} GiB"


def test_every_stage_is_planned() -> None:
    assert [one.stage for one in settings_of(FlywheelConfig(), EIGHT)] == ["sft", "dpo", "rl"]


@pytest.mark.parametrize(
    ("rl", "reference"),
    [({}, True), ({"alarms": {"every": 0}}, False), ({"alarms": {"every": 0}, "algorithm": "online_dpo"}, True),
     ({"alarms": {"every": 0}, "kl_weight": 0.1}, True), ({"lora_rank": 8}, False)],
)  # fmt: skip
def test_rl_s_reference_is_planned_where_there_is_one(rl: dict[str, Any], reference: bool) -> None:
    """For looks, online DPO or a KL term; adapters have their start in the same weights."""
    assert list(settings_of(FlywheelConfig.model_validate({"rl": rl}), EIGHT))[2].reference == reference


def test_reward_models_are_planned_unless_a_server_has_them() -> None:
    """Six layers and one embedding each: pointwise and pairwise, and gold where one is taught."""
    each = 6 * EIGHT.layer + EIGHT.embedding
    for reward, count in (({}, 2), ({"gold_share": 0.2}, 3), ({"server": "http://scores:8766"}, 0)):
        assert list(settings_of(FlywheelConfig.model_validate({"reward": reward}), EIGHT))[2].judges == count * each


def test_a_remedy_that_is_followed_fits() -> None:
    """8B with adapters on 62 GB, sampled from here: what is proposed is planned again."""
    rl = setting(
        stage="rl", example=Example(1024, 256, 8), micro_batch_tokens=3072, lora_rank=16, processes=1, sharding="none",
        examples_per_step=32, sampled=(16, 8), rested=1, judges=5e9,
    )  # fmt: skip
    small = H100._replace(memory=62e9)
    assert plan(EIGHT, rl, small).remedy == 'rl.sampler.kind = "endpoint", reward.server = "http://HOST:8766"'
    assert plan(EIGHT, rl._replace(sampled=None, rested=0, judges=0.0), small).fits
