"""RL is killed with SIGKILL wherever it hurts, and the next run ends in the bytes of one that was left alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from killed import At, kill
from rl_fixture import PROMPTS, Judged, letters, train, train_with_every_checkpoint
from training_fixture import Killed, dies_at

from characterflywheel.config import RLAlarmsConfig, RLConfig
from characterflywheel.errors import RewardGone, SamplerGone
from characterflywheel.pipeline import output_hashes
from characterflywheel.training.rl import samplers

CONFIG = RLConfig(
    steps=2, prompts_per_step=2, group=4, learning_rate=1e-2, temperature=1.0, max_tokens=6, updates_per_step=2,
    kl_weight=0.01, alarms=RLAlarmsConfig(every=2, stop=("entropy",), entropy_min_share=1e-9),
)  # fmt: skip
RL = "characterflywheel.training.rl"


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("whole")
    train(folder, tiny_folder, CONFIG)
    return _hashes(folder)


def _hashes(folder: Path) -> dict[str, str]:
    return {name: value for name, value in output_hashes(folder).items() if not name.startswith(".partial/")}


POINTS = [
    (At("characterflywheel.llm.native:Decoder.step", 16), ()),  # while a later step is drawn
    (At("characterflywheel.training.learner:Learner.update", 3), ()),  # between scoring and update
    (At("characterflywheel.training.learner:Learner.update", 3, "after"), ()),  # the update is in no checkpoint
    (At("torch:save", 3, "halfway"), ()),  # a checkpoint in the middle of a step
    (At("characterflywheel.llm.native:Decoder.step", 3), pytest.mark.slow),  # while the start is drawn
    (At("torch:save", 3, "after"), pytest.mark.slow),
    (At(f"{RL}.rollouts:write_atomically", 6, "halfway"), pytest.mark.slow),
    (At(f"{RL}.rollouts:Rollouts.learnt", 3, "after"), ()),  # between the end's replies and the look at them
    (At(f"{RL}.watch:look", 2), pytest.mark.slow),
    (At("characterflywheel.tables:write", 2), pytest.mark.slow),  # all is trained
]


@pytest.mark.parametrize(
    "at",
    [pytest.param(at, marks=marks, id=f"{at.target.rpartition(':')[2]}-{at.call}-{at.when}") for at, marks in POINTS],
)
def test_a_killed_run_ends_in_the_same_bytes(at: At, whole: dict[str, str], tiny_folder: Path, tmp_path: Path) -> None:
    kill(at, train_with_every_checkpoint, tmp_path, tiny_folder, CONFIG)
    assert not (tmp_path / "dropped.parquet").exists(), "it was written last"
    for left in tmp_path.iterdir():  # as the runner does
        if left.name != ".partial" and left.is_file():
            left.unlink()
    train(tmp_path, tiny_folder, CONFIG)
    assert _hashes(tmp_path) == whole
    assert {"model/model.safetensors", "metrics.jsonl", "rollouts.parquet", "alarms.jsonl"} <= whole.keys()
    assert "timing.jsonl" not in whole
    assert (tmp_path / "timing.jsonl").exists()


def test_a_run_that_left_no_checkpoint_is_replayed_to_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    """Sixteen updates of four steps with KL and looks, killed after the third step: all is learnt again from what was
    drawn, scored and kept."""
    config = RLConfig.model_validate(
        CONFIG.model_dump() | {"steps": 4, "epochs": 2, "alarms": CONFIG.alarms.model_dump() | {"every": 1}}
    )
    train(tmp_path / "whole", tiny_folder, config)
    with pytest.raises(Killed):
        train(tmp_path / "killed", tiny_folder, config, on_progress=dies_at(3))
    assert not (tmp_path / "killed" / ".partial" / "learner.pt").exists()
    asked = Judged(letters)
    train(tmp_path / "killed", tiny_folder, config, asked)
    left = (config.prompts_per_step + len(PROMPTS)) * config.group
    assert asked.asked == left, "the last step's and the end's; the others were scored before"
    assert _hashes(tmp_path / "killed") == _hashes(tmp_path / "whole")


# What goes away while RL runs


class Gone(Judged):
    """A reward model on a server that goes away after some calls."""

    def __init__(self, calls: int) -> None:
        super().__init__(letters)
        self.calls = calls

    def score(self, prompts: Any, replies: Any) -> list[list[float]]:
        self.calls -= 1
        if self.calls < 0:
            raise RewardGone("the scoring server is gone: start it again.")
        return super().score(prompts, replies)


def test_when_the_reward_model_is_gone_its_rollouts_are_kept(
    whole: dict[str, str], tiny_folder: Path, tmp_path: Path
) -> None:
    """It answers for the start's replies and the first step; the second step is drawn, and not drawn again."""
    with pytest.raises(RewardGone, match="start it again"):
        train(tmp_path, tiny_folder, CONFIG, Gone(2))
    kept = tmp_path / ".partial" / "drawn-000002.jsonl"
    drawn = kept.read_bytes()
    assert len(drawn.splitlines()) == CONFIG.prompts_per_step * CONFIG.group
    assert torch.load(tmp_path / ".partial" / "learner.pt", weights_only=True)["step"] == CONFIG.updates, "nor learnt"
    with pytest.raises(RewardGone):
        train(tmp_path, tiny_folder, CONFIG, Gone(0))
    assert kept.read_bytes() == drawn
    again = Judged(letters)
    train(tmp_path, tiny_folder, CONFIG, again)
    assert again.asked == (CONFIG.prompts_per_step + len(PROMPTS)) * CONFIG.group, "the second step's and the end's"
    assert _hashes(tmp_path) == whole


def test_when_the_sampler_is_gone_a_rerun_goes_on(
    whole: dict[str, str], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = samplers.InMemory.push

    def gone(self: samplers.InMemory, model: Any, *, version: int | None = None) -> None:
        raise SamplerGone("the sampler does not answer: start it again.")

    with monkeypatch.context() as patch:
        patch.setattr(samplers.InMemory, "push", gone)
        with pytest.raises(SamplerGone, match="start it again"):
            train(tmp_path, tiny_folder, CONFIG)
    assert samplers.InMemory.push is real
    assert (tmp_path / ".partial" / "learnt-000001.jsonl").exists()
    again = Judged(letters)
    train(tmp_path, tiny_folder, CONFIG, again)
    assert again.asked == (CONFIG.prompts_per_step + len(PROMPTS)) * CONFIG.group, "the first step was scored before"
    assert _hashes(tmp_path) == whole
