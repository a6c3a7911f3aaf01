"""One step's update: the gradient against a plain computation, however the step is cut, and what cannot be learnt."""

import random
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from rl_fixture import PROMPTS
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from characterflywheel.config import RLConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.records import Rollout
from characterflywheel.training import learner as learning
from characterflywheel.training.learner import Learner
from characterflywheel.training.parallel import Parallel
from characterflywheel.training.rl.learn import (
    Lesson,
    Logs,
    Update,
    accumulate,
    left_out,
    mini_batches,
    read,
    teach,
    whole_groups,
)  # fmt: skip
from characterflywheel.training.rl.step import combined, skip_update
from characterflywheel.training.rl.timing import Stopwatch

ALONE = Parallel.alone()
CONFIG = RLConfig(prompts_per_step=3, group=4, temperature=0.7, max_tokens=9, truncate_ratio=1.1)


@pytest.fixture
def mine(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Learner:
    """In float32, so that the order of sums shows only in the last bits."""
    monkeypatch.setattr(learning, "fast_dtype", lambda device="cpu": torch.float32)
    return Learner(tiny_folder, learning_rate=1e-2, steps=8, max_prompt_tokens=128, threads=1)


def plain(model: torch.nn.Module, lesson: Lesson, temperature: float) -> list[Tensor]:
    """Each reply's log-probabilities by the model's own forward pass, one reply at a time."""
    found = []
    for path in lesson.paths:
        ids = torch.tensor([[token for segment in path for token in segment]])
        logs = torch.log_softmax(model(ids).logits[0] / temperature, -1)
        found.append(torch.stack([logs[i - 1, ids[0, i]] for i in range(ids.shape[1] - len(path[-1]), ids.shape[1])]))
    return found


def rollouts(mine: Learner, rewards: Sequence[float], noise: float = 0.3) -> list[Rollout]:
    """Random tokens with the learner's log-probabilities, to which the sampler's add some noise."""
    rng = random.Random(1)
    replies = [tuple(rng.randrange(3, 320) for _ in range(rng.randint(1, 9))) for _ in rewards]
    bare = [
        Rollout(step=1, prompt_id=PROMPTS[i // 4].id, text="", token_ids=ids, logprobs=(0.0,) * len(ids), score=0.0,
                reward=reward)
        for i, (ids, reward) in enumerate(zip(replies, rewards, strict=True))
    ]  # fmt: skip
    logs = read(
        mine.model,
        whole_groups(bare, segments(mine, len(bare) // 4)),
        CONFIG,
        ALONE,
        device="cpu",
        autocast=nullcontext,
    )
    return [
        r.model_copy(update={"logprobs": tuple(v + rng.gauss(0, noise) for v in logs[i].tolist())})
        for i, r in enumerate(bare)
    ]


def segments(mine: Learner, count: int):  # type: ignore[no-untyped-def]
    return [mine.format.prompt(p.messages) for p in PROMPTS[:count]]


def gradient(mine: Learner) -> Tensor:
    flat = torch.cat([p.grad.flatten() for p in mine.parameters if p.grad is not None])
    mine.optimiser.zero_grad(set_to_none=True)
    return flat


REWARDS = (1.0, 2.0, 0.5, 0.0, 3.0, 3.0, 3.0, 3.0, -1.0, 1.0, 1.0, 4.0)


def step(
    mine: Learner,
    lessons: Sequence[Lesson],
    config: RLConfig,
    before: Logs | None = None,
    reference: Logs | None = None,
) -> Update:
    return accumulate(mine, lessons, config, ALONE, Stopwatch(), before=before or {}, reference=reference)


@pytest.mark.parametrize("micro", [1, 60, 4096])
@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_grpo_is_the_plain_computation_in_any_micro_batches(
    micro: int, aggregation: str, mine: Learner, tiny_folder: Path
) -> None:
    """Weights against a noisy sampler, ratios against an earlier policy, a KL term against another one."""
    config = RLConfig.model_validate(
        CONFIG.model_dump() | {"micro_batch_tokens": micro, "aggregation": aggregation, "kl_weight": 0.2}
    )
    rows = rollouts(mine, REWARDS)
    found = teach(rows, segments(mine, 3), config)
    rng = torch.Generator().manual_seed(2)
    logs = read(mine.model, found.lessons, config, ALONE, device="cpu", autocast=nullcontext)
    before = {i: v + 0.2 * torch.randn(v.shape, generator=rng) for i, v in logs.items()}
    reference = {i: v + 0.3 * torch.randn(v.shape, generator=rng) for i, v in logs.items()}
    out = step(mine, found.lessons, config, before, reference)
    mine_gradient = gradient(mine)

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokens = sum(len(r.token_ids) for r in rows)
    loss = kl = torch.tensor(0.0)
    for lesson in found.lessons:
        for number, own, sampler, a in zip(
            lesson.numbers, plain(model, lesson, 0.7), lesson.sampler, lesson.advantage.tolist(), strict=True
        ):
            weight = (before[number] - sampler).exp().clamp(max=1.1)
            ratio = (own - before[number]).exp()
            each = weight * torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)
            k3 = ((reference[number] - own).exp() - (reference[number] - own) - 1) * ratio
            share = 1 / tokens if aggregation == "token" else 1 / (len(rows) * len(own))
            loss = loss - (each * share).sum() + 0.2 * (k3 * share).sum()
            kl = kl + (k3 * share).sum()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert out.loss == pytest.approx(loss.item(), abs=1e-5)
    assert out.kl == pytest.approx(kl.item(), abs=1e-5)
    assert torch.allclose(mine_gradient, expected, atol=1e-5)
    assert out.clipped_share is not None
    assert out.clipped_share > 0.05
    for i, own in out.own.items():
        assert torch.allclose(own, logs[i], atol=1e-5)


@pytest.mark.parametrize("micro", [1, 4096])
def test_online_dpo_is_the_plain_computation(micro: int, mine: Learner, tiny_folder: Path) -> None:
    """Best against worst; the group of four 3s ties and is left out."""
    config = CONFIG.model_copy(update={"algorithm": "online_dpo", "beta": 0.3, "micro_batch_tokens": micro})
    found = teach(rollouts(mine, REWARDS), segments(mine, 3), config)
    assert [lesson.numbers for lesson in found.lessons] == [(1, 3), (11, 8)]
    assert (found.equal_groups, found.advantage) == (1, None)
    logs = read(mine.model, found.lessons, config, ALONE, device="cpu", autocast=nullcontext)
    rng = torch.Generator().manual_seed(2)
    reference = {i: v + 0.3 * torch.randn(v.shape, generator=rng) for i, v in logs.items()}
    out = step(mine, found.lessons, config, reference=reference)
    mine_gradient = gradient(mine)

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    margins = []
    for lesson in found.lessons:
        won, lost = plain(model, lesson, 0.7)
        chosen, rejected = (reference[i].sum() for i in lesson.numbers)
        margins.append(0.3 * ((won.sum() - chosen) - (lost.sum() - rejected)))
    loss = -logsigmoid(torch.stack(margins)).mean()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert out.loss == pytest.approx(loss.item(), abs=1e-5)
    assert out.margin == pytest.approx(torch.stack(margins).mean().item(), abs=1e-5)
    assert out.accuracy == sum(m > 0 for m in margins) / 2
    assert torch.allclose(mine_gradient, expected, atol=1e-5)


def test_a_gap_that_is_too_small_is_a_tie(mine: Learner) -> None:
    config = CONFIG.model_copy(update={"algorithm": "online_dpo", "min_gap": 3.0})
    found = teach(rollouts(mine, REWARDS), segments(mine, 3), config)
    assert [lesson.numbers for lesson in found.lessons] == [(11, 8)]
    assert found.equal_groups == 2


def test_equal_groups_are_left_out_unless_a_kl_term_pulls(mine: Learner) -> None:
    rows = rollouts(mine, REWARDS)
    found = teach(rows, segments(mine, 3), CONFIG)
    assert [lesson.numbers for lesson in found.lessons] == [(0, 1, 2, 3), (8, 9, 10, 11)]
    pulled = teach(rows, segments(mine, 3), CONFIG.model_copy(update={"kl_weight": 0.1}))
    assert len(pulled.lessons) == 3
    assert found.equal_groups == pulled.equal_groups == 1
    assert found.advantage is not None
    assert found.advantage[4:8] == [0.0] * 4


def test_mini_batches_cut_every_epoch_alike() -> None:
    lessons = [Lesson((i,), [], [], torch.zeros(1)) for i in range(7)]
    config = CONFIG.model_copy(update={"updates_per_step": 3, "epochs": 3})
    parts = [[lesson.numbers[0] for lesson in part] for part in mini_batches(lessons, config, 5)]
    assert parts[:3] == [[0, 1], [2, 3], [4, 5, 6]]
    for epoch in (3, 6):
        assert sorted(parts[epoch : epoch + 3]) == parts[:3]
    assert mini_batches(lessons[:1], config, 5)[:3] == [[], [], lessons[:1]]


def test_the_first_update_has_a_ratio_of_one_and_later_ones_are_clipped(mine: Learner) -> None:
    config = CONFIG.model_copy(update={"updates_per_step": 2, "micro_batch_tokens": 60})
    found = teach(rollouts(mine, REWARDS, noise=0.0), segments(mine, 3), config)
    one, two = mini_batches(found.lessons, config, 1)
    before = read(mine.model, two, config, ALONE, device="cpu", autocast=nullcontext)
    first = step(mine, one, config)
    assert first.clipped_share == 0
    assert first.health.mean == pytest.approx(1, abs=1e-5)
    mine.update(**first.metrics())
    second = step(mine, two, config, before)
    assert second.clipped_share is not None
    assert second.clipped_share > 0, "the first update moved what the second learns from"
    assert second.health.mean == pytest.approx(1, abs=1e-5), "the sampler is corrected as of the step's start"


# What is not sane


def with_bad_tokens(rows: Sequence[Rollout], count: int, value: float) -> list[Rollout]:
    """The first token of the first replies has another log-probability at the sampler."""
    return [r.model_copy(update={"logprobs": (value, *r.logprobs[1:])}) if i < count else r for i, r in enumerate(rows)]


@pytest.mark.parametrize("value", [float("nan"), -99.0])
def test_tokens_without_a_sane_ratio_are_masked_and_counted(value: float, mine: Learner) -> None:
    config = CONFIG.model_copy(update={"max_exploded_share": 0.2})
    rows = rollouts(mine, REWARDS)
    few = teach(with_bad_tokens(rows, 2, value), segments(mine, 3), config)
    out = step(mine, few.lessons, config)
    assert (out.health.exploded, out.health.masked) == (2, 2)
    assert out.metrics()["exploded"] == 2.0
    assert bool(gradient(mine).isfinite().all())
    many = teach(with_bad_tokens(rows, 12, value), segments(mine, 3), config)
    with pytest.raises(
        FlywheelError, match=r"step 1 of 8: \d+\.\d% of \d+ tokens have no sane ratio .* at most 20\.0%"
    ):
        step(mine, many.lessons, config)


def test_a_policy_that_moved_too_far_within_a_step_is_a_clear_error(mine: Learner) -> None:
    found = teach(rollouts(mine, REWARDS), segments(mine, 3), CONFIG)
    before = {
        i: v - 30 for i, v in read(mine.model, found.lessons, CONFIG, ALONE, device="cpu", autocast=nullcontext).items()
    }
    far = CONFIG.model_copy(update={"max_exploded_share": 0.99})
    with pytest.raises(FlywheelError, match=r"moved by 30 within one step"):
        step(mine, found.lessons, far, before)


def test_weights_that_are_not_finite_are_a_clear_error(mine: Learner) -> None:
    found = teach(rollouts(mine, REWARDS), segments(mine, 3), CONFIG)
    with torch.no_grad():
        mine.parameters[0].fill_(float("nan"))
    with pytest.raises(FlywheelError, match="are not finite: it diverged"):
        step(mine, found.lessons, CONFIG)
    assert (mine.step, mine.log) == (0, [])


def test_an_update_with_nothing_to_learn_moves_nothing_but_the_schedule(mine: Learner) -> None:
    """After a real step AdamW has momentum, and a step with a gradient of zero would move the weights."""
    skip_update(mine, trained_tokens=0.0)
    found = teach(rollouts(mine, REWARDS), segments(mine, 3), CONFIG)
    mine.update(**step(mine, found.lessons, CONFIG).metrics())
    before = [p.clone() for p in mine.parameters]
    moments = [state["exp_avg"].clone() for state in mine.optimiser.state.values()]
    counts = [state["step"].item() for state in mine.optimiser.state.values()]
    assert any(bool(m.abs().max() > 0) for m in moments)
    skip_update(mine, trained_tokens=0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, mine.parameters, strict=True))
    after = list(mine.optimiser.state.values())
    assert all(torch.equal(a, state["exp_avg"]) for a, state in zip(moments, after, strict=True))
    assert counts == [state["step"].item() for state in after]
    assert [row["step"] for row in mine.log] == [1, 2, 3]
    assert mine.log[2] == {"step": 3, "learning_rate": mine.log[2]["learning_rate"], "trained_tokens": 0.0}
    assert mine.log[2]["learning_rate"] < mine.log[1]["learning_rate"]


# Small parts


def test_what_teaches_nothing_is_left_over_by_its_prompt(mine: Learner) -> None:
    """Of three groups, one of equal rewards: all of it, and of the others, in online DPO, all but best and worst."""
    rows = rollouts(mine, REWARDS)
    for algorithm in ("grpo", "online_dpo"):
        found = teach(rows, segments(mine, 3), CONFIG.model_copy(update={"algorithm": algorithm}))
        rest = left_out(rows, segments(mine, 3), found.lessons)
        numbers = [n for lesson in (*found.lessons, *rest) for n in lesson.numbers]
        assert sorted(numbers) == list(range(len(rows)))
        for lesson in rest:
            assert [path[-1] for path in lesson.paths] == [rows[n].token_ids for n in lesson.numbers]


def test_a_step_s_updates_in_one_line() -> None:
    rows = [
        {"step": 1, "learning_rate": 0.1, "equal_groups": 1.0, "loss": 1.0, "weight_max": 2.0,
         "trained_tokens": 10.0, "exploded": 1.0},
        {"step": 2, "learning_rate": 0.2, "equal_groups": 1.0, "trained_tokens": 0.0},
        {"step": 3, "learning_rate": 0.3, "equal_groups": 1.0, "loss": 2.0, "weight_max": 5.0,
         "trained_tokens": 20.0, "exploded": 0.0},
    ]  # fmt: skip
    assert combined(rows) == {
        "learning_rate": 0.3, "equal_groups": 1.0, "loss": 1.5, "weight_max": 5.0,
        "trained_tokens": 30.0, "exploded": 1.0, "skipped": 1.0,
    }  # fmt: skip
    assert combined(rows[1:2]) == {
        "learning_rate": 0.2, "equal_groups": 1.0, "trained_tokens": 0.0, "skipped": 1.0
    }  # fmt: skip
