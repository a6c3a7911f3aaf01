"""RL looked at while it runs: alarms are told, stops keep the last good weights, faults are counted or clear errors."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_fixture import ANYTHING, PROMPTS, UNWATCHED, Judged, letters, lines, metrics, train
from training_fixture import Killed, dies_at, same_weights, weights

from characterflywheel import tables
from characterflywheel.config import RLAlarmsConfig, RLConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.llm.token_sampler import Drawn
from characterflywheel.pipeline import Work
from characterflywheel.records import Dropped, Rollout
from characterflywheel.training import learner
from characterflywheel.training.rl import samplers, train_rl
from characterflywheel.training.rl.watch import Alarm, Look
from tiny_model import says

CONFIG = RLConfig(
    steps=5, prompts_per_step=3, group=6, learning_rate=1e-2, temperature=1.0, max_tokens=8,
    alarms=RLAlarmsConfig(every=1),
)  # fmt: skip


def watched(**changes: Any) -> RLConfig:
    return CONFIG.model_copy(update={"alarms": RLAlarmsConfig(**{"every": 1} | changes)})


@pytest.fixture(scope="module")
def free(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that only warns, with gold that dislikes what the proxy likes."""
    folder = tmp_path_factory.mktemp("free")
    train(folder, tiny_folder, watched(kl_max=0.5), gold=Judged(lambda text: -letters(text)))
    return folder


def test_a_look_sets_the_policy_against_its_start(free: Path) -> None:
    """At the first step they are one policy: no divergence but rounding's, and about as many wins as losses."""
    rows = [row for row in lines(free) if "kl_to_start" in row]
    assert rows[0]["kl_to_start"] == pytest.approx(0, abs=1e-6), "the same products of the same weights"
    assert rows[-1]["kl_to_start"] > 0.5
    assert all(row["gold_gain"] == pytest.approx(-row["score_gain"]) for row in rows)
    looks = tables.read(free / "looks.parquet", Look)
    steps = {step: [one for one in looks if one.step == step] for step in (1, 2, 3, 4, 6)}
    assert [len(each) for each in steps.values()] == [3, 3, 3, 3, 6], "in the end all six prompts, for eight are wanted"
    for row, window in zip(rows, ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 6)), strict=True):
        pooled, now = [one for each in window for one in steps[each]], steps[window[-1]]
        assert row["step"] == window[-1]
        assert row["win_rate"] == pytest.approx(sum(one.win_rate for one in pooled) / len(pooled))
        assert row["kl_to_start"] == pytest.approx(sum(one.kl for one in now) / len(now))


def test_alarms_are_told_in_the_order_they_began(free: Path) -> None:
    told = [Alarm.model_validate_json(line) for line in (free / "alarms.jsonl").read_text("utf-8").splitlines()]
    (kl,) = [one for one in told if one.kind == "kl"]
    first = next(row for row in metrics(free) if row.get("kl_to_start", 0.0) > 0.5)
    assert (kl.step, kl.value, kl.bound, kl.n, kl.action) == (first["step"], first["kl_to_start"], 0.5, 3, "warn")
    assert told == sorted(told, key=lambda one: one.step)


def test_every_part_of_the_reward_is_kept(tiny_folder: Path, tmp_path: Path) -> None:
    config = CONFIG.model_validate(
        CONFIG.model_dump()
        | {"steps": 1, "terms": {"length_weight": 0.5, "repetition_weight": 0.25, "style": {"questions": -2.0}},
           "alarms": UNWATCHED.model_dump()}
    )  # fmt: skip
    train(tmp_path, tiny_folder, config)
    rows = tables.read(tmp_path / "rollouts.parquet", Rollout)
    for r in rows:
        assert r.length is not None
        assert r.repetition is not None
        assert r.style == -2.0 * r.features[0]
        assert r.reward == pytest.approx(r.score + 0.5 * r.length + 0.25 * r.repetition + r.style)
        assert r.cut_off == (r.token_ids[-1] != 2)
        assert r.version == 0
    (told,) = metrics(tmp_path)
    assert told["score"] == pytest.approx(sum(r.score for r in rows) / len(rows))
    assert told["style_term"] == pytest.approx(sum(r.style or 0 for r in rows) / len(rows))
    assert told["cut_off_share"] == pytest.approx(sum(bool(r.cut_off) for r in rows) / len(rows))
    groups = [rows[i : i + 6] for i in range(0, 18, 6)]
    for group in groups:
        rewards = torch.tensor([r.reward for r in group])
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        assert [r.advantage for r in group] == pytest.approx(expected.tolist(), abs=1e-5)


# Stops


