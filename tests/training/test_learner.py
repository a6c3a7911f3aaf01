import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from training_fixture import weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from characterflywheel.errors import FlywheelError
from characterflywheel.llm.shared_prefix import Path as TokenPath
from characterflywheel.llm.shared_prefix import reply_logprobs
from characterflywheel.training import learner as learning
from characterflywheel.training.learner import MICRO_BATCH_TOKENS, Learner, micro_batches, reply_sums
from characterflywheel.training.losses import per_reply
from tiny_model import asks

STEPS = 6


def learner(
    folder: Path, partial: Path | None = None, *, train_layers: int | None = None, rate: float = 1e-2
) -> Learner:
    return Learner(
        folder, learning_rate=rate, steps=STEPS, max_prompt_tokens=128, threads=1, train_layers=train_layers,
        partial=partial,
    )  # fmt: skip


def paths(mine: Learner, step: int = 0) -> list[TokenPath]:
    return [(*mine.format.prompt(asks(f"{step} stars")), mine.format.reply(text)) for text in ("the sea", "tea?")]


def take_step(mine: Learner, step: int) -> None:
    with mine.autocast():
        loss = -reply_logprobs(mine.model, paths(mine, step)).logprobs.mean()
    loss.backward()
    mine.update(loss=loss.item())


def state(mine: Learner) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in mine.model.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_resumed_run_ends_in_the_same_bits(tiny_folder: Path, tmp_path: Path) -> None:
    whole = learner(tiny_folder)
    for step in whole.remaining_steps():
        take_step(whole, step)
    killed = learner(tiny_folder, tmp_path)
    for step in killed.remaining_steps():
        if step == 3:
            break
        take_step(killed, step)
        killed.save_checkpoint()
    take_step(killed, 3)  # a step that is lost, since nothing was saved after it
    resumed = learner(tiny_folder, tmp_path)
    assert resumed.step == 3
    assert list(resumed.log) == whole.log[:3]
    for step in resumed.remaining_steps():
        take_step(resumed, step)
    assert changed(state(whole), state(resumed)) == set()
    assert resumed.log == whole.log
    whole.save(tmp_path / "whole")
    resumed.save(tmp_path / "resumed")
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "resumed" / file.name).read_bytes()


