"""Best-of-n against every subset, divergences against enumeration, the forms against the truth and scipy."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit

from characterflywheel import intervals
from characterflywheel.reward.overoptimisation import best_of_n, forms, rollouts
from characterflywheel.reward.overoptimisation.bootstrap import At, Measured, estimate, resampled
from characterflywheel.reward.overoptimisation.curve import curve, nothing, said
from characterflywheel.training.policy_gradient import kl_to_reference

few = st.lists(st.integers(-2, 2).map(float), min_size=2, max_size=7)


def people(count: int) -> list[str]:
    """Everybody asks once."""
    return [f"u{i:04}" for i in range(count)]


def best_of_every_subset(scores: list[float], values: list[float], n: int) -> float:
    """The mean over all subsets of size n of the value of the best; several best share evenly."""
    found = []
    for subset in itertools.combinations(range(len(scores)), n):
        top = max(scores[i] for i in subset)
        found.append(np.mean([values[i] for i in subset if scores[i] == top]))
    return float(np.mean(found))


@given(few, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_best_of_n_is_the_mean_over_all_subsets(scores: list[float], seed: int) -> None:
    """Few different scores, so ties are everywhere."""
    values = np.random.default_rng(seed).normal(size=len(scores)).tolist()
    got = best_of_n.expected(np.array([scores]), np.array([values]))[0]
    assert got == pytest.approx([best_of_every_subset(scores, values, n + 1) for n in range(len(scores))])


def test_chances_are_those_of_integer_combinations_at_many_candidates() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 90, 128).astype(float)
    got = best_of_n.chances(scores)
    for n in (1, 2, 17, 64, 128):
        for i in (0, 5, 127):
            lower, equal = int((scores < scores[i]).sum()), int((scores == scores[i]).sum())
            exact = (math.comb(lower + equal, n) - math.comb(lower, n)) / math.comb(128, n) / equal
            assert got[n - 1, i] == pytest.approx(exact, rel=1e-9, abs=1e-15)
    assert got.sum(1) == pytest.approx(np.ones(128))


@pytest.mark.parametrize(("n", "atoms"), [(2, 4000), (4, 4000), (7, 4000), (4, 6)])
def test_the_divergence_is_exact_without_ties_and_a_bound_with_them(n: int, atoms: int) -> None:
    """A policy of so many equally likely replies, all of other scores; in the limit there are no ties."""
    edges = np.linspace(0, 1, atoms + 1) ** n
    chosen = np.diff(edges)
    exact = float((chosen * np.log(chosen * atoms)).sum())
    bound = float(best_of_n.divergence(n))
    if atoms > 1000:
        assert exact == pytest.approx(bound, abs=2e-3)
    else:
        assert exact < bound - 0.01
    assert best_of_n.n_at(math.sqrt(bound)) == pytest.approx(n)
    assert best_of_n.n_at(0.0) == 1.0


def test_ties_are_counted_by_pair() -> None:
    assert best_of_n.ties(np.array([[1.0, 1.0, 2.0], [0.0, 3.0, 2.0]])) == pytest.approx((1 / 3 + 0) / 2)


def test_best_of_n_begins_at_zero_in_the_policys_own_deviations() -> None:
    """Of a standard normal the best of n is known: 1/sqrt(pi) at n = 2, 1.0294 at n = 4. Prompts differ in level."""
    rng = np.random.default_rng(1)
    level = 5 * rng.normal(size=(400, 1))
    true = rng.normal(size=(400, 16))
    proxy, gold = 3 * true + level, 0.6 * true + 0.8 * rng.normal(size=(400, 16)) - level
    measured = best_of_n.measure(proxy, gold, resampled(people(400), 200, seed=0))
    assert measured.gold is not None
    assert measured.proxy[:, 0] == pytest.approx(0)
    assert measured.proxy[0, [1, 3]] == pytest.approx([1 / math.sqrt(math.pi), 1.0294], abs=0.03)
    found = curve("best_of_n", [At(400, 400, n=n) for n in range(1, 17)], measured, prompts=400, users=400,
                  replies=6400, ties=0.0)  # fmt: skip
    point = found.points[3]
    assert point.gold.low < 0.6 * 1.0294 < point.gold.high
    assert point.gap.value == pytest.approx(point.proxy.value - point.gold.value)
    assert (point.n, point.kl.value) == (4, pytest.approx(math.log(4) - 0.75))
    assert found.gold.turn.value is None
    assert "no turn seen up to d = 1.35" in found.gold.turn.reason
    assert found.gap_growth.low > 0
    assert said(found).startswith("gold followed the proxy up to best of 16: proxy +1.7")


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """The true gain at n = 4 of standard normal scores, 40 prompts, 200 worlds: about 95 of 100 intervals hold it."""
    rng, covered = np.random.default_rng(2), 0
    for world in range(200):
        scores = rng.normal(size=(40, 8))
        measured = best_of_n.measure(scores, None, resampled(people(40), 200, seed=world))
        got = estimate(measured.proxy[:, 3], 40, 40)
        covered += got.low <= 1.0294 <= got.high
    assert 0.9 <= covered / 200 <= 0.99


def test_the_interval_of_a_mean_is_students() -> None:
    values = np.random.default_rng(3).normal(size=9)
    got, exact = estimate(resampled(people(9), 20_000, seed=0) @ values, 9, 9), intervals.mean(values)
    assert got.value == pytest.approx(exact.value)
    assert got.high - got.low == pytest.approx(exact.high - exact.low, rel=0.02)


def test_prompts_of_one_user_are_one_witness() -> None:
    """Nine users with four prompts each that differ little: the interval is that of clustered means."""
    rng = np.random.default_rng(3)
    users = [f"u{i // 4}" for i in range(36)]
    values = np.repeat(rng.normal(size=9), 4) + 0.1 * rng.normal(size=36)
    weights = resampled(users, 20_000, seed=0)
    assert (weights.reshape(-1, 9, 4) == weights.reshape(-1, 9, 4)[:, :, :1]).all()
    got, exact = estimate(weights @ values, 36, 9), intervals.mean(values, users)
    assert (got.value, got.n) == (pytest.approx(exact.value), 36)
    assert got.high - got.low == pytest.approx(exact.high - exact.low, rel=0.02)
    assert estimate(resampled(["u"] * 4, 10, 0) @ values[:4], 4, 1).reason == "one user only: no interval"


def test_a_stratified_pool_is_ahead_of_draws_from_the_mixture() -> None:
    """Four replies of each of two policies, at 0 and 1; a draw from their mixture is below with chance one half."""
    pool = np.array([0.0] * 4 + [1.0] * 4)
    got = best_of_n.expected(pool[None], pool[None])[0]
    assert got[[1, 2, 3]] == pytest.approx([0.786, 0.929, 0.986], abs=5e-4)
    assert [1 - 0.5**n for n in (2, 4)] == [0.75, 0.9375]


@pytest.mark.parametrize("way", ["best_of_n", "rl"])
@given(alpha=st.floats(0.2, 3), beta=st.floats(0.1, 2))
@settings(max_examples=25, deadline=None)
def test_known_alpha_and_beta_are_recovered(way: forms.Way, alpha: float, beta: float) -> None:
    distance = np.linspace(0, 4, 12)
    rng = np.random.default_rng(3)
    clean = forms.reward(way, alpha, beta, distance)
    rows = np.vstack([clean, clean + 1e-3 * rng.normal(size=(50, 12))])
    fit = forms.scaling_fit(way, np.tile(distance, (51, 1)), rows, 10, 10)
    assert (fit.alpha.value, fit.beta.value) == (pytest.approx(alpha, abs=1e-6), pytest.approx(beta, abs=1e-6))
    assert fit.r2 == pytest.approx(1)
    peak = alpha / (2 * beta) if way == "best_of_n" else math.exp(alpha / beta - 1)
    fine = np.linspace(0, 4, 4001)
    if peak < 3.9:
        assert fit.turn.value == pytest.approx(peak, rel=1e-4)
        assert fine[forms.reward(way, alpha, beta, fine).argmax()] == pytest.approx(peak, abs=2e-3)
    elif peak > 4:
        assert fit.turn.value is None
        assert fit.turn.reason.startswith("no turn seen up to d = 4.00")


@pytest.mark.parametrize("way", ["best_of_n", "rl"])
def test_the_fit_is_scipys_weighted_least_squares(way: forms.Way) -> None:
    rng = np.random.default_rng(4)
    distance, spread = np.linspace(0.3, 3, 9), rng.uniform(0.02, 0.3, 9)
    seen = forms.reward(way, 1.2, 0.4, distance) + spread * rng.normal(size=9)
    rows = np.vstack([seen, seen + spread * rng.normal(size=(400, 9))])
    fit = forms.scaling_fit(way, np.tile(distance, (401, 1)), rows, 400, 400)
    model = lambda d, a, b: forms.reward(way, a, b, d)  # noqa: E731
    (alpha, beta), covariance = curve_fit(model, distance, seen, sigma=rows[1:].std(0), absolute_sigma=True)
    assert (fit.alpha.value, fit.beta.value) == (pytest.approx(alpha), pytest.approx(beta))
    assert fit.alpha.high - fit.alpha.low == pytest.approx(2 * 1.96 * covariance[0, 0] ** 0.5, rel=0.1)


def test_what_never_turns_and_what_falls_from_the_start() -> None:
    one, none, down = np.array([1.0]), np.array([0.0]), np.array([-1.0])
    for way in ("best_of_n", "rl"):
        assert forms.turn(way, one, down) == np.inf
        assert forms.turn(way, one, none) == np.inf
        assert forms.turn(way, down, none) == 0
    assert forms.turn("best_of_n", down, one) == 0
    assert forms.turn("rl", none, one) == pytest.approx(math.exp(-1))


def test_a_turn_that_draws_doubt_has_an_open_interval() -> None:
    distance = np.linspace(0, 2, 9)
    rng = np.random.default_rng(5)
    clean = forms.reward("best_of_n", 1.0, 0.27, distance)  # the turn is at 1.85
    rows = np.vstack([clean, clean + 0.05 * rng.normal(size=(400, 9))])
    turn = forms.scaling_fit("best_of_n", np.tile(distance, (401, 1)), rows, 10, 10).turn
    assert turn.value == pytest.approx(1 / 0.54)
    assert turn.low < turn.value
    assert turn.high is None
    assert "turn beyond the data" in turn.reason


def test_too_few_points_and_no_gold_are_reasons() -> None:
    rows = np.ones((11, 2)) + np.arange(11)[:, None]
    fit = forms.scaling_fit("rl", np.ones((11, 2)), rows, 4, 4)
    assert fit.alpha.value is None
    assert fit.alpha.reason == "2 points with a distance and a spread, must be at least 3 for two numbers"
    absent = forms.scaling_fit("rl", np.ones((11, 2)), None, 4, 4)
    assert "set reward.gold_share" in absent.turn.reason
    measured = best_of_n.measure(np.random.default_rng(0).normal(size=(5, 4)), None, resampled(people(5), 100, 0))
    found = curve("best_of_n", [At(5, 5, n=n) for n in range(1, 5)], measured, prompts=5, users=5, replies=20)
    assert found.points[3].gold.value is None
    assert said(found).endswith("at best of 4, gold unmeasured")
    assert said(nothing("rl", "no rollout is left")) == "no rollout is left"


def test_equal_scores_are_a_reason_and_no_number() -> None:
    measured = best_of_n.measure(np.ones((5, 4)), None, resampled(people(5), 100, 0))
    found = curve("best_of_n", [At(5, 5, n=n) for n in range(1, 5)], measured, prompts=5, users=5, replies=20)
    assert (found.points[2].proxy.value, found.points[2].proxy.reason) == (None, "all replies have the same score")


# Reinforcement learning


def test_both_divergences_are_the_policys_kl() -> None:
    """Replies of two tokens, the second's odds depend on the first: the exact sum, and the mean over samples."""
    torch.manual_seed(6)
    first = torch.log_softmax(torch.randn(2, 5), -1)
    second = torch.log_softmax(torch.randn(2, 5, 5), -1)
    policy, start = (first[i][:, None] + second[i] for i in (0, 1))
    exact = float((policy.exp() * (policy - start)).sum())
    weight, found = policy.exp().flatten().tolist(), []
    for a, b in itertools.product(range(5), range(5)):
        logs = [[float(first[i][a]), float(second[i][a, b])] for i in (0, 1)]
        found.append(rollouts.divergence(*logs))
    assert sum(w * f.plain for w, f in zip(weight, found, strict=True)) == pytest.approx(exact)
    assert sum(w * f.low_variance for w, f in zip(weight, found, strict=True)) == pytest.approx(exact)
    assert all(f.low_variance >= 0 for f in found)