def test_a_stop_keeps_the_weights_of_the_last_good_look(
    free: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound lies between the divergences of two looks. What drew the good one has learnt from the steps before."""
    seen = [row["kl_to_start"] for row in metrics(free)[:4]]
    bad = next(step for step in (3, 4) if seen[step - 1] > max(seen[: step - 1]))
    config = watched(kl_max=(seen[bad - 1] + max(seen[: bad - 1])) / 2, stop=("kl",))
    summary = train(tmp_path / "stopped", tiny_folder, config)
    assert summary.stopped is not None
    assert (summary.stopped.step, summary.stopped.kept_step) == (bad, bad - 1)
    assert summary.stopped.why == f"KL to the start {seen[bad - 1]:.2f} nats a reply"
    assert summary.steps == bad == len(metrics(tmp_path / "stopped"))
    assert [(one.kind, one.action) for one in summary.alarms if one.kind == "kl"] == [("kl", "stop")]
    assert f"stopped at step {bad}: KL to the start" in summary.line()
    assert f"the model kept has learnt from {bad - 2} of them" in summary.line()
    kept, thrown = metrics(tmp_path / "stopped")[bad - 2 :]
    assert (summary.last_reward, summary.last_words, summary.entropy) == (
        kept["reward"],
        kept["words"],
        kept["entropy"],
    )
    assert kept["reward"] != thrown["reward"]
    assert {(one.step, one.kind, one.says) for one in summary.watched} == {
        (bad - 1, kind, None) for kind in ("kl", "entropy", "win_rate")
    }, "of the weights that are kept, not of those that rang"  # fmt: skip
    rollouts = tables.read(tmp_path / "stopped" / "rollouts.parquet", Rollout)
    assert {r.step for r in rollouts} == set(range(1, bad + 1))
    assert {r.step for r in summary.kept(rollouts)} == set(range(1, bad))
    monkeypatch.setattr(learner, "CHECKPOINT_SECONDS", -1.0)
    with pytest.raises(Killed):
        train(tmp_path / "killed", tiny_folder, config, on_progress=dies_at(bad - 1))
    state = torch.load(tmp_path / "killed" / ".partial" / "learner.pt", weights_only=True)
    assert state["step"] == bad - 2
    kept = weights(tmp_path / "stopped" / "model")
    assert torch.equal(kept["model.norm.weight"], state["parameters"][-1])
    assert torch.equal(kept["model.embed_tokens.weight"], state["parameters"][0])


def test_a_stop_at_the_first_look_keeps_the_start(tiny_folder: Path, tmp_path: Path) -> None:
    config = watched(every=3, kl_max=1e-6, stop=("kl",))
    summary = train(tmp_path, tiny_folder, config)
    assert summary.stopped is not None
    assert (summary.stopped.step, summary.stopped.kept_step) == (3, 1)
    assert same_weights(tmp_path / "model", tiny_folder)
    assert summary.watched == (), "the start itself was not looked at"
    rows = metrics(tmp_path)
    assert (summary.last_reward, summary.effective_share) == (rows[0]["reward"], None)


def test_a_score_that_gold_dislikes_stops_training(tiny_folder: Path, tmp_path: Path) -> None:
    """Letters are learnt; gold counts everything else. Both gains are clear of 0 before the run is over."""
    config = watched(stop=("gold",), start_replies=12).model_copy(update={"steps": 16, "group": 12})
    summary = train(tmp_path, tiny_folder, config, gold=Judged(lambda text: -letters(text)))
    assert summary.stopped is not None
    assert summary.stopped.step < 16
    assert summary.stopped.why.startswith("score +")
    assert "gold score -" in summary.stopped.why
    agreed = train(tmp_path / "agreed", tiny_folder, config, gold=Judged(letters))
    assert agreed.stopped is None


def test_nothing_is_looked_at_unasked(tiny_folder: Path, tmp_path: Path) -> None:
    asked = Judged(letters)
    summary = train(tmp_path, tiny_folder, CONFIG.model_copy(update={"alarms": UNWATCHED}), asked)
    assert asked.asked == summary.rollouts
    assert (summary.alarms, summary.stopped) == ((), None)
    assert "kl_to_start" not in lines(tmp_path)[-1]
    assert tables.read(tmp_path / "looks.parquet", Look) == []


# Faults


def test_a_prompt_that_cannot_fit_is_left_out_and_counted(tiny_folder: Path, tmp_path: Path) -> None:
    """Long histories lose their oldest turns; a character too long for the window leaves no room for any."""
    asked = PROMPTS[0].messages
    long = PROMPTS[0].model_copy(update={"id": "long", "messages": (says("system", "sea " * 300), asked[1])})
    talk = [says(role, f"{role} {i} " + "tea " * 20) for i in range(9) for role in ("user", "assistant")]
    history = PROMPTS[1].model_copy(update={"id": "history", "messages": (asked[0], *talk, asked[1])})
    config = CONFIG.model_copy(update={"steps": 2, "max_prompt_tokens": 64, "alarms": UNWATCHED})
    more = {"threads": 1, "batch_replies": 16}
    prompts = [long, history, PROMPTS[2]]
    summary = train_rl(Work(tmp_path, 3), config, tiny_folder, prompts, Judged(letters), ANYTHING, **more)
    (dropped,) = tables.read(tmp_path / "dropped.parquet", Dropped)
    assert (dropped.id, dropped.stage, dropped.reason, summary.dropped) == ("long", "rl", "too_long", 1)
    assert "the limit for prompts is 64" in dropped.detail
    assert {r.prompt_id for r in tables.read(tmp_path / "rollouts.parquet", Rollout)} == {"history", "prompt-02"}
    with pytest.raises(FlywheelError, match=r"none of 1 has room in rl\.max_prompt_tokens == 64"):
        train_rl(Work(tmp_path / "none", 3), config, tiny_folder, [long], Judged(letters), ANYTHING, **more)


def test_a_window_beyond_the_model_s_is_a_clear_error(tiny_folder: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_prompt_tokens": 505})
    with pytest.raises(FlywheelError, match=r"max_prompt_tokens \+ rl.max_tokens == 513, must be <= 512"):
        train(tmp_path, tiny_folder, config)


def test_a_run_that_diverges_ends_with_a_clear_error(tiny_folder: Path, tmp_path: Path) -> None:
    """Weights of 1e30 have no finite logits. The first step is kept, no model is written."""
    config = CONFIG.model_copy(update={"learning_rate": 1e30, "alarms": UNWATCHED})
    with pytest.raises(
        FlywheelError, match=r"step \d of 5: .*(not finite|must be finite|diverged).*lower the learning rate"
    ):
        train(tmp_path, tiny_folder, config)
    assert (tmp_path / ".partial" / "learnt-000001.jsonl").exists()
    assert not (tmp_path / "model").exists()


def test_a_token_without_a_number_is_masked_counted_and_kept(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that reports NaN for the first token of the first reply of every step."""
    real = samplers.InMemory.sample

    def odd(self: samplers.InMemory, prompts: Any, **more: Any) -> list[list[Drawn]]:
        drawn = real(self, prompts, **more)
        drawn[0][0][1][0] = math.nan
        return drawn

    monkeypatch.setattr(samplers.InMemory, "sample", odd)
    config = CONFIG.model_copy(update={"max_exploded_share": 0.1})
    summary = train(tmp_path, tiny_folder, config)
    assert summary.exploded_tokens == CONFIG.steps
    rows = tables.read(tmp_path / "rollouts.parquet", Rollout)
    assert sum(math.isnan(v) for r in rows for v in r.logprobs) == CONFIG.steps
    assert all(math.isfinite(row.get("kl_to_start", 0.0)) for row in lines(tmp_path))


def test_a_step_of_equal_rewards_after_one_that_taught_moves_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW's momentum of the first step is there, but no optimiser step is taken in the second."""
    scored = 0

    def rule(text: str) -> float:
        nonlocal scored
        scored += 1
        return letters(text) if scored <= 18 else 0.5

    config = CONFIG.model_copy(update={"steps": 3, "alarms": UNWATCHED})
    monkeypatch.setattr(learner, "CHECKPOINT_SECONDS", -1.0)
    with pytest.raises(Killed):
        train(tmp_path, tiny_folder, config, Judged(rule), on_progress=dies_at(2))
    one = torch.load(tmp_path / ".partial" / "learner.pt", weights_only=True)["parameters"]
    summary = train(tmp_path, tiny_folder, config, Judged(rule))
    assert (summary.skipped_updates, summary.equal_groups) == (2, 6)
    kept = weights(tmp_path / "model")
    assert torch.equal(kept["model.norm.weight"], one[-1])
    assert torch.equal(kept["model.embed_tokens.weight"], one[0])
    assert not torch.equal(one[0], weights(tiny_folder)["model.embed_tokens.weight"])


def test_seconds_are_told_by_part(free: Path) -> None:
    rows = [json.loads(line) for line in (free / "timing.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    drawing, learning = {"push", "sampling", "scoring"}, {"forward", "backward", "update"}
    for row in rows:
        assert row.keys() >= {"step", *drawing, *(learning if row["step"] < 6 else ())}
        assert ("look" in row) == (row["step"] != 5)
        assert all(value >= 0 for value in row.values())


@pytest.mark.parametrize("kind", ["transformers", pytest.param("ctranslate2", marks=pytest.mark.slow)])
def test_any_sampler_draws_and_a_killed_run_ends_alike(
    kind: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importance weights stay near 1 only if the learner's weights reach the sampler after each step; adapters too."""
    config = RLConfig.model_validate(
        CONFIG.model_dump() | {"sampler": {"kind": kind}, "lora_rank": 4, "steps": 3, "alarms": {"every": 3}}
    )
    train(tmp_path / "whole", tiny_folder, config)
    for row in metrics(tmp_path / "whole"):
        assert row["weight_mean"] == pytest.approx(1, abs=0.05)
    rows = tables.read(tmp_path / "whole" / "rollouts.parquet", Rollout)
    assert {(r.step, r.version) for r in rows} == {(1, 0), (2, 1), (3, 2)}
    assert not same_weights(tmp_path / "whole" / "model", tiny_folder)
    monkeypatch.setattr(learner, "CHECKPOINT_SECONDS", -1.0)
    with pytest.raises(Killed):
        train(tmp_path / "killed", tiny_folder, config, on_progress=dies_at(2))
    train(tmp_path / "killed", tiny_folder, config)
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    assert same_weights(whole / "model", killed / "model")
    assert (whole / "rollouts.parquet").read_bytes() == (killed / "rollouts.parquet").read_bytes()
    assert (whole / "adapter").exists()
