"""Padded batches of architectures that this package does not know, against one unpadded sequence at a time."""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reading_fixture import forest_of_conversations
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    MistralConfig,
    MistralModel,
    ModernBertConfig,
    ModernBertModel,
    Qwen3Config,
    Qwen3Model,
)

from characterflywheel.llm import padded, reading
from characterflywheel.llm.shared_prefix import Path
from tiny_model import VOCABULARY

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 160, "initializer_range": 0.2,
         "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": None}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3Model(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(
        **SIZES | {"pad_token_id": 0}, cls_token_id=0, sep_token_id=2, local_attention=8,
    )),
    "distilbert": lambda: DistilBertModel(DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=160,
    )),
    "causal bert": lambda: BertModel(BertConfig(**SIZES | {"pad_token_id": 0}, is_decoder=True)),
    "mistral that slides": lambda: MistralModel(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8)),
}  # fmt: skip


@cache
def model(name: str) -> Any:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return MODELS[name]().eval()


def alone(name: str, paths: list[Path]) -> Tensor:
    """States at the first place of each path's last segment, and at its end."""
    found = []
    for path in paths:
        ids = [token for segment in path for token in segment]
        states = model(name)(input_ids=torch.tensor([ids])).last_hidden_state[0]
        found.append(states[[-len(path[-1]), -1]])
    return torch.stack(found)


def places(paths: list[Path]) -> list[tuple[int, int]]:
    return [(sum(map(len, path[:-1])), -1) for path in paths]


@pytest.mark.parametrize("name", MODELS)
def test_values_equal_separate_passes_in_the_order_of_the_paths(name: str) -> None:
    paths = forest_of_conversations(random.Random(0))
    with torch.no_grad():
        found = reading.states(model(name), paths, places(paths))
        torch.testing.assert_close(found, alone(name, paths), atol=1e-5, rtol=0)
        in_small = padded.states(model(name), paths, places(paths), budget=100)
        torch.testing.assert_close(in_small, found, atol=1e-5, rtol=0)
    assert reading.pack(model(name)) is None or name.startswith("mistral")


@pytest.mark.parametrize("name", ["qwen3", "modernbert"])
def test_gradients_equal_separate_passes(name: str) -> None:
    paths = forest_of_conversations(random.Random(1))
    weights = torch.randn(32, generator=torch.Generator().manual_seed(0))
    found = []
    for run in (lambda: padded.states(model(name), paths, places(paths), budget=100), lambda: alone(name, paths)):
        model(name).zero_grad()
        (run() @ weights).mean().backward()
        found.append({n: p.grad.clone() for n, p in model(name).named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for parameter, expected in found[1].items():
        torch.testing.assert_close(found[0][parameter], expected, atol=1e-5, rtol=1e-4, msg=parameter)


def test_a_mistral_shares_prefixes_while_its_window_holds_all() -> None:
    """Up to eight tokens nothing slides; from nine on a token no longer sees the first, and padded batches are used."""
    mistral = model("mistral that slides")
    weights = reading.pack(mistral)
    for length in (8, 9):
        paths: list[Path] = [((5, 6, 7, 9), tuple(range(10, 6 + length)))]
        with torch.no_grad():
            expected = alone("mistral that slides", paths)
            for given_weights in (None, weights):
                found = reading.states(mistral, paths, places(paths), packed=given_weights)
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_batches_hold_every_path_once_within_the_budget(sizes: list[int], budget: int) -> None:
    batches = list(padded.by_length(sizes, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    assert all(len(batch) == 1 or len(batch) * max(sizes[i] for i in batch) <= budget for batch in batches)
    in_order = [sizes[i] for batch in batches for i in batch]
    assert in_order == sorted(in_order)
