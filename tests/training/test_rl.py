import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from training_fixture import Killed, dies_at, prompt, same_weights

from characterflywheel import tables
from characterflywheel.config import RLAlarmsConfig, RLConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.llm.chat_format import ChatFormat
from characterflywheel.llm.native import load_model
from characterflywheel.llm.shared_prefix import reply_logprobs
from characterflywheel.pipeline import Work
from characterflywheel.records import Candidate, ChatMessage, Rollout
from characterflywheel.safety.policy import SafetyPolicy
from characterflywheel.training import learner
from characterflywheel.training.rl import RLSummary, train_rl
from characterflywheel.training.rl.prompts import choose

UNWATCHED = RLAlarmsConfig(every=0)
CONFIG = RLConfig(
    steps=24, prompts_per_step=2, group=12, learning_rate=1e-2, temperature=1.0, max_tokens=12, alarms=UNWATCHED
)
FEW = CONFIG.model_copy(update={"steps": 4})
PROMPTS = [prompt(i) for i in range(4)]
ANYTHING = SafetyPolicy(classifiers=())


class Judged:
    """A scorer by rule."""

    def __init__(self, rule: Callable[[str], float]) -> None:
        self.rule = rule

    def score(self, prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]]) -> list[list[float]]:
        return [[self.rule(text) for text in several] for several in replies]


SHORTER = Judged(lambda text: -float(len(text)))
LETTERS = Judged(lambda text: sum(c.isascii() and c.isalpha() for c in text) / max(1, len(text)))


