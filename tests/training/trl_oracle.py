"""TRL's trainers on the tiny model and on replies given as token ids: their own losses and gradients, no generation."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from characterflywheel.llm.shared_prefix import Path as TokenPath
from tiny_model import VOCABULARY, tiny_tokenizer

LENGTHS = ((3, 1, 6, 4), (2, 5, 5, 2))  # tokens of each prompt's replies
CONFIG: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True,
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
}  # fmt: skip


def paths(seed: int = 0) -> list[TokenPath]:
    """Two prompts of 9 and 14 tokens under one system prompt of 5, four replies each."""
    draw = torch.Generator().manual_seed(seed)

    def some(size: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (size,), generator=draw).tolist())

    system = some(5)
    return [
        (system, prompt, some(length))
        for prompt, lengths in zip((some(9), some(14)), LENGTHS, strict=True)
        for length in lengths
    ]


def load(folder: Path, moved: int | None = None, scale: float = 0.02) -> Any:
    """The tiny model; `moved` is the seed of noise on every weight, for a policy that is another one."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if moved is not None:
        move(model, moved, scale)
    return model.eval()


def move(model: Any, seed: int, scale: float) -> None:
    """Add the same noise to the same weights, wherever they are."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=scale)


def trainer(
    name: str, folder: Path, work: Path, rows: Sequence[dict[str, Any]], *, more: dict[str, Any] | None = None,
    **config: Any,
) -> Any:  # fmt: skip
    """A trainer of TRL's by name ("SFT", "DPO", "GRPO", "OnlineDPO"), its model in the mode of training.

    `more` are the constructor's arguments beyond model, configuration and rows, or others in their place.
    """
    import datasets  # noqa: PLC0415

    if name == "OnlineDPO":
        trl = pytest.importorskip("trl.experimental.online_dpo", reason="TRL is the oracle")
    else:
        trl = pytest.importorskip("trl", reason="TRL is the oracle")
    arguments = getattr(trl, f"{name}Config")(output_dir=str(work), **CONFIG | config)
    with contextlib.redirect_stdout(io.StringIO()):
        out = getattr(trl, f"{name}Trainer")(
            model=load(folder), args=arguments, train_dataset=datasets.Dataset.from_list(list(rows)),
            **{"processing_class": tiny_tokenizer(), **(more or {})},
        )  # fmt: skip
    out.model.train()  # no dropout: only TRL's divisors depend on it
    return out


def assert_same(expected: Tensor, theirs: Any, loss: Tensor, ours: Any) -> None:
    """Loss and the gradient of every weight to 1e-5, absolute below 1 and relative above; TRL's are there already."""
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), atol=1e-5, rtol=0)
    reference = {name: p.grad for name, p in theirs.named_parameters()}
    mine = {name: p.grad for name, p in ours.named_parameters()}
    assert set(mine) == set(reference)
    for name, gradient in reference.items():
        torch.testing.assert_close(mine[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert max(float(g.abs().max()) for g in reference.values()) > 1e-3
