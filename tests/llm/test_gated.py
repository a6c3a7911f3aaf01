"""Our feed-forward against Hugging Face's, values and gradients."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from characterflywheel.llm.gated import feed_forward


def module(activation: str = "silu") -> LlamaMLP:
    torch.manual_seed(0)
    return LlamaMLP(LlamaConfig(hidden_size=12, intermediate_size=20, num_attention_heads=2, hidden_act=activation))


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_values_and_gradients(activation: str) -> None:
    mlp, x = module(activation), torch.randn(7, 12, requires_grad=True)
    ours, theirs, weights = feed_forward(mlp, x), mlp(x), torch.randn(7, 12)
    torch.testing.assert_close(ours, theirs)
    parts = [x, *mlp.parameters()]
    for one, other in zip(
        torch.autograd.grad((ours * weights).sum(), parts), torch.autograd.grad((theirs * weights).sum(), parts),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_without_gradients_the_module_runs() -> None:
    mlp, x = module(), torch.randn(3, 12)
    with torch.no_grad():
        assert torch.equal(feed_forward(mlp, x), mlp(x))


def test_only_two_states_are_kept() -> None:
    """Besides what the linear layers keep: the gate before its activation, and what it is multiplied with."""
    mlp, x = module(), torch.randn(5, 12, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        feed_forward(mlp, x)
    assert kept.count(5 * 20) == 3
