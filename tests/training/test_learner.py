import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_fixture import weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from characterflywheel.errors import FlywheelError
from characterflywheel.llm.shared_prefix import Path as TokenPath
from characterflywheel.llm.shared_prefix import reply_logprobs
from characterflywheel.training import learner as learning
from characterflywheel.training.learner import Learner, reply_sums, write_metrics
from characterflywheel.training.losses import per_reply
from characterflywheel.training.parallel import Parallel
from tiny_model import asks

STEPS = 6


def learner(folder: Path, partial: Path | None = None, *, rate: float = 1e-2, **options: Any) -> Learner:
    return Learner(
        folder, learning_rate=rate, steps=STEPS, max_prompt_tokens=128, threads=1, partial=partial, **options
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


def test_with_adapters_the_weights_stay_and_a_plain_model_is_saved(tiny_folder: Path, tmp_path: Path) -> None:
    mine = learner(tiny_folder, lora_rank=2)
    assert all(".lora_" in name for name, p in mine.model.named_parameters() if p.requires_grad)
    frozen = {name: value for name, value in state(mine).items() if "lora" not in name}
    take_step(mine, 0)
    take_step(mine, 1)
    assert changed(frozen, state(mine)) == set()
    mine.save(tmp_path / "model")
    with torch.no_grad():
        learnt = reply_logprobs(mine.model, paths(mine)).logprobs
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert torch.allclose(reply_logprobs(plain, paths(mine)).logprobs, learnt, atol=1e-5)
    parent = weights(tiny_folder)
    moved = changed(parent, weights(tmp_path / "model"))
    assert moved == {name for name in parent if "_proj" in name}
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json",
    }  # fmt: skip


@pytest.mark.parametrize("options", [{"lora_rank": 2}, {"train_layers": 1}, {"lora_rank": 2, "train_layers": 1}])
def test_a_checkpoint_holds_what_is_trained_and_resumes_to_the_same_bits(
    options: dict[str, int], tiny_folder: Path, tmp_path: Path
) -> None:
    whole, killed = learner(tiny_folder, **options), learner(tiny_folder, tmp_path, **options)
    for mine, steps in ((whole, STEPS), (killed, 3)):
        for step in range(steps):
            take_step(mine, step)
            mine.evaluated(5.0 - step if step < 2 else 4.5, keep_best=True)
    torch.manual_seed(7)
    killed.save_checkpoint()
    drawn = torch.rand(3)
    resumed = learner(tiny_folder, tmp_path, **options)
    assert torch.equal(torch.rand(3), drawn), "random numbers go on too"
    assert resumed.evaluations_since_best() == 1
    for step in resumed.remaining_steps():
        take_step(resumed, step)
        resumed.evaluated(4.5, keep_best=True)
    assert changed(state(whole), state(resumed)) == set()
    assert resumed.evaluations == whole.evaluations
    assert (whole.return_to_best(), resumed.return_to_best()) == (2, 2)
    assert changed(state(whole), state(resumed)) == set()


def test_a_checkpoint_of_another_sharding_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    """As it was begun: one process's file read by sharded ones, and what sharded ones leave in it read by one."""
    mine = learner(tiny_folder, tmp_path)
    mine.save_checkpoint()
    mine.parallel = Parallel(rank=0, world=2, local=2, sharding="full")
    with pytest.raises(FlywheelError, match=r"learner.pt was begun with weights whole in every process, .*split over"):
        mine._resume()
    kept = torch.load(tmp_path / "learner.pt", weights_only=True)
    torch.save({k: v for k, v in kept.items() if k not in ("parameters", "optimiser")}, tmp_path / "learner.pt")
    with pytest.raises(
        FlywheelError, match=r"was begun with weights split over processes, .*1 processes\): set it back"
    ):
        learner(tiny_folder, tmp_path)


def test_the_best_weights_come_back(tiny_folder: Path) -> None:
    mine = learner(tiny_folder)
    mine.evaluated(3.0, keep_best=True)
    assert (mine.return_to_best(), mine.evaluations_since_best()) == (0, 0)
    take_step(mine, 0)
    mine.evaluated(2.0, keep_best=True)
    best = state(mine)
    take_step(mine, 1)
    mine.evaluated(2.0, keep_best=True)
    take_step(mine, 2)
    mine.evaluated(2.5, keep_best=True)
    assert mine.evaluations_since_best() == 2
    assert mine.return_to_best() == 1
    assert changed(best, state(mine)) == set()


def test_without_an_evaluation_the_weights_are_the_last_step_s(tiny_folder: Path) -> None:
    mine = learner(tiny_folder)
    take_step(mine, 0)
    before = state(mine)
    assert (mine.return_to_best(), mine.evaluations_since_best()) == (1, 0)
    assert changed(before, state(mine)) == set()


@pytest.mark.parametrize(
    ("loss", "told"), [(math.nan, "loss is nan, must be finite"), (9.5, "loss is 9.5, at most 9 is allowed")]
)
def test_a_loss_that_diverged_is_told_with_what_came_before(loss: float, told: str, tiny_folder: Path) -> None:
    mine = learner(tiny_folder, max_loss=9.0)
    take_step(mine, 0)
    before, last = state(mine), f"{mine.log[0]['loss']:.4g}"
    with pytest.raises(FlywheelError, match=f"step 2 of 6: {told}; lower the learning rate .*last losses: {last}"):
        mine.update(loss=loss)
    assert changed(before, state(mine)) == set()
    with pytest.raises(FlywheelError, match="evaluation loss is inf, must be finite"):
        mine.evaluated(math.inf)


def test_checkpointed_layers_have_the_same_gradient(tiny_folder: Path) -> None:
    plain, spare = learner(tiny_folder), learner(tiny_folder, gradient_checkpointing=True)
    for mine in (plain, spare):
        take_step(mine, 0)
    assert plain.log == spare.log
    assert changed(state(plain), state(spare)) == set()


def test_a_checkpoint_is_written_after_the_last_step(tiny_folder: Path, tmp_path: Path) -> None:
    mine = learner(tiny_folder, tmp_path)
    for step in mine.remaining_steps():
        take_step(mine, step)
    assert learner(tiny_folder, tmp_path).step == STEPS


def test_metrics_have_steps_and_evaluations_in_their_order(tiny_folder: Path, tmp_path: Path) -> None:
    mine = learner(tiny_folder)
    mine.evaluated(6.0)
    for step in range(2):
        take_step(mine, step)
        mine.evaluated(5.0 - step, evaluation_loss_user=5.5)
    write_metrics(tmp_path, mine)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [(row["step"], "evaluation_loss" in row) for row in rows] == [
        (0, True), (1, False), (1, True), (2, False), (2, True),
    ]  # fmt: skip
    assert rows[-1] == {"step": 2, "evaluation_loss": 4.0, "evaluation_loss_user": 5.5}
