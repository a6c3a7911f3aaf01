"""What a look at RL measures: every rollout, whether or not it teaches; and what must not be kept of a broken judge."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_fixture import ANYTHING, PROMPTS, UNWATCHED, Judged, letters, lines, train
from safetensors.torch import load_file

from characterflywheel import tables
from characterflywheel.config import RLAlarmsConfig, RLConfig, SamplerConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.pipeline import Work
from characterflywheel.records import Dropped, Rollout
from characterflywheel.training.rl import train_rl
from characterflywheel.training.rl.watch import Look
from tiny_model import asks, tiny_llama, tiny_tokenizer

CONFIG = RLConfig(
    steps=2, prompts_per_step=3, group=4, max_tokens=8, temperature=1.0, learning_rate=1e-2,
    alarms=RLAlarmsConfig(every=1, start_replies=2),
)  # fmt: skip


def test_entropy_that_collapses_rings_though_no_group_teaches_any_more(tmp_path: Path) -> None:
    """The reward is one letter; once all say it, rewards are equal, and tokens that teach are none."""
    parent = tmp_path / "even"
    tiny_llama(initializer_range=0.02).save_pretrained(parent)
    tiny_tokenizer().save_pretrained(parent)
    config = RLConfig(
        steps=14, prompts_per_step=2, group=8, learning_rate=1e-1, temperature=1.0, max_tokens=4,
        alarms=RLAlarmsConfig(every=1, kl_max=1e9),
    )  # fmt: skip
    summary = train(tmp_path / "run", parent, config, Judged(lambda text: float("s" in text)))
    rows, rollouts = lines(tmp_path / "run"), tables.read(tmp_path / "run" / "rollouts.parquet", Rollout)
    assert any(row["equal_groups"] == 2 for row in rows[-4:])
    assert [row["step"] for row in rows] == list(range(1, 16)), "the last is of what step 14 made"
    for step, row in enumerate(rows[:-1], 1):
        logs = [value for r in rollouts if r.step == step for value in r.logprobs]
        assert row["entropy"] == pytest.approx(-sum(logs) / len(logs))
    mean = sum(row["entropy"] for row in rows[-4:]) / sum(row["entropy"] for row in rows[:4])
    assert rows[-1]["entropy_share"] == pytest.approx(mean)
    assert mean < 0.5
    assert "entropy" in {one.kind for one in summary.alarms}
    (entropy,) = (one for one in summary.watched if one.kind == "entropy")
    assert (entropy.step, entropy.says) == (15, f"entropy {mean:.0%} of the first steps'")
    assert summary.entropy == rows[-2]["entropy"]


def test_what_the_last_step_made_is_looked_at(tiny_folder: Path, tmp_path: Path) -> None:
    """A run of one step: its own look would set the start against itself. Nothing learns from the replies of the end,
    and it asks as many prompts as there are, up to eight."""
    config = CONFIG.model_copy(update={"steps": 1})
    summary = train(tmp_path / "watched", tiny_folder, config)
    first, end = lines(tmp_path / "watched")
    assert "kl_to_start" not in first
    assert end["kl_to_start"] != 0
    assert {(one.step, one.kind) for one in summary.watched} == {(2, "kl"), (2, "entropy"), (2, "win_rate")}
    looks = tables.read(tmp_path / "watched" / "looks.parquet", Look)
    assert [(one.step, one.prompt_id) for one in looks] == [(2, PROMPTS[i].id) for i in (3, 4, 5, 0, 1, 2)]
    assert {r.step for r in tables.read(tmp_path / "watched" / "rollouts.parquet", Rollout)} == {1}
    train(tmp_path / "unwatched", tiny_folder, config.model_copy(update={"alarms": UNWATCHED}))
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("watched", "unwatched")]
    assert weights[0] == weights[1], "who is looked at is not changed by it"


def test_an_end_that_rings_is_thrown_away(tiny_folder: Path, tmp_path: Path) -> None:
    alarms = RLAlarmsConfig(every=2, kl_max=1e-9, stop=("kl",))
    summary = train(tmp_path, tiny_folder, CONFIG.model_copy(update={"steps": 1, "alarms": alarms}))
    assert summary.stopped is not None
    assert (summary.stopped.step, summary.stopped.kept_step) == (2, 1)
    assert "went back after 1 steps: KL to the start" in summary.line()
    kept, parent = load_file(tmp_path / "model" / "model.safetensors"), load_file(tiny_folder / "model.safetensors")
    assert all(torch.equal(kept[name], parent[name]) for name in parent)


@pytest.mark.parametrize("algorithm", ["grpo", "online_dpo"])
def test_replies_that_teach_nothing_are_read_by_the_learner_too(
    algorithm: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """By int8, which drew them, they would be a distance from a start that nothing has moved from yet."""
    pytest.importorskip("ctranslate2", reason="the optional package ctranslate2 is not installed")
    config = RLConfig.model_validate(
        CONFIG.model_dump() | {"algorithm": algorithm, "sampler": SamplerConfig(kind="ctranslate2")}
    )
    train(tmp_path, tiny_folder, config, Judged(lambda text: 1.0))
    assert [row.get("kl_to_start") for row in lines(tmp_path)] == [0, None, 0]
    rollouts = [r for r in tables.read(tmp_path / "rollouts.parquet", Rollout) if r.step == 1]
    assert all(r.learner_logprobs is not None for r in rollouts)
    assert max(abs(a - b) for r in rollouts for a, b in zip(r.logprobs, r.learner_logprobs or (), strict=True)) > 0


class Broken(Judged):
    """Gives NaN at one of its calls, until it is mended."""

    def __init__(self, call: int) -> None:
        super().__init__(letters)
        self.call = call

    def score(self, prompts: Any, replies: Any) -> list[list[float]]:
        scores = super().score(prompts, replies)
        self.call -= 1
        if self.call == 0:
            scores[0][0] = math.nan
        return scores


@pytest.mark.parametrize(
    ("scorer", "gold", "who"),
    [(Broken(1), None, "reward model"), (Judged(letters), Broken(1), "gold model"),
     (Judged(letters), Broken(2), "gold model")],
    ids=["start", "start-gold", "look-gold"],
)  # fmt: skip
def test_a_score_that_is_no_number_is_not_kept_and_a_mended_judge_goes_on(
    scorer: Judged, gold: Judged | None, who: str, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(FlywheelError, match=f"the {who} gave a score that is not finite, nan, to reply 1 of"):
        train(tmp_path / "mended", tiny_folder, CONFIG, scorer, gold=gold)
    mended = train(tmp_path / "mended", tiny_folder, CONFIG, scorer, gold=gold)
    whole = train(tmp_path / "whole", tiny_folder, CONFIG, gold=gold and Judged(letters))
    assert mended == whole


def test_a_message_that_would_lose_its_beginning_is_left_out(tiny_folder: Path, tmp_path: Path) -> None:
    """As in SFT and DPO: its role's header would be gone with it."""
    long = PROMPTS[0].model_copy(update={"id": "long", "messages": asks("tea or bread? " * 60)})
    config = CONFIG.model_copy(update={"max_prompt_tokens": 96, "alarms": RLAlarmsConfig(every=0)})
    summary = train_rl(
        Work(tmp_path, 3), config, tiny_folder, [long, PROMPTS[1]], Judged(letters), ANYTHING, threads=1,
        batch_replies=16,
    )  # fmt: skip
    (dropped,) = tables.read(tmp_path / "dropped.parquet", Dropped)
    assert (dropped.id, dropped.reason) == ("long", "too_long")
    assert "max_prompt_tokens is 96" in dropped.detail
    assert (summary.dropped, summary.prompts) == (1, 1)
