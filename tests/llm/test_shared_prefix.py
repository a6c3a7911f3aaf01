"""The shared forward pass against Hugging Face's own, one sequence at a time."""

import random
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

from characterflywheel.errors import FlywheelError
from characterflywheel.llm.shared_prefix import Path, check_family, hidden_states, plant, reply_logprobs
from tiny_model import VOCABULARY, tiny_llama

SEGMENTS = st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple)
PATHS = st.lists(st.lists(SEGMENTS, min_size=2, max_size=4).map(tuple), min_size=1, max_size=6)


@cache
def model() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    return tiny_llama()


def separately(path: Path, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the last segment's tokens, from a pass over this path alone."""
    ids = torch.tensor([token for segment in path for token in segment])
    logits = model()(ids.unsqueeze(0)).logits[0].float() / temperature
    logs = torch.log_softmax(logits, dim=-1)[-len(path[-1]) - 1 : -1]
    targets = ids[-len(path[-1]) :]
    return logs.gather(1, targets.unsqueeze(1)).squeeze(1), torch.distributions.Categorical(logits=logs).entropy()


def workload(seed: int = 0) -> list[Path]:
    """Two system prompts, two histories under each, three replies to each, of lengths as in a group of rollouts."""
    rng = random.Random(seed)

    def some(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(low, high)))

    histories = [(system, some(5, 30)) for system in (some(20, 30), some(10, 20)) for _ in range(2)]
    return [(*history, some(1, 12)) for history in histories for _ in range(3)]


def test_values_equal_separate_passes() -> None:
    paths = workload()
    out = reply_logprobs(model(), paths)
    alone = [separately(path) for path in paths]
    torch.testing.assert_close(out.logprobs, torch.cat([a for a, _ in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.entropy, torch.cat([e for _, e in alone]), atol=1e-5, rtol=0)
    assert out.path.tolist() == [i for i, path in enumerate(paths) for _ in path[-1]]
    assert not out.entropy.requires_grad


def test_values_are_at_the_sampling_temperature() -> None:
    paths = workload(1)
    out = reply_logprobs(model(), paths, temperature=0.7)
    expected = torch.cat([separately(path, 0.7)[0] for path in paths])
    torch.testing.assert_close(out.logprobs, expected, atol=1e-5, rtol=0)


def test_gradients_equal_separate_passes() -> None:
    paths = workload(2)
    weights = torch.randn(sum(len(path[-1]) for path in paths), generator=torch.Generator().manual_seed(0))
    gradients = []
    for logprobs in (
        lambda: reply_logprobs(model(), paths).logprobs,
        lambda: torch.cat([separately(path)[0] for path in paths]),
    ):
        model().zero_grad()
        (logprobs() * weights).mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model().named_parameters() if p.grad is not None})
    shared, alone = gradients
    assert shared.keys() == alone.keys() == dict(model().named_parameters()).keys()
    for name in alone:
        torch.testing.assert_close(shared[name], alone[name], atol=1e-5, rtol=1e-4, msg=name)
    assert max(g.abs().max() for g in alone.values()) > 1e-2


@settings(max_examples=25, deadline=None)
@given(PATHS)
def test_random_forests_equal_separate_passes(paths: list[Path]) -> None:
    """Few distinct tokens, so that segments, prefixes and whole paths recur in every way."""
    with torch.no_grad():
        out = reply_logprobs(model(), paths)
        expected = torch.cat([separately(path)[0] for path in paths])
    torch.testing.assert_close(out.logprobs, expected, atol=1e-5, rtol=0)


@settings(max_examples=50, deadline=None)
@given(PATHS)
def test_a_forest_lays_out_every_path_once(paths: list[Path]) -> None:
    forest = plant(paths)
    nodes = {path[: i + 1] for path in paths for i in range(len(path))}
    assert forest.tokens == sum(len(node[-1]) for node in nodes)
    for path, rows in zip(paths, forest.rows, strict=True):
        flat = [token for segment in path for token in segment]
        assert forest.ids[rows].tolist() == flat
        assert forest.positions[rows].tolist() == list(range(len(flat)))


def test_shared_segments_run_once() -> None:
    system, ask, other = (1, 2, 3), (4, 5), (6,)
    forest = plant([(system, ask, (7,)), (system, ask, (8, 9)), (system, other, (7,)), ((1, 2), (3,), ask)])
    assert forest.tokens == 3 + 2 + 1 + 2 + 1 + 1 + (2 + 1 + 2)


def test_empty_segments_are_passed_over() -> None:
    with_hole, without = plant([((), (1, 2), (), (3,)), ((1, 2), (4,))]), plant([((1, 2), (3,)), ((1, 2), (4,))])
    assert with_hole.ids.tolist() == without.ids.tolist() == [1, 2, 3, 4]
    assert [r.tolist() for r in with_hole.rows] == [[0, 1, 2], [0, 1, 3]]


@pytest.mark.parametrize("path", [(), ((), ())])
def test_an_empty_path_is_refused(path: Path) -> None:
    with pytest.raises(FlywheelError, match="at least one token"):
        plant([((1,), (2,)), path])


def test_layers_stop_early_and_keys_are_kept() -> None:
    paths = workload(3)[:1]
    kept: list[tuple[Tensor, Tensor]] = []
    forest = plant(paths)
    with torch.no_grad():
        states = hidden_states(model().model, forest, layers=1, keep=kept)
        ids = forest.ids.unsqueeze(0)
        expected = model().model.norm(model().model(ids, output_hidden_states=True).hidden_states[1])[0]
        cache = model().model(ids, use_cache=True).past_key_values
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)
    assert len(kept) == 1
    keys, values = kept[0]
    torch.testing.assert_close(keys.transpose(0, 1), cache.layers[0].keys[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(values.transpose(0, 1), cache.layers[0].values[0], atol=1e-5, rtol=0)


def test_other_families_are_refused() -> None:
    class Other:
        model_type = "gpt2"

    with pytest.raises(FlywheelError, match="'gpt2' is not of the Llama family"):
        check_family(Other())
    check_family(model().config)
