"""Advantages, GRPO and importance correction against hand-worked examples; TRL is in `test_policy_gradient_trl.py`."""

from itertools import accumulate, pairwise
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from characterflywheel.errors import FlywheelError
from characterflywheel.training import policy_gradient as pg

# Group-relative advantages


@given(st.floats(-1e3, 1e3, width=32), st.integers(2, 9), st.sampled_from(["group", "batch", "none"]))
def test_equal_rewards_have_exactly_no_advantage(reward: float, group: int, scale: pg.Scale) -> None:
    """Exactly, also beside a group that differs: Adam would scale the least rounding error up to a full step."""
    rewards = torch.stack([torch.full((group,), reward), torch.arange(group).float()])
    out = pg.advantages(rewards, scale=scale)
    assert out[0].abs().max().item() == 0.0
    assert out[1].abs().max().item() > 0.0


@given(st.lists(st.integers(-100, 100), min_size=3, max_size=8, unique=True))
def test_advantages_keep_the_order_and_sum_to_nothing(rewards: list[int]) -> None:
    row = pg.advantages(torch.tensor([rewards], dtype=torch.float64))[0]
    assert abs(row.sum().item()) < 1e-6
    assert row.argmax() == rewards.index(max(rewards))
    assert row.argmin() == rewards.index(min(rewards))


# GRPO


def test_grpo_by_hand() -> None:
    """Four tokens of three replies, clip to [0.8, 1.28], weights truncated at 2.

    token  reply  ratio  advantage  weight            objective
      1      0    1.5       1       min(1, 2)   = 1   min(1.5, 1.28)   =  1.28 (clipped)
      2      1    0.5      -1       min(0.5, 2) = .5  min(-0.5, -0.8)  = -0.8  (clipped), times 0.5 = -0.4
      3      1    1.0      -1       min(4, 2)   = 2   -1,                                 times 2   = -2
      4      2    1.5      -1       min(1, 2)   = 1   min(-1.5, -1.28) = -1.5
    Token: -(1.28 - 0.4 - 2 - 1.5) / 4 = 0.655. Sequence: -(1.28 - 2.4 / 2 - 1.5) / 3 = 0.473333.
    Constant, at most 8 tokens a reply: 2.62 / 24 = 0.109167. Weights: mean 4.5 / 4, effective 4.5² / (4 * 6.25).
    """
    ratio, weight = torch.tensor([1.5, 0.5, 1.0, 1.5]), torch.tensor([1.0, 0.5, 4.0, 1.0])
    before, owner = torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([0, 1, 1, 2])
    used, health = pg.importance(before, before - weight.log(), owner, 3, truncate=2.0)
    assert health.mean == pytest.approx(1.125)
    assert health.maximum == pytest.approx(2.0)
    assert health.effective_share == pytest.approx(0.81)
    expected: dict[pg.Aggregation, float] = {"token": 0.655, "sequence": 0.473333, "constant": 0.109167}
    for aggregation, value in expected.items():
        out = pg.grpo(
            before + ratio.log(), before, used, torch.tensor([1.0, -1.0, -1.0]), owner, clip_low=0.2, clip_high=0.28,
            total=pg.denominator([1, 2, 1], aggregation, 8), aggregation=aggregation,
        )  # fmt: skip
        assert out.loss.item() == pytest.approx(value, abs=1e-6)
        assert out.clipped_share.item() == 0.5


