from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reward_fixture import asks, pairs, tiny_policy

from characterflywheel.config import RewardConfig
from characterflywheel.reward import export
from characterflywheel.reward.fit import schedule
from characterflywheel.reward.pairwise import Pairwise
from characterflywheel.reward.pointwise import Pointwise

CONFIG = RewardConfig(layers=2, max_prompt_tokens=64, max_reply_tokens=24)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_policy(tmp_path_factory.mktemp("policy"))


def pointwise(policy: Path) -> Pointwise:
    return Pointwise.from_folder(policy, CONFIG, threads=1)


def pairwise(policy: Path) -> Pairwise:
    return Pairwise.from_folder(policy, CONFIG, threads=1)


def trained(model: Pointwise | Pairwise) -> list[float]:
    losses: list[float] = []
    model.fit(schedule([p for p in pairs() if not p.held_out], 8, 10, seed=1), 3e-3, losses.append)
    return losses


@pytest.fixture(scope="module")
def scorer(policy: Path) -> Pointwise:
    model = pointwise(policy)
    trained(model)
    return model


@pytest.fixture(scope="module")
def judge(policy: Path) -> Pairwise:
    model = pairwise(policy)
    trained(model)
    return model


def test_fresh_models_have_no_opinion(policy: Path):
    assert pointwise(policy).prefers([asks("hi")], ["yes"], ["no"]) == [0.5]
    assert pairwise(policy).prefers([asks("hi")], ["yes"], ["no"]) == [0.5]


def test_training_lowers_the_loss(policy: Path):
    losses = trained(pointwise(policy))
    assert losses[-1] < losses[0] / 2


def test_both_say_what_reviewers_prefer_on_held_out_pairs(scorer: Pointwise, judge: Pairwise):
    held_out = [p for p in pairs() if p.held_out]
    sides = (
        [p.prompt for p in held_out],
        [p.chosen[-1].content for p in held_out],
        [p.rejected[-1].content for p in held_out],
    )
    assert all(p > 0.5 for p in scorer.prefers(*sides))
    assert all(p > 0.5 for p in judge.prefers(*sides))


def test_scores_are_standardised_on_the_training_replies(scorer: Pointwise):
    training = [p for p in pairs() if not p.held_out]
    scores = scorer.score(
        [p.prompt for p in training], [(p.chosen[-1].content, p.rejected[-1].content) for p in training]
    )
    assert abs(sum(a + b for a, b in scores)) / len(scores) < 0.2
    margin = (scores[0][0] - scores[0][1]) * scorer.scale.deviation
    (p,) = scorer.prefers([training[0].prompt], [training[0].chosen[-1].content], [training[0].rejected[-1].content])
    assert p == pytest.approx(torch.sigmoid(torch.tensor(margin, dtype=torch.float64)).item(), abs=1e-6)


def test_replies_scored_together_are_scored_as_alone(scorer: Pointwise):
    texts = ["I like tea. Do you?", "No.", "I like rain. Do you?"]
    together = scorer.score([asks("Hi"), asks("Well")], [texts, []])
    alone = [scorer.score([asks("Hi")], [[text]])[0][0] for text in texts]
    assert together[1] == []
    assert together[0] == pytest.approx(alone, abs=0.05)  # bfloat16


def test_swapping_the_replies_swaps_the_answer_exactly(judge: Pairwise):
    prompts, a, b = [asks("Hi"), asks("So")], ["I like tea. Do you?", "No."], ["Rain.", "Stars. Do you?"]
    one, two = judge.prefers(prompts, a, b), judge.prefers(prompts, b, a)
    assert [p + q for p, q in zip(one, two, strict=True)] == pytest.approx([1.0, 1.0], abs=1e-12)
    assert judge.prefers([asks("Hi")], ["same"], ["same"]) == pytest.approx([0.5], abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), min_size=1, max_size=4), st.floats(0.2, 5))
def test_answers_are_antisymmetric_for_any_replies(judge: Pairwise, sides: list[tuple[str, str]], temperature: float):
    judge.temperature = temperature
    prompts, a, b = [asks("Hi")] * len(sides), [one for one, _ in sides], [two for _, two in sides]
    one, two = judge.prefers(prompts, a, b), judge.prefers(prompts, b, a)
    judge.temperature = 1.0
    assert [p + q for p, q in zip(one, two, strict=True)] == [1.0] * len(sides)
    assert all(p == 0.5 for p, x, y in zip(one, a, b, strict=True) if x == y)


def test_saved_and_loaded_score_the_same(scorer: Pointwise, tmp_path: Path):
    export.save_pointwise(scorer, tmp_path)
    again = export.load_pointwise(tmp_path, threads=1)
    texts = [["I like tea. Do you?", "I like tea."]]
    assert again.score([asks("Hi")], texts) == scorer.score([asks("Hi")], texts)
    assert again.net.model.embed_tokens.weight.device.type == "cpu"


def test_schedule_keeps_pairs_of_a_prompt_together_and_sees_each_once_an_epoch():
    training = pairs()
    steps = schedule(training, 8, 2, seed=3)
    assert steps == schedule(training, 8, 2, seed=3)
    assert sorted(p.id for step in steps[:5] for p in step) == [p.id for p in training]
    line = [p.prompt_id for step in steps[:5] for p in step]
    assert all(line[i] == line[i + 1] for i in range(0, len(line), 2))
    assert steps[:5] != steps[5:]
