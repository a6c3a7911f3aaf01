"""Importance weights: by hand, when ratios explode, and on policies of which every reply can be listed."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from characterflywheel.training import policy_gradient as pg

# Importance weights


def test_importance_by_hand() -> None:
    """The docstring's replies: ratios 0.5, 4 and 3, 1, so products 2 and 3."""
    before, owner = torch.zeros(4), torch.tensor([0, 0, 1, 1])

    def weights(**keywords: Any) -> list[float]:
        return pg.importance(before, -torch.tensor([0.5, 4, 3, 1]).log(), owner, 2, **keywords).weights.tolist()

    assert weights() == pytest.approx([0.5, 2, 2, 1])
    assert weights(level="sequence") == pytest.approx([2, 2, 2, 2])
    assert weights(level="sequence", truncate=None) == pytest.approx([2, 2, 3, 3])
    assert weights(sequence_high=2.5) == pytest.approx([0.5, 2, 0, 0])
    assert weights(sequence_low=2.5) == pytest.approx([0, 0, 2, 1])
    assert weights(token_low=0.9, token_high=3.5, truncate=None) == pytest.approx([0, 0, 3, 1])
    health = pg.importance(before, -torch.tensor([0.5, 4, 3, 1]).log(), owner, 2, sequence_high=2.5).health
    assert (health.mean, health.maximum, health.masked_share) == pytest.approx((0.625, 2, 0.5))
    assert health.effective_share == pytest.approx(2.5**2 / (4 * 4.25))


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf"), -12.0, 12.0])
def test_a_ratio_that_explodes_is_masked_and_counted(bad: float) -> None:
    """The token alone at level "token"; its reply with it where the reply's product is asked for."""
    before, owner = torch.full((4,), -1.0, requires_grad=True), torch.tensor([0, 0, 1, 1])
    sampler = torch.tensor([-1.0, -1.0, bad - 1, -1.0])
    for keywords, weights in (
        ({}, [1.0, 1.0, 0.0, 1.0]),
        ({"level": "sequence"}, [1.0, 1.0, 0.0, 0.0]),
        ({"sequence_high": 100.0}, [1.0, 1.0, 0.0, 0.0]),
        ({"token_high": 100.0}, [1.0, 1.0, 0.0, 1.0]),
    ):
        out, health = pg.importance(before, sampler, owner, 2, **keywords)  # type: ignore[arg-type]
        assert out.tolist() == weights
        assert health.masked == health.exploded == weights.count(0.0)
        loss = pg.grpo(before, before.detach(), out, torch.ones(2), owner, clip_low=0.2, clip_high=0.2, total=4).loss
        (gradient,) = torch.autograd.grad(loss, before)
        assert gradient.tolist() == [-weight / 4 for weight in weights]


def test_when_all_is_masked_nothing_is_learnt_and_no_sample_is_effective() -> None:
    before, owner = torch.zeros(3), torch.tensor([0, 0, 0])
    weights, health = pg.importance(before, torch.full((3,), float("nan")), owner, 1)
    assert weights.tolist() == [0.0, 0.0, 0.0]
    assert (health.effective_share, health.mean, health.exploded_share) == (0.0, 0.0, 1.0)


# Importance correction on policies of which every reply can be listed: two tokens of three, so nine replies


class Policies(NamedTuple):
    """Log-probabilities of the tokens of all nine replies (9, 2), under learner and sampler; a value of each reply."""

    learner: Tensor
    sampler: Tensor
    value: Tensor


def policies(seed: int, apart: float = 0.5) -> tuple[Tensor, Policies]:
    """The learner's logits, of the first token and of the second after each first, with gradient; see `Policies`."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 3, generator=draw, dtype=torch.float64).requires_grad_()
    away = logits.detach() + apart * torch.randn(4, 3, generator=draw, dtype=torch.float64)
    value = torch.rand(9, generator=draw, dtype=torch.float64) * 2 - 1

    def tokens(table: Tensor) -> Tensor:
        logs = torch.log_softmax(table, -1)
        return torch.stack([torch.stack((logs[0, i], logs[1 + i, j])) for i in range(3) for j in range(3)])

    return logits, Policies(tokens(logits), tokens(away), value)


def weights_of(all_replies: Policies, **keywords: Any) -> Tensor:
    """Weights of all replies' tokens (9, 2)."""
    owner = torch.arange(9).repeat_interleave(2)
    flat = (all_replies.learner.detach().flatten(), all_replies.sampler.flatten())
    return pg.importance(*flat, owner, 9, **keywords).weights.view(9, 2)


def expected(all_replies: Policies, weights: Tensor | None = None) -> float:
    """The reply's value in expectation, enumerated: under the learner, or under the sampler with weights (9,)."""
    policy = all_replies.learner.detach() if weights is None else all_replies.sampler
    mass = policy.sum(1).exp() * (1 if weights is None else weights)
    return float((mass * all_replies.value).sum())


def test_the_corrected_expectation_is_the_learners() -> None:
    """Sequence weights are exact; without any, or with the last token's own ratio alone, it is another number."""
    _, both = policies(0)
    true = expected(both)
    assert expected(both, weights_of(both, level="sequence", truncate=None)[:, 0]) == pytest.approx(true, abs=1e-14)
    assert abs(expected(both, torch.ones(9)) - true) > 0.05
    assert abs(expected(both, weights_of(both, truncate=None)[:, 1]) - true) > 1e-3


