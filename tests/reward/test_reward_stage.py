from pathlib import Path

import pytest
from reward_fixture import Letters, asks, pair, pairs, tiny_policy

from characterflywheel.config import RewardConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.pipeline import Work, output_hashes
from characterflywheel.records import Preference
from characterflywheel.reward.composite import RewardModels
from characterflywheel.reward.judge import RewardSummary
from characterflywheel.reward.signals import Reply, SignalModels
from characterflywheel.reward.stage import train_rewards

CONFIG = RewardConfig(layers=2, epochs=4, learning_rate=3e-3, max_prompt_tokens=64, max_reply_tokens=24)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_policy(tmp_path_factory.mktemp("policy"))


def run(folder: Path, policy: Path, rows: list[Preference]) -> RewardSummary:
    folder.mkdir()
    return train_rewards(Work(folder, 1), CONFIG, rows, [], [], policy, Letters(), threads=1)


def test_same_seed_same_bytes_and_held_out_pairs_never_train(policy: Path, tmp_path: Path):
    summary = run(tmp_path / "one", policy, pairs())
    run(tmp_path / "two", policy, pairs()[::-1])
    others = [p if not p.held_out else pair(200 + i, "No.", "Why?", held_out=True) for i, p in enumerate(pairs())]
    run(tmp_path / "three", policy, others)
    one, two, three = (output_hashes(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    # temperatures are fitted on the held-out pairs
    assert {name for name in one if one[name] != three[name]} == {"evaluation.json", "reward.json"}
    assert (summary.pairs_trained, summary.pairs_held_out) == (28, 12)
    assert summary.pointwise_accuracy.value > 0.8
    assert summary.pairwise_accuracy.value > 0.8
    assert summary.pairwise.swap_consistency.n == 12
    assert summary.signals["continue"].auc is None
    assert summary.signals["continue"].reason is not None
    assert summary.line().startswith("28 pairs · held-out accuracy pointwise ")


def test_composite_is_preference_plus_usable_signals(policy: Path, tmp_path: Path):
    run(tmp_path / "reward", policy, pairs())
    models = RewardModels.load(tmp_path / "reward", Letters(), threads=1)
    prompts, texts = [asks("Hi")], [["I like tea.", "I like tea. Do you?"]]
    assert models.composite(prompts, texts) == models.pointwise.score(prompts, texts)
    history = asks("Hi")[1:]
    rows = [Reply(f"u{i % 12}", history, "tea" if i % 2 else "rain", (float(i % 2),)) for i in range(60)]
    models.signals = SignalModels.train(rows, ("continue",), Letters(), min_auc=0.55, seed=1)
    models.scales, models.signal_weights = {"continue": (0.5, 2.0)}, {"continue": 0.25}
    (logits,) = models.signals.logits(prompts, texts)["continue"]
    expected = [
        p + 0.25 * (s - 0.5) / 2.0 for p, s in zip(models.pointwise.score(prompts, texts)[0], logits, strict=True)
    ]
    assert models.composite(prompts, texts)[0] == pytest.approx(expected)


def test_no_pairs_to_train_on_and_absent_models_are_clear_errors(policy: Path, tmp_path: Path):
    with pytest.raises(FlywheelError, match=r"no preference pairs to train on .*: annotate more prompts"):
        run(tmp_path / "none", policy, [p for p in pairs() if p.held_out])
    with pytest.raises(FlywheelError, match="holds no reward models"):
        RewardModels.load(tmp_path, Letters())


def test_without_held_out_pairs_accuracy_is_unmeasured(policy: Path, tmp_path: Path):
    summary = run(tmp_path / "all", policy, [p for p in pairs() if not p.held_out])
    assert summary.pointwise_accuracy.value is None
    assert summary.pointwise_accuracy.reason == "nothing to measure"
