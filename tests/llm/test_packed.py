"""Scoring from packed weights against the same model's ordinary pass."""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reading_fixture import forest_of_conversations, tiny_encoder
from transformers import BertModel, Qwen2Config, Qwen2Model, RobertaModel

from characterflywheel.errors import FlywheelError
from characterflywheel.llm import reading
from characterflywheel.llm.packed import Linear, Packed, affine
from characterflywheel.llm.segment_attention import groups
from characterflywheel.llm.shared_prefix import Path, plant
from tiny_model import VOCABULARY, tiny_llama

SEGMENTS = st.lists(st.integers(3, 6), min_size=1, max_size=3).map(tuple)
PATHS = st.lists(st.lists(SEGMENTS, min_size=1, max_size=4).map(tuple), min_size=1, max_size=7)


def tiny_qwen() -> Any:
    """Biases on query, key and value."""
    torch.manual_seed(0)
    model = Qwen2Model(Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=160, initializer_range=0.2, bos_token_id=0, eos_token_id=2,
    )).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def tiny_roberta() -> Any:
    return tiny_encoder(RobertaModel, hidden_act="gelu_new")


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(num_hidden_layers=3).model,
    "one layer": lambda: tiny_llama(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4).model,
    "rope scaled": lambda: tiny_llama(rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                                       "original_max_position_embeddings": 128}).model,
    "qwen2": tiny_qwen,
    "bert": lambda: tiny_encoder(BertModel),
    "roberta": tiny_roberta,
}  # fmt: skip


@cache
def model(name: str) -> Any:
    torch.set_num_threads(1)
    return MODELS[name]()


@cache
def packed(name: str) -> Packed:
    found = reading.pack(model(name))
    assert found is not None
    return found


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_packed_equals_unpacked(name: str) -> None:
    """At the start, inside and at the end of paths; several places in one segment; the same place twice."""
    paths = forest_of_conversations(random.Random(0))
    for read in (-1,), (0, -1), (3, 30, -1, -1):
        places = [tuple(min(at, sum(map(len, path)) - 1) for at in read) for path in paths]
        expected = reading.states(model(name), paths, places)
        found = reading.states(model(name), paths, places, packed=packed(name))
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        assert found.dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "bert"])
@settings(max_examples=40, deadline=None)
@given(paths=PATHS, seed=st.integers(0, 99))
@torch.no_grad()
def test_random_forests_equal_unpacked(name: str, paths: list[Path], seed: int) -> None:
    rng = random.Random(seed)
    read = [[rng.randrange(sum(map(len, path))) for _ in range(2)] for path in paths]
    expected = reading.states(model(name), paths, read)
    torch.testing.assert_close(
        reading.states(model(name), paths, read, packed=packed(name)), expected, atol=2e-5, rtol=0
    )


@settings(max_examples=40, deadline=None)
@given(PATHS, st.booleans(), st.integers(0, 99))
def test_groups_are_the_mask(paths: list[Path], both_ways: bool, seed: int) -> None:
    """Every query is in one group, and sees there the rows that the tree's dense mask lets it see."""
    forest = plant(paths)
    rng = random.Random(seed)
    read = sorted(rng.sample(range(forest.tokens), rng.randint(1, forest.tokens)))
    for asked in (read, None):
        rows = list(range(forest.tokens)) if asked is None else asked
        seen: list[list[int]] = []
        for group in groups(forest, both_ways=both_ways, read=asked):
            each = (group.stop - group.start) // group.size
            assert group.start == len(seen)
            for keys in group.keys:
                mask = group.mask
                if group.causal:
                    mask = torch.ones(each, len(keys), dtype=torch.bool).tril()
                seen += [(keys if mask is None else keys[mask[i]]).tolist() for i in range(each)]
        dense = [
            (torch.nonzero(tree.mask[row - tree.start]).flatten() + tree.start).tolist()
            for tree in forest.masked(both_ways) for row in range(tree.start, tree.stop)
        ]  # fmt: skip
        assert seen == [dense[row] for row in rows]


