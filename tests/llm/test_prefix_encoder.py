"""An encoder over shared prefixes against `BertModel` on the padded batch with the same block mask."""

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reading_fixture import block_masked, forest_of_conversations, tiny_encoder
from torch import Tensor
from transformers import BertModel, RobertaModel

from characterflywheel.llm import reading
from characterflywheel.llm.prefix_encoder import hidden_states
from characterflywheel.llm.shared_prefix import Path, plant

SEGMENTS = st.lists(st.integers(3, 6), min_size=1, max_size=3).map(tuple)
PATHS = st.lists(st.lists(SEGMENTS, min_size=1, max_size=4).map(tuple), min_size=1, max_size=6)


@cache
def bert() -> BertModel:
    torch.set_num_threads(1)
    return tiny_encoder(BertModel)


def every_row(model: Any, paths: Sequence[Path]) -> list[Tensor]:
    forest = plant(paths)
    states = hidden_states(model, forest)
    return [states[rows] for rows in forest.rows]


@pytest.mark.parametrize("kind", [BertModel, RobertaModel])
def test_values_equal_the_padded_batch_under_the_block_mask(kind: Any) -> None:
    model, paths = tiny_encoder(kind), forest_of_conversations(random.Random(0))
    with torch.no_grad():
        for mine, expected in zip(every_row(model, paths), block_masked(model, paths), strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)


def test_gradients_equal_the_padded_batchs() -> None:
    paths = forest_of_conversations(random.Random(1))
    weights = torch.randn(32, generator=torch.Generator().manual_seed(0))
    found = []
    for run in (every_row, block_masked):
        bert().zero_grad()
        (torch.stack([states[-1] for states in run(bert(), paths)]) @ weights).mean().backward()
        found.append({name: p.grad.clone() for name, p in bert().named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, atol=1e-5, rtol=1e-4, msg=name)
    assert max(float(g.abs().max()) for g in found[1].values()) > 1e-2


@settings(max_examples=30, deadline=None)
@given(PATHS)
def test_random_forests_equal_the_padded_batch(paths: list[Path]) -> None:
    """Few distinct tokens, so that segments, prefixes and whole paths recur in every way."""
    with torch.no_grad():
        for mine, expected in zip(every_row(bert(), paths), block_masked(bert(), paths), strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)


def test_a_context_does_not_depend_on_its_replies() -> None:
    context = (5, 6, 7, 8)
    with torch.no_grad():
        alone = bert()(torch.tensor([context])).last_hidden_state[0]
        states = every_row(bert(), [(context, (9, 10)), (context, (11,))])
    for mine in states:
        torch.testing.assert_close(mine[:4], alone, atol=1e-5, rtol=0)
    assert float((states[0][-1] - states[1][-1]).abs().max()) > 1e-2


def test_inside_a_segment_tokens_see_what_comes_after() -> None:
    with torch.no_grad():
        one, two = (every_row(bert(), [((5, 6), (7, last))])[0] for last in (8, 9))
    torch.testing.assert_close(one[:2], two[:2])
    assert float((one[2] - two[2]).abs().max()) > 1e-2


def test_dropout_in_training_is_the_models_own() -> None:
    """Means over 400 passes with dropout of hidden states and of attention are those of transformers' own passes."""
    model, path = tiny_encoder(BertModel, attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.1), ((5, 6, 7),)
    model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        mine = torch.stack([every_row(model, [path])[0] for _ in range(400)])
        theirs = model(torch.tensor(path).expand(400, -1)).last_hidden_state
    errors = ((mine.var(0) + theirs.var(0)) / 400).sqrt()
    assert float(((mine.mean(0) - theirs.mean(0)) / errors).abs().max()) < 4.5
    assert float((mine.std(0) / theirs.std(0)).log().abs().mean()) < 0.1
    assert not torch.equal(mine[0], mine[1])


def test_reading_dispatches_to_it() -> None:
    paths = forest_of_conversations(random.Random(2))
    with torch.no_grad():
        found = reading.states(bert(), paths, [(0, -1)] * len(paths))
        expected = torch.stack([states[[0, -1]] for states in block_masked(bert(), paths)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
