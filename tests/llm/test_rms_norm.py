"""Our normalisation against Hugging Face's, values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from characterflywheel.llm.rms_norm import rms_norm


def norm_and_states(rows: int, width: int, seed: int) -> tuple[LlamaRMSNorm, Tensor]:
    torch.manual_seed(seed)
    norm = LlamaRMSNorm(width, eps=1e-5)
    norm.weight.data = torch.rand(width) + 0.5
    return norm, (3 * torch.randn(rows, width)).requires_grad_()


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 20), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_values_and_gradients(rows: int, width: int, seed: int) -> None:
    norm, x = norm_and_states(rows, width, seed)
    weights = torch.randn(rows, width)
    ours, theirs = rms_norm(norm, x), norm(x)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    parts = [x, norm.weight]
    for one, other in zip(
        torch.autograd.grad((ours * weights).sum(), parts), torch.autograd.grad((theirs * weights).sum(), parts),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_under_autocast_the_result_is_rounded_once_and_gradients_are_float32() -> None:
    norm, x = norm_and_states(5, 16, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = rms_norm(norm, x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, norm(x).to(torch.bfloat16), atol=0, rtol=2**-7)
    for gradient in torch.autograd.grad(found.sum(), [x, norm.weight]):
        assert gradient.dtype == torch.float32


@pytest.mark.parametrize("part", ["weight", "states"])
def test_what_is_frozen_gets_no_gradient(part: str) -> None:
    norm, x = norm_and_states(3, 8, 1)
    frozen, other = (norm.weight, x) if part == "weight" else (x, norm.weight)
    frozen.requires_grad_(False)
    (ours,) = torch.autograd.grad(rms_norm(norm, x).sum(), [other])
    (theirs,) = torch.autograd.grad(norm(x).sum(), [other])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_other_types_and_inference_are_the_modules_own() -> None:
    norm, x = norm_and_states(3, 8, 2)
    with torch.no_grad():
        assert torch.equal(rms_norm(norm, x), norm(x))
    low = x.detach().to(torch.bfloat16)
    assert torch.equal(rms_norm(norm, low), norm(low))
