import torch

from characterflywheel.llm.as_forward import checkpoint_layers
from characterflywheel.llm.shared_prefix import Path, reply_logprobs
from tiny_model import tiny_llama

PATHS: list[Path] = [
    ((5, 6, 7), (8, 9), (10, 11, 12)),
    ((5, 6, 7), (8, 9), (13,)),
    ((20, 21), (22, 23, 24, 25), (26, 27)),
]


def gradients(checkpointed: bool) -> tuple[list[torch.Tensor], int]:
    """Every parameter's gradient, and how many numbers were kept for backward."""
    model = tiny_llama(num_hidden_layers=6)
    if checkpointed:
        checkpoint_layers(model)
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = -reply_logprobs(model, PATHS).logprobs.sum()
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None], kept


def test_checkpointing_changes_memory_and_no_gradient() -> None:
    plain, much = gradients(checkpointed=False)
    again, little = gradients(checkpointed=True)
    assert len(plain) == len(again) > 40
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert little < much / 2


def test_without_gradient_nothing_is_kept_or_run_twice() -> None:
    model = tiny_llama()
    with torch.no_grad():
        before = reply_logprobs(model, PATHS).logprobs
        checkpoint_layers(model)
        assert torch.equal(reply_logprobs(model, PATHS).logprobs, before)


def test_a_module_says_how_functions_are_run_on_it() -> None:
    model, seen = tiny_llama(), []

    def run_as(function, *args, **kwargs):  # type: ignore[no-untyped-def]
        seen.append(function.__name__)
        return function(model, *args, **kwargs)

    model.run_as = run_as  # type: ignore[assignment]
    assert reply_logprobs(model, PATHS).logprobs.shape == (6,)
    assert seen == ["reply_logprobs"]