def test_the_low_variance_divergence_is_the_one_that_training_uses() -> None:
    policy, start = torch.tensor([-1.0, -0.2, -3.0]), torch.tensor([-1.4, -0.1, -2.0])
    got = rollouts.divergence(policy.tolist(), start.tolist())
    assert got.low_variance == pytest.approx(float(kl_to_reference(policy, start).sum()), rel=1e-5)
    assert got.plain == pytest.approx(float((policy - start).sum()), rel=1e-5)


@given(st.sets(st.integers(1, 40), min_size=1), st.integers(1, 10))
def test_steps_are_pooled_evenly(steps: set[int], points: int) -> None:
    runs = rollouts.pooled(sorted(steps), points)
    assert len(runs) == min(points, len(steps))
    sizes = [sum(first <= s <= last for s in steps) for first, last in runs]
    assert sum(sizes) == len(steps)
    assert max(sizes) - min(sizes) <= 1


def climbing(seed: int) -> tuple[list[rollouts.Group], rollouts.Scores]:
    """Each step gains 0.3 of proxy on its own five prompts, whose level differs by far more; gold gains nothing."""
    rng = np.random.default_rng(seed)
    level = 10 * rng.normal(size=40)
    start = rollouts.Scores(level[:, None] + rng.normal(size=(40, 6)), 2 * rng.normal(size=(40, 6)))
    groups = [
        rollouts.Group(
            step, prompt, kl=np.full(6, 0.1 * step), kl_plain=rng.normal(0.1 * step, 1, 6),
            proxy=level[prompt] + 0.3 * step + rng.normal(size=6), gold=2 * rng.normal(size=6),
        )
        for step in range(1, 9)
        for prompt in range((step - 1) * 5, step * 5)
    ]  # fmt: skip
    return groups, start


