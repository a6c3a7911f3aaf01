"""Advantages, GRPO and importance correction against hand-worked examples; TRL is in `test_policy_gradient_trl.py`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from characterflywheel.errors import FlywheelError
from characterflywheel.training import policy_gradient as pg


def noise(size: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


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


# Importance correction on policies of which every reply can be listed


def policies() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a policy over seven actions, the sampler's log-probabilities, near by, and the actions' advantages."""
    logits = noise(7, 0).double().requires_grad_()
    sampler = torch.log_softmax(logits.detach() + noise(7, 1, 0.5).double(), -1)
    return logits, sampler, noise(7, 2).double()


def expected_gradient(truncate: float | None) -> tuple[Tensor, Tensor]:
    """The loss's gradient in expectation over the sampler, by summing over all actions; and the true one."""
    logits, sampler, advantage = policies()
    total = torch.zeros(7, dtype=torch.float64)
    owner = torch.zeros(1, dtype=torch.long)
    for action in range(7):
        now = torch.log_softmax(logits, -1)[action : action + 1]
        weights = pg.importance(now.detach(), sampler[action : action + 1], owner, 1, truncate=truncate).weights
        out = pg.grpo(
            now, now.detach(), weights, advantage[action : action + 1], owner, clip_low=0.2, clip_high=0.28, total=1
        )  # fmt: skip
        total += sampler[action].exp() * torch.autograd.grad(out.loss, logits)[0]
    (true,) = torch.autograd.grad(-(torch.softmax(logits, -1) * advantage).sum(), logits)
    return total, true


def test_the_importance_correction_is_unbiased() -> None:
    """Actions drawn from another policy, yet the gradient of the trained policy's expected reward."""
    corrected, true = expected_gradient(truncate=None)
    torch.testing.assert_close(corrected, true, atol=1e-12, rtol=0)


def test_truncation_bounds_the_weights_at_the_price_of_bias() -> None:
    truncated, true = expected_gradient(truncate=1.0)
    assert (truncated - true).abs().max() > 1e-3
    assert torch.nn.functional.cosine_similarity(truncated, true, dim=0) > 0.9


def test_the_learner_that_diverged_is_named() -> None:
    owner = torch.zeros(2, dtype=torch.long)
    with pytest.raises(FlywheelError, match="1 of 2 log-probabilities of the learner"):
        pg.importance(torch.tensor([-1.0, float("nan")]), torch.zeros(2), owner, 1)


# Divergence from the reference


def test_the_kl_estimate_is_unbiased_and_never_negative() -> None:
    logits, reference, _ = policies()
    policy = torch.log_softmax(logits, -1)
    estimate = pg.kl_to_reference(policy, reference)
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * estimate).sum(), exact, atol=1e-12, rtol=0)
    assert estimate.min() >= 0
    assert pg.kl_to_reference(reference, reference).abs().max() == 0