def train(
    folder: Path, parent: Path, config: RLConfig = CONFIG, scorer: Judged = SHORTER, safety: SafetyPolicy = ANYTHING,
    **more: object,
) -> RLSummary:  # fmt: skip
    return train_rl(Work(folder, 3), config, parent, PROMPTS, scorer, safety, threads=1, batch_replies=16, **more)  # type: ignore[arg-type]


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def mean(rows: list[dict[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def test_the_reward_rises(tiny_folder: Path, tmp_path: Path) -> None:
    """The untrained model says any bytes; the rule likes letters, and the policy learns to say them."""
    summary = train(tmp_path, tiny_folder, scorer=LETTERS)
    rows = metrics(tmp_path)
    assert mean(rows[-5:], "reward") > mean(rows[:5], "reward") + mean(rows[:5], "reward_deviation")
    assert (summary.steps, summary.rollouts) == (24, 24 * 2 * 12)
    assert summary.sampled_tokens == sum(row["tokens"] for row in rows)
    assert (summary.first_reward, summary.last_reward) == (rows[0]["reward"], rows[-1]["reward"])


@pytest.mark.slow
def test_online_dpo_raises_it_too_and_by_several_updates_a_step(tiny_folder: Path, tmp_path: Path) -> None:
    """Best against worst of each group; the margin to the start grows with what is learnt."""
    config = CONFIG.model_copy(
        update={"algorithm": "online_dpo", "prompts_per_step": 4, "updates_per_step": 2, "steps": 16}
    )
    train(tmp_path, tiny_folder, config, LETTERS)
    rows = metrics(tmp_path)
    assert mean(rows[-5:], "reward") > mean(rows[:5], "reward") + mean(rows[:5], "reward_deviation")
    assert mean(rows[-4:], "margin") > mean(rows[:4], "margin")
    learnt = [r.learner_logprobs is not None for r in tables.read(tmp_path / "rollouts.parquet", Rollout)]
    assert sum(learnt) == 16 * 4 * 2


def test_sampler_and_trainer_stay_close(tiny_folder: Path, tmp_path: Path) -> None:
    """Both in bfloat16 but in other orders: the importance weights are near 1 and hardly cost samples."""
    train(tmp_path, tiny_folder, FEW)
    for row in metrics(tmp_path):
        assert row["weight_mean"] == pytest.approx(1, abs=0.03)
        assert row["effective_share"] > 0.95
        assert 0 < row["entropy"] < math.log(320)
        assert "kl" not in row, "not measured is not zero"


def test_groups_of_equal_rewards_change_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    summary = train(tmp_path, tiny_folder, FEW, Judged(lambda text: 0.7))
    assert summary.equal_groups == FEW.steps * FEW.prompts_per_step
    assert summary.trained_tokens == 0 < summary.sampled_tokens
    assert summary.prompts == len(PROMPTS) < FEW.steps * FEW.prompts_per_step, "each once"
    assert summary.effective_share is None, "not measured is not zero"
    assert summary.entropy == metrics(tmp_path)[-1]["entropy"] > 0, "of all rollouts, whether or not they teach"
    assert "effective samples unknown" in summary.line()
    assert "loss" not in metrics(tmp_path)[0]
    assert {r.learner_logprobs for r in tables.read(tmp_path / "rollouts.parquet", Rollout)} == {None}
    assert same_weights(tmp_path / "model", tiny_folder)


def test_an_unsafe_reply_earns_less_than_any_that_is_safe(tiny_folder: Path, tmp_path: Path) -> None:
    """The scorer likes just what the policy refuses: that is what is unlearnt."""

    def harm(text: str, context: str) -> tuple[str, ...]:
        return ("harm",) if len(text) % 2 else ()

    liked = Judged(lambda text: float(len(text) % 2))
    train(tmp_path, tiny_folder, FEW, liked, SafetyPolicy(classifiers=(harm,)))
    rows = tables.read(tmp_path / "rollouts.parquet", Rollout)
    mixed = [r for r in rows if r.advantage]
    assert {(r.score, r.reward) for r in mixed} == {(1.0, -1.0), (0.0, 0.0)}
    assert all((r.advantage < 0) == (r.vetoed is not None) for r in mixed if r.advantage is not None)
    assert {r.vetoed for r in mixed} == {None, "harm"}


def test_a_reply_is_judged_as_the_answer_to_its_prompt(tiny_folder: Path, tmp_path: Path) -> None:
    """What selection vetoes earns nothing here: harm may lie in agreeing with what was asked."""
    asked: set[str] = set()

    def harm(text: str, context: str) -> tuple[str, ...]:
        asked.add(context)
        return ("harm",) if context == PROMPTS[1].messages[-1].content else ()

    train(tmp_path, tiny_folder, FEW, safety=SafetyPolicy(classifiers=(harm,)))
    assert asked == {one.messages[-1].content for one in PROMPTS}
    rows = tables.read(tmp_path / "rollouts.parquet", Rollout)
    spread = {p.id: {r.reward for r in rows if r.step in (1, 2) and r.prompt_id == p.id} for p in PROMPTS}
    assert [len(spread[p.id]) == 1 for p in PROMPTS] == [False, True, False, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_a_clear_error(bad: float, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match="a score that is not finite"):
        train(tmp_path, tiny_folder, FEW, Judged(lambda text: bad))
    assert not (tmp_path / "model").exists()


def test_no_prompt_is_a_clear_error(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match="no prompt to learn from"):
        train_rl(Work(tmp_path, 3), FEW, tiny_folder, [], SHORTER, ANYTHING, threads=1, batch_replies=16)


def test_a_killed_run_ends_in_the_same_bytes(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole", tiny_folder, FEW)
    monkeypatch.setattr(learner, "CHECKPOINT_SECONDS", -1.0)
    with pytest.raises(Killed):
        train(tmp_path / "killed", tiny_folder, FEW, on_progress=dies_at(3))
    heard: list[int] = []
    resumed = train(tmp_path / "killed", tiny_folder, FEW, on_progress=lambda done, total: heard.append(done))
    assert heard == [3, 4]
    assert resumed == whole
    assert same_weights(tmp_path / "whole" / "model", tmp_path / "killed" / "model")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    names = [tmp_path / name / "rollouts.parquet" for name in ("whole", "killed")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_killed_run_draws_no_step_twice(tiny_folder: Path, tmp_path: Path) -> None:
    """The checkpoint is of the start, since a minute has not passed: three steps are learnt again, not drawn again."""
    asked: list[int] = []

    def longer(text: str) -> float:
        asked.append(1)
        return float(len(text))

    with pytest.raises(Killed):
        train(tmp_path, tiny_folder, FEW, Judged(longer), on_progress=dies_at(3))
    train(tmp_path, tiny_folder, FEW, Judged(longer))
    assert len(asked) == FEW.steps * FEW.prompts_per_step * FEW.group


def test_every_rollout_is_kept_with_the_samplers_logprobs(tiny_folder: Path, tmp_path: Path) -> None:
    """The first step's replies are the start's: its own forward pass gives the same log-probabilities."""
    summary = train(tmp_path, tiny_folder, FEW, LETTERS, SafetyPolicy(classifiers=(lambda t, c: ("x",) * ("a" in t),)))
    rows = tables.read(tmp_path / "rollouts.parquet", Rollout)
    assert len(rows) == summary.rollouts
    assert [r.step for r in rows] == sorted(r.step for r in rows)
    assert summary.sampled_tokens == sum(len(r.token_ids) for r in rows)
    for at in range(0, len(rows), FEW.group):
        group = rows[at : at + FEW.group]
        assert len({r.prompt_id for r in group}) == 1
        assert [r.score for r in group] == pytest.approx([LETTERS.rule(r.text) for r in group])
        allowed = [r.score for r in group if "a" not in r.text]
        below = min(allowed) - 1 if allowed else min(r.score for r in group)
        assert [r.reward for r in group] == pytest.approx([below if "a" in r.text else r.score for r in group])
    model, tokenizer = load_model(tiny_folder, torch.float32)
    form, asks = ChatFormat(tokenizer, FEW.max_prompt_tokens), {p.id: p.messages for p in PROMPTS}
    first = [r for r in rows if r.step == 1]
    with torch.no_grad():
        again = reply_logprobs(model, [(*form.prompt(asks[r.prompt_id]), r.token_ids) for r in first])
    for logs in ([v for r in first for v in r.logprobs], [v for r in first for v in r.learner_logprobs or r.logprobs]):
        assert again.logprobs.tolist() == pytest.approx(logs, abs=0.2)  # bfloat16
    learnt = {len({r.reward for r in rows[at : at + FEW.group]}) > 1 for at in range(0, len(rows), FEW.group)}
    assert learnt == {True}
    assert all(len(r.learner_logprobs or ()) == len(r.token_ids) for r in rows)


def test_a_kl_term_holds_the_policy_back(tiny_folder: Path, tmp_path: Path) -> None:
    """With a heavy weight the policy stays near its reference, and its divergence is reported."""
    few = CONFIG.model_copy(update={"steps": 12, "learning_rate": 3e-3})
    train(tmp_path / "free", tiny_folder, few.model_copy(update={"kl_weight": 1e-6}))
    train(tmp_path / "held", tiny_folder, few.model_copy(update={"kl_weight": 3.0}))
    free, held = metrics(tmp_path / "free"), metrics(tmp_path / "held")
    assert free[0]["kl"] < 1e-2
    assert mean(free[-3:], "kl") > 2 * mean(held[-3:], "kl") > 0


# Which prompts


def scored(number: int, *scores: float | None) -> list[Candidate]:
    return [
        Candidate(
            id=f"{number}-{i}", prompt_id=f"prompt-{number:02}", policy="a", text="x", finish_reason="stop", score=score
        )
        for i, score in enumerate(scores)
    ]  # fmt: skip


def test_prompts_that_divide_the_candidates_are_chosen() -> None:
    prompts = [prompt(i) for i in range(20)]
    candidates = [c for i in range(20) for c in scored(i, 0.0, float(i), float(-i), None)]
    chosen = choose(prompts, candidates, 8, by="variance", ordinary_share=0.25, seed=1).prompts
    ids = {p.id for p in chosen}
    assert len(ids) == len(chosen) == 8
    assert {f"prompt-{i:02}" for i in range(14, 20)} <= ids
    assert choose(prompts[::-1], candidates[::-1], 8, by="variance", ordinary_share=0.25, seed=1).prompts == chosen
    assert choose(prompts, candidates, 8, by="variance", ordinary_share=0.25, seed=2).prompts != chosen


def test_prompts_without_two_scores_are_ordinary() -> None:
    prompts = [*(prompt(i) for i in range(4)), prompt(9, "evaluate")]
    candidates = [*scored(0, 1.0), *scored(1, 1.0, None), *scored(2, 1.0, 2.0), *scored(9, 0.0, 99.0)]
    assert [p.id for p in choose(prompts, candidates, 1, by="variance", ordinary_share=0.0, seed=1).prompts] == [
        "prompt-02"
    ]
    everything = choose(prompts, candidates, 50, by="variance", ordinary_share=0.25, seed=1).prompts
    assert sorted(p.id for p in everything) == [f"prompt-{i:02}" for i in range(4)]