def test_a_policy_is_compared_with_its_start_on_the_same_prompts() -> None:
    where, measured = rollouts.measure(*climbing(7), 4, resampled(people(40), 300, seed=8), people(40))
    assert [at.steps for at in where] == [(1, 2), (3, 4), (5, 6), (7, 8)]
    assert {at.prompts for at in where} == {10}
    found = curve("rl", where, measured, prompts=40, users=40, replies=240)
    last = found.points[-1]
    assert last.kl.value == pytest.approx(0.75)
    assert last.distance == pytest.approx(math.sqrt(0.75))
    assert last.kl_plain.low < 0.75 < last.kl_plain.high
    assert last.gold.low < 0 < last.gold.high
    assert said(found).startswith("not shown that gold followed the proxy up to 0.75 nats: proxy +2.")


def test_intervals_of_few_prompts_cover_the_truth() -> None:
    """The last point has ten prompts and a true gain of 2.25 deviations of the start."""
    covered = 0
    for world in range(100):
        _, measured = rollouts.measure(*climbing(world), 4, resampled(people(40), 200, seed=world), people(40))
        last = estimate(measured.proxy[:, -1], 10, 10)
        covered += last.low <= 2.25 <= last.high
    assert covered / 100 >= 0.88


def test_a_bootstrap_leaves_no_prompt_out() -> None:
    weights = resampled(people(6), 500, seed=1)
    assert weights.shape == (501, 6)
    assert weights[0] == pytest.approx(np.full(6, 1 / 6))
    assert weights.sum(1) == pytest.approx(np.ones(501))
    assert weights.min() > 0


def test_a_curve_says_that_gold_turned() -> None:
    distance = best_of_n.divergence(np.arange(1, 65)) ** 0.5
    rng = np.random.default_rng(9)
    wave = rng.normal(size=(301, 1)) * np.array([[0.02]])
    wave[0] = 0
    proxy, gold = (forms.reward("best_of_n", a, b, distance)[None] * (1 + wave) for a, b in ((1.2, 0.0), (1.0, 0.4)))
    measured = Measured(np.tile(distance**2, (301, 1)), None, proxy, gold)
    found = curve("best_of_n", [At(50, 50, n=n) for n in range(1, 65)], measured, prompts=50, users=50, replies=3200)
    assert found.gold.turn.value == pytest.approx(1.25)
    assert found.gold.turn_n == pytest.approx(best_of_n.n_at(1.25))
    assert said(found).startswith("gold turned at d = 1.25 (best of 12) of 1.78; proxy +2.14, gold +0.51")
