"""What the gate is told of RL's alarms: the last look at the weights that were kept, never a silence nobody heard."""

from typing import Any

from characterflywheel.config import FlywheelConfig, RewardConfig, RLAlarmsConfig, RLConfig
from characterflywheel.phases.evaluation import _rung
from characterflywheel.records import Estimate, Rollout
from characterflywheel.training.rl.stage import RLSummary
from characterflywheel.training.rl.step import Stop
from characterflywheel.training.rl.watch import Alarm, Watched

CONFIG = FlywheelConfig(reward=RewardConfig(gold_share=0.3))
WINS = Estimate(value=0.5, low=0.4, high=0.6, n=4)
KL = Alarm(step=4, kind="kl", value=12.0, bound=10.0, low=9.0, high=15.0, n=4, action="warn", says="KL 12")


def summary(**changes: Any) -> RLSummary:
    return RLSummary(
        steps=8, prompts=4, rollouts=8, trained_tokens=1, sampled_tokens=1, first_reward=0.0, last_reward=0.1,
        first_words=1.0, last_words=1.0, entropy=1.0, effective_share=1.0, equal_groups=0, **changes,
    )  # fmt: skip


def seen(kind: Any, measured: Estimate, says: str | None = None) -> Watched:
    return Watched(step=8, kind=kind, measured=measured, bound=0.65, says=says)


def test_what_rang_and_is_silent_now_is_told_as_silent() -> None:
    unknown = Estimate(value=None, n=0, reason="1 steps, at least two are needed")
    told = _rung(
        summary(
            alarms=(KL,),
            watched=(seen("kl", Estimate(value=3.0, n=4)), seen("entropy", unknown), seen("win_rate", WINS, "won")),
        ),
        CONFIG,
    )
    assert (told["kl"].says, told["kl"].rang, told["kl"].step) == (None, (4,), 8)
    assert (told["win_rate"].says, told["win_rate"].rang) == ("won", ())
    assert told["entropy"].measured == unknown
    assert told["gold"].measured.reason == "there was no model to measure it by"


def test_weights_that_no_look_was_at_have_measured_nothing() -> None:
    told = _rung(summary(alarms=(KL,), stopped=Stop(step=4, kept_step=1, why="KL 12")), CONFIG)
    assert {one.measured.reason for one in told.values()} == {"no look was at the weights that were kept"}
    assert (told["kl"].step, told["kl"].says, told["kl"].rang, told["kl"].bound) == (None, None, (4,), 10.0)


def test_what_was_not_asked_for_is_no_evidence() -> None:
    assert _rung(summary(), FlywheelConfig(rl=RLConfig(alarms=RLAlarmsConfig(every=0)))) == {}
    assert set(_rung(summary(), FlywheelConfig())) == {"kl", "entropy", "win_rate"}


def test_a_stop_s_later_rollouts_are_not_handed_on() -> None:
    rows = [Rollout(step=s, prompt_id="p", text="", token_ids=(2,), logprobs=(-1.0,), score=0, reward=0)
            for s in (1, 2, 3, 4)]  # fmt: skip
    stopped = summary(stopped=Stop(step=4, kept_step=2, why="KL 12"))
    assert [r.step for r in stopped.kept(rows)] == [1, 2]
    assert [r.step for r in summary().kept(rows)] == [1, 2, 3, 4]
    assert "stopped at step 4: KL 12; the model kept has learnt from 1 of them" in stopped.line()