def test_a_batch_scale_by_hand() -> None:
    """Rewards 0, 2 and 5, 5: centred -1, 1, 0, 0; all four: mean 3, deviation √((9 + 1 + 4 + 4) / 3) = 2.4495."""
    out = pg.advantages(torch.tensor([[0.0, 2.0], [5.0, 5.0]]), scale="batch")
    torch.testing.assert_close(out, torch.tensor([[-1.0, 1.0], [0.0, 0.0]]) / 2.4496, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rewards_that_are_not_finite_are_refused(bad: float) -> None:
    rewards = torch.tensor([[1.0, bad], [0.0, 1.0]])
    for call in (pg.advantages, pg.best_against_worst):
        with pytest.raises(FlywheelError, match="1 of 4 rewards are not finite"):
            call(rewards)


# Online DPO's choice


def test_best_against_worst_by_hand() -> None:
    """A clear group; ties at both ends (the first is taken); a gap below the bound, one at it; all equal."""
    rewards = torch.tensor([[1.0, 3, 2], [4, 0, 4], [1, 1.25, 1.125], [1, 1.5, 1], [5, 5, 5]])
    assert pg.best_against_worst(rewards) == [(1, 0), (0, 1), (1, 0), (1, 0), None]
    assert pg.best_against_worst(rewards, 0.5) == [(1, 0), (0, 1), None, (1, 0), None]


@given(st.lists(st.lists(st.floats(-9, 9, width=32), min_size=4, max_size=4), min_size=1, max_size=4), st.floats(0, 4))
def test_a_pair_is_the_widest_and_wide_enough(rewards: list[list[float]], gap: float) -> None:
    for row, pair in zip(rewards, pg.best_against_worst(torch.tensor(rewards), gap), strict=True):
        width = float(torch.tensor(max(row)) - torch.tensor(min(row)))
        assert (pair is not None) == (width > 0 and width >= gap)
        if pair is not None:
            assert (row[pair.best], row[pair.worst]) == (max(row), min(row))


# Micro-batches and processes


@given(
    st.integers(0, 10_000), st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.sampled_from(["token", "sequence", "constant"]), st.sampled_from(["token", "sequence"]),
)  # fmt: skip
def test_parts_add_up_exactly(
    seed: int, parts: list[int], aggregation: pg.Aggregation, level: Literal["token", "sequence"]
) -> None:
    """Any split of a step's replies, divided by the step's total, gives the whole's loss, gradients and health."""
    replies, draw = sum(parts), torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (replies,), generator=draw).tolist()
    values = torch.randn(4, sum(lengths), generator=draw, dtype=torch.float64) * 0.4
    now = values[0].clone().requires_grad_()
    advantage = torch.randn(replies, generator=draw, dtype=torch.float64)
    total = pg.denominator(lengths, aggregation, 9)

    def part(first: int, last: int) -> tuple[Tensor, pg.Health]:
        rows = slice(sum(lengths[:first]), sum(lengths[:last]))
        owner = torch.arange(last - first).repeat_interleave(torch.tensor(lengths[first:last]))
        weights, health = pg.importance(
            values[1][rows], values[2][rows], owner, last - first, level=level, truncate=1.5, token_low=0.7,
            sequence_low=0.3, sequence_high=3.0,
        )  # fmt: skip
        out = pg.grpo(
            now[rows], values[1][rows], weights, advantage[first:last], owner, clip_low=0.2, clip_high=0.28,
            total=total, aggregation=aggregation, reference=values[3][rows], kl_weight=0.3,
        )  # fmt: skip
        return out.loss, health

    whole, health = part(0, replies)
    several = [part(a, b) for a, b in pairwise(accumulate(parts, initial=0))]
    split = torch.stack([loss for loss, _ in several]).sum()
    torch.testing.assert_close(split, whole, atol=1e-12, rtol=1e-12)
    (wanted,), (got,) = torch.autograd.grad(whole, now), torch.autograd.grad(split, now)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)
    assert pg.merge([h for _, h in several]) == pytest.approx(health)
    assert sum(pg.denominator([n], aggregation, 9) for n in lengths) == total


def test_a_learner_that_diverged_is_named() -> None:
    owner, fine = torch.zeros(2, dtype=torch.long), torch.zeros(2)
    with pytest.raises(FlywheelError, match="1 of 2 log-probabilities of the learner"):
        pg.importance(torch.tensor([-1.0, float("nan")]), fine, owner, 1)
    for now in (11.0, float("nan")):
        with pytest.raises(FlywheelError, match=r"moved by .* within one step, more than 10"):
            pg.grpo(torch.tensor([0.0, now]), fine, fine, fine[:1], owner, clip_low=0.2, clip_high=0.2, total=2)
