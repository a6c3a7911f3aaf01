import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from reward_fixture import Letters, pairs, tiny_policy
from scipy.special import expit, logit

from characterflywheel.config import RewardConfig
from characterflywheel.pipeline import Work
from characterflywheel.reward.composite import RewardModels
from characterflywheel.reward.judge import judge, pairwise_margins, pointwise_margins
from characterflywheel.reward.stage import train_rewards
from characterflywheel.reward.summary import RewardSummary

CONFIG = RewardConfig(layers=2, epochs=4, learning_rate=3e-3, max_prompt_tokens=64, max_reply_tokens=24)
HELD_OUT = [p for p in pairs() if p.held_out]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RewardSummary]:
    root = tmp_path_factory.mktemp("judge")
    folder = root / "reward"
    folder.mkdir()
    summary = train_rewards(
        Work(folder, 1), CONFIG, pairs(), [], [], tiny_policy(root / "policy"), Letters(), threads=1
    )
    return folder, summary


@pytest.fixture(scope="module")
def models(stage: tuple[Path, RewardSummary]) -> RewardModels:
    return RewardModels.load(stage[0], Letters(), threads=1)


def test_models_are_saved_with_the_temperature_that_was_judged(
    stage: tuple[Path, RewardSummary], models: RewardModels, tmp_path: Path
):
    summary = stage[1]
    assert models.pointwise.temperature == summary.pointwise.calibration.applied
    assert models.pairwise.temperature == summary.pairwise.calibration.applied
    shutil.copytree(stage[0], tmp_path / "copy")
    again = RewardModels.load(tmp_path / "copy", Letters(), threads=1)
    again.pointwise.temperature, again.pairwise.temperature = 1.7, 0.6
    again.save_settings(tmp_path / "copy")
    cooled = RewardModels.load(tmp_path / "copy", Letters(), threads=1)
    prompts = [p.prompt for p in HELD_OUT]
    chosen, rejected = ([side(p)[-1].content for p in HELD_OUT] for side in (lambda p: p.chosen, lambda p: p.rejected))
    raw = pointwise_margins(models.pointwise, HELD_OUT), pairwise_margins(models.pairwise, HELD_OUT)
    for model, margins, temperature in zip((cooled.pointwise, cooled.pairwise), raw, (1.7, 0.6), strict=True):
        expected = expit(np.array(margins.log_odds) / temperature)
        assert model.prefers(prompts, chosen, rejected) == pytest.approx(expected, abs=1e-6)
    # margins are the same whatever the temperature
    assert pairwise_margins(cooled.pairwise, HELD_OUT).log_odds == pytest.approx(raw[1].log_odds, abs=1e-6)


def test_judging_calibrated_models_again_gives_the_same_report(stage: tuple[Path, RewardSummary], models: RewardModels):
    again = judge(models, [p for p in pairs() if not p.held_out], HELD_OUT, seed=1)
    expected = stage[1].model_copy(update={"history": ()})
    assert again.pointwise.calibration.temperature == pytest.approx(expected.pointwise.calibration.temperature)
    assert again.pairwise.calibration.temperature == pytest.approx(expected.pairwise.calibration.temperature, rel=1e-4)
    assert again.pointwise_accuracy == expected.pointwise_accuracy
    assert again.models_agree == expected.models_agree
    assert again.pairwise.swap_consistency == expected.pairwise.swap_consistency


def test_margins_of_the_pairwise_model_are_the_mean_of_both_orders(models: RewardModels):
    found = pairwise_margins(models.pairwise, HELD_OUT[:3])
    one, two = models.pairwise.both_orders(
        [p.prompt for p in HELD_OUT[:3]],
        [p.chosen[-1].content for p in HELD_OUT[:3]],
        [p.rejected[-1].content for p in HELD_OUT[:3]],
    )
    by_hand = models.pairwise.temperature * (logit(one) - logit(two)) / 2
    assert found.log_odds == pytest.approx(by_hand)


def test_report_names_what_the_score_leans_on_and_survives_json(stage: tuple[Path, RewardSummary]):
    folder, summary = stage
    assert RewardSummary.model_validate(json.loads((folder / "evaluation.json").read_text())) == summary
    worst = summary.offenders()
    assert worst
    assert worst[0].feature in ("questions", "ends_with_question", "words", "characters", "you_share", "i_share")
    assert f"leans on {worst[0].feature} {worst[0].within.value:+.2f}" in summary.line()
    assert summary.models_agree.n == len(HELD_OUT)
    assert summary.dropped == {}


def test_the_calibration_error_that_is_told_is_that_of_the_probabilities_in_use(stage: tuple[Path, RewardSummary]):
    """A temperature that raises the log loss on other users is not used, and neither is its calibration error."""
    summary = stage[1]
    found = summary.pointwise.calibration
    assert found.before.error != found.after.error
    for worse, used in ((-0.01, found.after), (0.01, found.before)):
        kept = found.model_copy(update={"log_loss_after": found.log_loss_before + worse})
        pointwise = summary.pointwise.model_copy(update={"calibration": kept})
        again = summary.model_copy(update={"pointwise": pointwise})
        assert again.quality().pointwise_calibration_error == used.error


def test_the_ledger_gets_what_is_worth_following(stage: tuple[Path, RewardSummary]):
    summary = stage[1]
    kept = summary.quality()
    assert kept.pointwise_accuracy == summary.pointwise_accuracy
    for found, told in (
        (summary.pointwise.calibration, kept.pointwise_calibration_error),
        (summary.pairwise.calibration, kept.pairwise_calibration_error),
    ):
        assert told == (found.after if found.applied == found.temperature else found.before).error
    assert kept.gold_accuracy is None, "no gold model was asked for"
    assert kept.swap_consistency == summary.pairwise.swap_consistency
    assert kept.new_policy is None  # there is no generation before
