"""One way to read any network: batches, windows, places, and what it says of input that cannot be read."""

import random
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reading_fixture import forest_of_conversations, tiny_encoder
from transformers import BertModel, RobertaModel

from characterflywheel.errors import FlywheelError
from characterflywheel.llm import reading, shared_prefix
from characterflywheel.llm.shared_prefix import Path
from tiny_model import tiny_llama

SEGMENTS = st.lists(st.integers(3, 6), min_size=1, max_size=3).map(tuple)
PATHS = st.lists(st.lists(SEGMENTS, min_size=1, max_size=4).map(tuple), min_size=1, max_size=8)


@cache
def llama() -> Any:
    torch.set_num_threads(1)
    return tiny_llama(max_position_embeddings=160).model


def test_a_llama_is_read_as_transformers_reads_it() -> None:
    paths = forest_of_conversations(random.Random(0))
    read = [(0, -1)] * len(paths)
    with torch.no_grad():
        expected = torch.stack([
            llama()(torch.tensor([sum(path, ())])).last_hidden_state[0, [0, -1]] for path in paths
        ])  # fmt: skip
        torch.testing.assert_close(reading.states(llama(), paths, read), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pack", [True, False])
def test_small_batches_give_the_same_states_in_the_order_of_the_paths(
    pack: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = forest_of_conversations(random.Random(1))
    random.Random(0).shuffle(paths)
    packed = reading.pack(llama()) if pack else None
    with torch.no_grad():
        expected = reading.states(llama(), paths, [(-1,)] * len(paths), packed=packed)
        monkeypatch.setattr(reading, "TOKENS_AT_ONCE", 60)
        assert len(list(reading.in_batches(paths, 60))) > 3
        found = reading.states(llama(), paths, [(-1,)] * len(paths), packed=packed)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@settings(max_examples=80, deadline=None)
@given(PATHS, st.integers(1, 30))
def test_batches_hold_every_path_once_within_the_budget(paths: list[Path], budget: int) -> None:
    batches = list(reading.in_batches(paths, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(paths)))
    for batch in batches:
        assert len(batch) == 1 or shared_prefix.plant([paths[i] for i in batch]).tokens <= budget


def test_paths_that_share_a_prefix_share_a_batch() -> None:
    """Interleaved, two prompts of ten tokens with two replies of one each: 12 tokens a batch, not 11 four times."""
    one, two = tuple(range(10)), tuple(range(10, 20))
    paths = [(one, (5,)), (two, (5,)), (one, (6,)), (two, (6,))]
    assert list(reading.in_batches(paths, 12)) == [[0, 2], [1, 3]]


def test_gradients_make_one_graph() -> None:
    paths = forest_of_conversations(random.Random(2))
    llama().zero_grad()
    states = reading.states(llama(), paths, [(-1,)] * len(paths))
    states.square().mean().backward()
    assert states.shape == (16, 1, 32)
    assert all(p.grad is not None for p in llama().layers.parameters())


@pytest.mark.parametrize(("kind", "window"), [(None, 160), (BertModel, 160), (RobertaModel, 158)])
def test_a_path_as_long_as_the_window_runs_and_a_longer_one_is_refused(kind: Any, window: int) -> None:
    """RoBERTa's first position is behind its padding token's number, 1."""
    model = tiny_encoder(kind) if kind else llama()
    assert reading.window(model.config) == window
    with torch.no_grad():
        assert reading.states(model, [((5,) * window,)], [(-1,)]).isfinite().all()
        with pytest.raises(
            FlywheelError, match=f"a path has {window + 1} tokens, the model's window is {window}: shorten"
        ):
            reading.states(model, [((5,) * window, (6,))], [(-1,)])


@pytest.mark.parametrize(
    ("paths", "read", "message"),
    [
        ([((5,),), ((), ())], [(0,), (0,)], "empty token sequence cannot be read"),
        ([((5, 6),)], [(2,)], r"places to read \[2\], the path has 2 tokens"),
        ([((5, 6),)], [(-3,)], r"places to read \[-3\], the path has 2 tokens"),
        ([], [], "no paths to read"),
        ([((5,),), ((6,),)], [(0,), (0, 0)], "as many places on each path"),
    ],
)
def test_what_cannot_be_read_is_said(paths: list[Path], read: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(FlywheelError, match=message):
        reading.states(llama(), paths, read)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_a_gpu_reads_the_same(kind: str, dtype: torch.dtype, close: float) -> None:
    """Unpacked and packed on the GPU against the CPU in float32, relative to the size of the states."""
    paths = forest_of_conversations(random.Random(3))
    read = [(0, -1)] * len(paths)
    model = tiny_encoder(BertModel) if kind == "bert" else tiny_llama().model
    with torch.no_grad():
        expected = reading.states(model, paths, read)
        model = model.to("cuda")
        for packed in (None, reading.pack(model, dtype)):
            found = reading.states(model, paths, read, packed=packed).cpu()
            assert float((found - expected).norm() / expected.norm()) < close
