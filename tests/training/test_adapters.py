from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from characterflywheel.training import adapters
from tiny_model import tiny_llama

IDS = torch.arange(20)[None]


def adapted(seed: int = 0, layers: int | None = None) -> LlamaForCausalLM:
    """The tiny model with adapters that do something."""
    model = tiny_llama()
    adapters.attach(model, 4, layers=layers, seed=seed)
    torch.manual_seed(5)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def test_adapters_begin_as_nothing_and_are_drawn_by_their_seed() -> None:
    one, same, other = tiny_llama(), tiny_llama(), tiny_llama()
    state = torch.get_rng_state()
    for model, seed in ((one, 1), (same, 1), (other, 2)):
        adapters.attach(model, 4, seed=seed)
    assert torch.equal(torch.get_rng_state(), state), "nobody else's draws change"
    assert torch.equal(one(IDS).logits, tiny_llama()(IDS).logits)
    drawn = [[p for n, p in m.named_parameters() if "lora_A" in n] for m in (one, same, other)]
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(drawn[0], drawn[2], strict=True))


@pytest.mark.parametrize(("layers", "first"), [(None, 0), (1, 1), (9, 0)])
def test_only_adapters_of_the_last_layers_learn(layers: int | None, first: int) -> None:
    learning = [name for name, p in adapted(layers=layers).named_parameters() if p.requires_grad]
    assert all(".lora_" in name for name in learning)
    assert {int(name.split(".")[2]) for name in learning} == set(range(first, 2))
    assert len(learning) == 7 * 2 * (2 - first), "A and B of seven linear layers"


def test_plain_weights_are_those_of_the_merged_model(tmp_path: Path) -> None:
    """The oracle is peft's own merge; names and order are those of a model without adapters."""
    model = adapted()
    plain = dict(adapters.plain_weights(model))
    assert list(plain) == [name for name, _ in tiny_llama().named_parameters()]
    model.save_pretrained(tmp_path, state_dict=plain)
    merged = adapted()
    for part in merged.modules():
        if hasattr(part, "get_delta_weight"):
            part.merge()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(loaded(IDS).logits, merged(IDS).logits, atol=1e-6)
    assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-4)
    assert not torch.allclose(loaded(IDS).logits, tiny_llama()(IDS).logits, atol=0.1)


def test_a_model_without_adapters_is_plain_already() -> None:
    model = tiny_llama()
    assert not adapters.adapted(model)
    weights = dict(adapters.plain_weights(model))
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_reads_the_saved_adapters(tmp_path: Path) -> None:
    from peft import PeftModel  # noqa: PLC0415 - takes seconds

    model = adapted()
    assert adapters.adapted(model)
    adapters.save_adapter(model, tmp_path / "one")
    adapters.save_adapter(adapted(), tmp_path / "two")
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "one")
    assert torch.equal(theirs(IDS).logits, model(IDS).logits)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
