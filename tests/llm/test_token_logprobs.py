"""Token log-probabilities against log_softmax on all logits at once, values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from characterflywheel.llm.token_logprobs import UNKEPT, token_logprobs


def head_and_states(rows: int, vocabulary: int, seed: int) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(seed)
    head = nn.Linear(16, vocabulary, bias=False)
    return head, (2 * torch.randn(rows, 16)).requires_grad_(), torch.randint(0, vocabulary, (rows,))


def plainly(head: nn.Linear, states: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    choice = torch.distributions.Categorical(logits=head(states) / temperature)
    return choice.log_prob(targets), choice.entropy()


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), vocabulary=st.integers(2, 300), temperature=st.floats(0.5, 3), seed=st.integers(0, 99))
def test_values_and_gradients(rows: int, vocabulary: int, temperature: float, seed: int) -> None:
    head, states, targets = head_and_states(rows, vocabulary, seed)
    weights = torch.randn(rows)
    found = token_logprobs(head, states, targets, temperature)
    logs, entropy = plainly(head, states, targets, temperature)
    torch.testing.assert_close(found.logprobs, logs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.entropy, entropy, atol=1e-5, rtol=1e-5)
    assert not found.entropy.requires_grad
    parts = [head.weight, states]
    ours = torch.autograd.grad((found.logprobs * weights).sum(), parts)
    theirs = torch.autograd.grad((logs * weights).sum(), parts)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_without_gradients_and_over_several_slabs() -> None:
    head, states, targets = head_and_states(2 * UNKEPT + 3, 50, 0)
    with torch.no_grad():
        found = token_logprobs(head, states, targets)
        logs, entropy = plainly(head, states, targets, 1.0)
    torch.testing.assert_close(found.logprobs, logs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.entropy, entropy, atol=1e-5, rtol=1e-5)


def test_a_token_that_is_hardly_possible_keeps_its_logarithm() -> None:
    """By hand: two tokens, logits 0 and 500: log p = -500 and 0, where p itself is 0 in float32."""
    head = nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[0.0], [500.0]])
    found = token_logprobs(head, torch.ones(2, 1), torch.tensor([0, 1]))
    assert found.logprobs.tolist() == [-500.0, 0.0]
    assert found.entropy.tolist() == [0.0, 0.0]


def test_frozen_weights_get_no_gradient_and_states_do() -> None:
    head, states, targets = head_and_states(5, 20, 1)
    head.weight.requires_grad_(False)
    token_logprobs(head, states, targets).logprobs.sum().backward()
    (expected,) = torch.autograd.grad(plainly(head, states, targets, 1.0)[0].sum(), [states])
    assert head.weight.grad is None
    assert states.grad is not None
    torch.testing.assert_close(states.grad, expected, atol=1e-5, rtol=1e-5)


def test_a_second_backward_pass_is_refused() -> None:
    head, states, targets = head_and_states(5, 20, 2)
    loss = token_logprobs(head, states, targets).logprobs.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_under_autocast_products_are_bfloat16_and_gradients_float32() -> None:
    head, states, targets = head_and_states(6, 30, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_logprobs(head, states, targets)
    found.logprobs.sum().backward()
    assert found.logprobs.dtype == torch.float32
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(found.logprobs, plainly(head, states, targets, 1.0)[0], atol=0.2, rtol=0.02)


def test_a_head_that_is_more_than_a_product_is_called() -> None:
    class Shifted(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + torch.arange(self.out_features)

    torch.manual_seed(0)
    head, states, targets = Shifted(16, 20), torch.randn(3, 16), torch.tensor([0, 5, 19])
    expected, entropy = plainly(head, states, targets, 0.5)
    found = token_logprobs(head, states, targets, 0.5)
    torch.testing.assert_close(found.logprobs, expected)
    torch.testing.assert_close(found.entropy, entropy, atol=1e-5, rtol=1e-5)
