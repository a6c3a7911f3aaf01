"""The shared forward pass on a GPU: the same loss and gradient as on the CPU in float32."""

import random
from collections.abc import Iterator

import pytest
import torch

from characterflywheel.llm.shared_prefix import Path, reply_logprobs
from tiny_model import VOCABULARY, tiny_llama

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """Tensor cores would round products to ten bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def workload() -> list[Path]:
    """Two prompts under one system prompt, four replies to each, all of different lengths."""
    rng = random.Random(0)

    def some(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, VOCABULARY) for _ in range(count))

    system = some(40)
    return [(system, history, some(reply)) for history in (some(30), some(75)) for reply in (1, 9, 16, 32)]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_loss_and_gradient_equal_the_cpus_in_float32(dtype: torch.dtype, close: float) -> None:
    """Relative difference of the loss and, over all parameters together, of the gradient."""
    losses, gradients = [], []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        model = tiny_llama(hidden_size=128, intermediate_size=256, initializer_range=0.05).to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=kind == torch.bfloat16):
            tokens = reply_logprobs(model, workload(), temperature=0.8, device=device)
            loss = -tokens.logprobs.mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=close)
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < close