def test_a_checkpoint_is_written_every_minute_and_atomically(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = learner(tiny_folder, tmp_path)
    steps = mine.remaining_steps()
    take_step(mine, next(steps))
    next(steps)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(learning, "CHECKPOINT_SECONDS", -1.0)
    take_step(mine, 1)
    next(steps)
    assert [path.name for path in tmp_path.iterdir()] == ["learner.pt"]
    assert learner(tiny_folder, tmp_path).step == 2


def test_without_a_place_nothing_is_kept(tiny_folder: Path) -> None:
    mine = learner(tiny_folder)
    mine.save_checkpoint()
    assert mine.step == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_a_clear_error_and_changes_nothing(bad: float, tiny_folder: Path) -> None:
    mine = learner(tiny_folder)
    take_step(mine, 0)
    before = state(mine)
    for parameter in mine.parameters:
        parameter.grad = torch.zeros_like(parameter)
    mine.parameters[0].grad[0, 0] = bad
    with pytest.raises(
        FlywheelError, match=r"step 2 of 6: gradient norm is (nan|inf), must be finite; lower the learn"
    ):
        mine.update(loss=1.0)
    assert changed(before, state(mine)) == set()
    assert (mine.step, len(mine.log)) == (1, 1)


@pytest.mark.parametrize(
    ("train_layers", "learnt"), [(1, {"model.layers.1"}), (2, {"model.layers.0", "model.layers.1"})]
)
def test_frozen_layers_stay(train_layers: int, learnt: set[str], tiny_folder: Path) -> None:
    mine = learner(tiny_folder, train_layers=train_layers)
    before = state(mine)
    take_step(mine, 0)
    take_step(mine, 1)
    moved = changed(before, state(mine))
    assert {".".join(name.split(".")[:3]) for name in moved} == {*learnt, "model.norm.weight"}
    assert all(p.grad is None for p in mine.model.parameters())


def test_everything_learns_without_train_layers(tiny_folder: Path) -> None:
    mine = learner(tiny_folder)
    before = state(mine)
    take_step(mine, 0)
    assert changed(before, state(mine)) == set(before)


def test_the_gradient_is_clipped_and_logged(tiny_folder: Path) -> None:
    """A gradient of norm 5 in one entry: Adam's first step is the learning rate whatever its scale."""
    mine = learner(tiny_folder, rate=0.5)
    before = state(mine)["model.norm.weight"]
    for parameter in mine.parameters:
        parameter.grad = torch.zeros_like(parameter)
    mine.model.model.norm.weight.grad[3] = -5.0
    mine.update(loss=2.5, tokens=7)
    (row,) = mine.log
    assert row == {"step": 1, "learning_rate": 0.5, "gradient_norm": 5.0, "loss": 2.5, "tokens": 7}
    moved = state(mine)["model.norm.weight"] - before
    assert moved[3].item() == pytest.approx(0.5, rel=1e-4)
    assert moved.count_nonzero() == 1
    assert mine.optimiser.state[mine.model.model.norm.weight]["exp_avg"][3].item() == pytest.approx(-0.1, rel=1e-4)


def test_the_learning_rate_warms_up_and_falls_to_a_tenth(tiny_folder: Path) -> None:
    mine = Learner(tiny_folder, learning_rate=1.0, steps=40, max_prompt_tokens=128, threads=1, warmup_share=0.25)
    for _ in mine.remaining_steps():
        for parameter in mine.parameters:
            parameter.grad = torch.zeros_like(parameter)
        mine.update()
    rates = [row["learning_rate"] for row in mine.log]
    assert len(rates) == 40
    assert rates[:9] == sorted(rates[:9])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) > 0.8
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_a_saved_model_is_the_trained_one_in_float32(tiny_folder: Path, tmp_path: Path) -> None:
    mine = learner(tiny_folder)
    take_step(mine, 0)
    mine.save(tmp_path / "model")
    saved = weights(tmp_path / "model")
    assert "lm_head.weight" not in saved, "tied to the embedding, so stored once"
    for name, value in saved.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, mine.model.state_dict()[name])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template == mine.tokenizer.chat_template
    assert tokenizer("the sea")["input_ids"] == mine.tokenizer("the sea")["input_ids"]


def test_reply_sums_have_no_gradient(tiny_folder: Path) -> None:
    mine = learner(tiny_folder)
    sums = reply_sums(mine, paths(mine))
    with mine.autocast():
        tokens = reply_logprobs(mine.model, paths(mine))
    assert torch.equal(sums, per_reply(tokens.logprobs, tokens.path, 2).detach())
    assert not sums.requires_grad


SIZES = st.lists(st.lists(st.integers(1, 700), min_size=1, max_size=3), max_size=12)


@given(SIZES)
def test_micro_batches_keep_order_and_stay_near_their_size(sizes: list[list[int]]) -> None:
    """Items of several paths under one prompt; the prompt counts once, since it is run once."""
    prompts = [(i,) * 10 for i in range(len(sizes))]
    items = [(i, [(prompts[i], (j,) * n) for j, n in enumerate(several)]) for i, several in enumerate(sizes)]
    batches = list(micro_batches(items))
    assert [item for batch in batches for item in batch] == items
    tokens = [10 + sum(several) for several in sizes]
    for batch in batches:
        assert len(batch) == 1 or sum(tokens[i] for i, _ in batch) <= MICRO_BATCH_TOKENS
    for one, two in pairwise(batches):
        assert sum(tokens[i] for i, _ in one) + tokens[two[0][0]] > MICRO_BATCH_TOKENS, "as few batches as fit"