@given(st.integers(0, 10_000), st.floats(0.1, 1.5), st.floats(1.0, 3.0))
def test_truncation_biases_by_at_most_what_it_cuts_off(seed: int, apart: float, bound: float) -> None:
    """|bias| <= max|f| E_sampler[(w - C)+]."""
    _, both = policies(seed, apart)
    whole = weights_of(both, level="sequence", truncate=None)[:, 0]
    cut = weights_of(both, level="sequence", truncate=bound)[:, 0]
    bias = abs(expected(both, cut) - expected(both))
    excess = float((both.sampler.sum(1).exp() * (whole - bound).clamp(min=0)).sum())
    assert bias <= float(both.value.abs().max()) * excess + 1e-12


@given(st.integers(0, 10_000), st.floats(0.1, 1.5), st.floats(0.0, 0.9), st.floats(1.1, 3.0))
def test_a_mask_biases_by_at_most_what_it_leaves_out(seed: int, apart: float, low: float, high: float) -> None:
    """|bias| <= max|f| P_learner(masked)."""
    _, both = policies(seed, apart)
    kept = weights_of(both, level="sequence", truncate=None, sequence_low=low, sequence_high=high)[:, 0]
    bias = abs(expected(both, kept) - expected(both))
    left_out = float(both.learner.detach().sum(1).exp()[kept == 0].sum())
    assert bias <= float(both.value.abs().max()) * left_out + 1e-12


def test_a_tokens_own_weight_is_exact_given_what_stands_before_it() -> None:
    """The second token's value in expectation, after each first token."""
    _, both = policies(0)
    learner, sampler, value = both.learner.detach()[:, 1].exp(), both.sampler[:, 1].exp(), both.value
    weights = weights_of(both, truncate=None)[:, 1]
    corrected, true = ((mass * value).view(3, 3).sum(1) for mass in (sampler * weights, learner))
    torch.testing.assert_close(corrected, true, atol=1e-14, rtol=0)


def expected_gradient(seed: int, apart: float = 0.5, weighted: bool = True, **keywords: Any) -> tuple[Tensor, Tensor]:
    """GRPO's gradient in expectation over the sampler, by summing over all replies; and the true one, of E[value]."""
    logits, both = policies(seed, apart)
    owner, mass = torch.arange(9).repeat_interleave(2), both.sampler.sum(1).exp()
    now = both.learner.flatten()
    weights = weights_of(both, **keywords).flatten() if weighted else torch.ones_like(now)
    out = pg.grpo(
        now, now.detach(), weights, mass * both.value, owner, clip_low=0.2, clip_high=0.28, total=1
    )  # fmt: skip
    (got,) = torch.autograd.grad(out.loss, logits, retain_graph=True)
    (true,) = torch.autograd.grad(-(both.learner.sum(1).exp() * both.value).sum(), logits)
    return got, true


@pytest.mark.parametrize("seed", range(3))
def test_the_corrected_gradient_is_that_of_the_learners_expected_reward(seed: int) -> None:
    exact, true = expected_gradient(seed, level="sequence", truncate=None)
    torch.testing.assert_close(exact, true, atol=1e-14, rtol=0)
    on_policy, true = expected_gradient(seed, apart=0.0, weighted=False)
    torch.testing.assert_close(on_policy, true, atol=1e-14, rtol=0)


def test_token_weights_are_an_approximation_that_helps() -> None:
    """They leave out how likely the reply's other tokens were: nearer than no weights, not exact.

    The gradient's relative error, mean of 100 policies that are 0.5 apart in their logits.
    """

    def off(**keywords: Any) -> float:
        pairs = [expected_gradient(seed, **keywords) for seed in range(100)]
        return sum(float((got - true).norm() / true.norm()) for got, true in pairs) / 100

    none, token, truncated = off(weighted=False), off(truncate=None), off(truncate=2.0)
    assert off(level="sequence", truncate=None) < 1e-12
    assert 0.01 < token < 0.8 * none
    assert 0.01 < truncated < 0.8 * none
    by_reply = off(level="sequence", truncate=2.0)
    assert (none, token, by_reply) == pytest.approx((0.50, 0.27, 0.09), abs=0.01), "as docs/herding.md has it"


# Divergence from the reference


def test_the_kl_estimate_is_unbiased_and_never_negative() -> None:
    _, both = policies(0)
    policy, reference = both.learner.detach().sum(1), both.sampler.sum(1)
    estimate = pg.kl_to_reference(policy, reference)
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * estimate).sum(), exact, atol=1e-14, rtol=0)
    assert estimate.min() >= 0
    assert pg.kl_to_reference(reference, reference).abs().max() == 0


@pytest.mark.parametrize("unbiased", [True, False])
def test_the_kl_terms_gradient_in_expectation(unbiased: bool) -> None:
    """Over a token drawn from the learner: the KL's own gradient, or without the correction another one."""
    logits = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    reference = torch.log_softmax(logits.detach().flip(0), -1)
    now, owner = torch.log_softmax(logits, -1), torch.arange(5)
    mass = now.detach().exp()
    zero = torch.zeros(5, dtype=torch.float64)
    got = torch.zeros(5, dtype=torch.float64)
    for i in range(5):
        out = pg.grpo(
            now[i : i + 1], now[i : i + 1].detach(), zero[:1], zero[:1], owner[:1], clip_low=0.2, clip_high=0.2,
            total=1, reference=reference[i : i + 1], kl_weight=1.0, kl_unbiased=unbiased,
        )  # fmt: skip
        got += mass[i] * torch.autograd.grad(out.loss, logits, retain_graph=True)[0]
    (true,) = torch.autograd.grad((now.exp() * (now - reference)).sum(), logits)
    assert (got - true).abs().max() < 1e-14 if unbiased else (got - true).abs().max() > 1e-2