def test_many_siblings_attend_in_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [((5, 6, 7, 8), (i, 9)) for i in range(10, 30)]
    with torch.no_grad():
        expected = reading.states(model("llama"), paths, [(-1,)] * 20, packed=packed("llama"))
        monkeypatch.setattr("characterflywheel.llm.segment_attention.KEYS_AT_ONCE", 20)
        assert [g.size for g in groups(plant(paths), both_ways=False)] == [1, 3, 3, 3, 3, 3, 3, 2]
        found = reading.states(model("llama"), paths, [(-1,)] * 20, packed=packed("llama"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_bfloat16_is_near_and_half_the_size(name: str) -> None:
    """Weights in bfloat16 round to eight bits; states of size about one move by a few hundredths."""
    paths = forest_of_conversations(random.Random(1))
    small = reading.pack(model(name), torch.bfloat16)
    assert small is not None
    with torch.no_grad():
        expected = reading.states(model(name), paths, [(-1,)] * len(paths))
        found = reading.states(model(name), paths, [(-1,)] * len(paths), packed=small)
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 0.05
    assert small.nbytes * 2 == packed(name).nbytes


def test_bytes_are_those_of_the_linear_layers() -> None:
    linear = [part for part in model("bert").modules() if isinstance(part, torch.nn.Linear)]
    assert packed("bert").nbytes == sum(4 * (part.weight.numel() + part.bias.numel()) for part in linear)


@pytest.mark.parametrize("change", ["fused AdamW", "through .data", "rows", "rows .data", "replaced", "moved"])
def test_weights_that_changed_are_noticed(change: str) -> None:
    mine = tiny_llama().model
    weights = reading.pack(mine)
    paths, read = [((5, 6), (7,))], [(-1,)]
    with torch.no_grad():
        before = reading.states(mine, paths, read, packed=weights)
    last = mine.layers[-1].mlp.down_proj
    if change == "fused AdamW":
        reading.states(mine, paths, read).square().sum().backward()
        torch.optim.AdamW([last.weight], lr=0.1, fused=True).step()
    elif change == "through .data":
        last.weight.data += 0.1
    elif change == "rows":
        with torch.no_grad():
            last.weight[-1] *= 3
    elif change == "rows .data":
        last.weight.data[5:] *= 3
    elif change == "replaced":
        last.weight = torch.nn.Parameter(last.weight.detach() * 2)
    else:
        mine.double().float()
    with torch.no_grad():
        with pytest.raises(FlywheelError, match="weights have changed since they were packed: pack it again"):
            reading.states(mine, paths, read, packed=weights)
        again = reading.states(mine, paths, read, packed=reading.pack(mine))
        torch.testing.assert_close(again, reading.states(mine, paths, read), atol=1e-5, rtol=0)
    assert (float((again - before).abs().max()) > 1e-3) == (change != "moved")


def test_adapters_are_packed_with_their_weights() -> None:
    from peft import LoraConfig, LoraModel  # noqa: PLC0415 - slow to import

    mine = tiny_llama().model
    paths, read = [((5, 6), (7,)), ((5, 6), (8, 9))], [(-1,)] * 2
    with torch.no_grad():
        plain = reading.states(mine, paths, read)
        LoraModel(mine, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]), "default").eval()
        for name, parameter in mine.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        expected = reading.states(mine, paths, read)
        found = reading.states(mine, paths, read, packed=reading.pack(mine))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert float((found - plain).abs().max()) > 0.1


def test_a_linear_module_is_its_weight_and_bias() -> None:
    part = torch.nn.Linear(3, 2)
    weight, bias = affine(part)
    assert weight is not part.weight
    assert torch.equal(weight, part.weight)
    assert bias is not None
    assert torch.equal(bias, part.bias)


@pytest.mark.parametrize("prepacked", [True, False])
@torch.no_grad()
def test_products_are_linear_layers(prepacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With oneDNN and without, for any number of rows."""
    if not prepacked:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.manual_seed(0)
    part = torch.nn.Linear(24, 40)
    mine = Linear(part.weight, part.bias, torch.float32)
    assert mine.prepacked == prepacked
    for rows in (1, 7, 600):
        x, other = torch.randn(rows, 24), torch.randn(rows, 40)
        y = part(x)
        pairs = [
            (mine(x), y), (mine.plus(x, other), y + other), (mine.times(x, other), y * other),
            (mine(x, "silu"), torch.nn.functional.silu(y)), (mine(x, "gelu"), torch.nn.functional.gelu(y)),
            (mine(x, "gelu_new"), torch.nn.functional.gelu(y, approximate="tanh")), (mine(x, "relu"), y.relu()),
        ]  # fmt: skip
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_gradients_are_refused() -> None:
    with pytest.raises(FlywheelError, match=r"packed weights give no gradients: score under torch.no_grad"):
        reading.states(model("llama"), [((5,), (6,))], [(0,)], packed=packed("llama"))


def test_another_models_weights_are_refused() -> None:
    with (
        torch.no_grad(),
        pytest.raises(FlywheelError, match="packed weights are those of another model: pack this one"),
    ):
        reading.states(model("bert"), [((5,), (6,))], [(0,)], packed=packed("llama"))


def test_what_cannot_be_packed_is_said() -> None:
    with pytest.raises(FlywheelError, match=r"hidden_act = 'tanh', can be packed: silu, gelu, gelu_new, relu"):
        reading.pack(tiny_llama(hidden_act="tanh").model)
    with pytest.raises(FlywheelError, match=r"training mode cannot be packed: call its eval\(\) first"):
        reading.pack(tiny_llama().model.train())
