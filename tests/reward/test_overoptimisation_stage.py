"""The over-optimisation stage on a tiny model's real rollouts; scorers by rule, so that proxy and gold are known."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from characterflywheel import tables
from characterflywheel.config import OveroptimisationConfig, RLAlarmsConfig, RLConfig
from characterflywheel.pipeline import Work, output_hashes
from characterflywheel.records import Candidate, ChatMessage, Estimate, Prompt, Rollout
from characterflywheel.reward.overoptimisation.stage import (
    OveroptimisationSummary,
    ScoredReply,
    measure_overoptimisation,
)
from characterflywheel.safety.policy import SafetyPolicy
from characterflywheel.training.rl import train_rl
from tiny_model import asks, tiny_folder

__all__ = ["tiny_folder"]
RL = RLConfig(steps=12, prompts_per_step=2, group=16, learning_rate=1e-2, temperature=0.7, max_tokens=10)
KNOWS = Estimate(value=0.7, low=0.58, high=0.8, n=60)
CONFIG = OveroptimisationConfig(rl_points=4, start_replies=6, draws=200)
PROMPTS = [
    Prompt(
        id=f"prompt-{i:02}", conversation_id=f"c{i}", user_id=f"u{i}", source="user", character_id="mo",
        messages=asks(f"is it {i} already?"), split="train", cluster=0, turn=1,
        created_at=datetime(2026, 1, 5, tzinfo=UTC),
    )
    for i in range(8)
]  # fmt: skip
CANDIDATES = [
    Candidate(
        id=f"{p.id}-{j}", prompt_id=p.id, policy="ab"[j % 2], text="x" * ((i + 3 * j) % 7) + "y" * j,
        finish_reason="stop", score=0.0,
    )
    for i, p in enumerate(PROMPTS)
    for j in range(6)
]  # fmt: skip


class Judged:
    """A scorer by rule."""

    def __init__(self, rule: Callable[[str], float]) -> None:
        self.rule, self.asked = rule, 0

    def score(self, prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]]) -> list[list[float]]:
        self.asked += sum(map(len, replies))
        return [[self.rule(text) for text in several] for several in replies]


def letters(text: str) -> float:
    return sum(c.isascii() and c.isalpha() for c in text) / max(1, len(text))


@pytest.fixture(scope="module")
def rollouts(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Rollout]:
    """The policy learns to say letters."""
    folder = tmp_path_factory.mktemp("rl")
    work, safety = Work(folder, 3), SafetyPolicy(classifiers=())
    train_rl(work, RL, tiny_folder, PROMPTS, Judged(letters), safety, threads=1, batch_replies=16)
    return tables.read(folder / "rollouts.parquet", Rollout)


def run(
    folder: Path, start: Path, rollouts: Sequence[Rollout], *, gold: Judged | None = None,
    config: OveroptimisationConfig = CONFIG, rl: RLConfig = RL, prompts: Sequence[Prompt] = PROMPTS,
    gold_accuracy: Estimate | None = KNOWS,
) -> OveroptimisationSummary:  # fmt: skip
    return measure_overoptimisation(
        Work(folder, 5), config, rl, prompts, CANDIDATES, rollouts, start, Judged(letters), gold,
        gold_accuracy=gold_accuracy, threads=1, batch_replies=16,
    )  # fmt: skip


def test_gold_that_is_the_proxy_follows_it(tiny_folder: Path, rollouts: list[Rollout], tmp_path: Path) -> None:
    summary = run(tmp_path, tiny_folder, rollouts, gold=Judged(letters))
    for found in (summary.best_of_n, summary.rl):
        for point in found.points:
            assert point.gold.value == pytest.approx(point.proxy.value, abs=1e-6)
            assert point.gap.value == pytest.approx(0, abs=1e-6)
    points = summary.rl.points
    assert [p.steps for p in points] == [(1, 3), (4, 6), (7, 9), (10, 12)]
    assert points[-1].proxy.low > 0.5, "it learnt to say letters"
    assert points[-1].kl.value > points[0].kl.value > 0
    assert points[-1].kl.low < points[-1].kl_plain.value < points[-1].kl.value * 2
    assert [p.n for p in summary.best_of_n.points] == [1, 2, 3, 4, 5, 6]
    assert "RL: gold followed the proxy up to" in summary.line()


def test_at_the_samplers_temperature_the_first_step_has_not_moved(
    tiny_folder: Path, rollouts: list[Rollout], tmp_path: Path
) -> None:
    """Policy and start are read alike, so that bfloat16's rounding cancels. Another temperature would show."""
    config = CONFIG.model_copy(update={"rl_points": 12})
    first, *_, last = run(tmp_path / "right", tiny_folder, rollouts, config=config).rl.points
    assert first.steps == (1, 1)
    assert (first.kl.value, first.kl_plain.value) == (0, 0)
    assert last.kl.value > 0.02
    other = RL.model_copy(update={"temperature": 1.0})
    assert run(tmp_path / "wrong", tiny_folder, rollouts, config=config, rl=other).rl.points[0].kl.value > 0.1


def test_gold_that_likes_the_opposite_falls(tiny_folder: Path, rollouts: list[Rollout], tmp_path: Path) -> None:
    summary = run(tmp_path, tiny_folder, rollouts, gold=Judged(lambda text: -letters(text)))
    assert summary.rl.points[-1].gold.high < 0 < summary.rl.points[-1].proxy.low
    assert summary.rl.gap_growth.low > 0
    assert "gold followed" not in summary.line()


def test_gold_that_may_stop_rl_is_told_to_flatter_its_end(
    tiny_folder: Path, rollouts: list[Rollout], tmp_path: Path
) -> None:
    stops = RL.model_copy(update={"alarms": RLAlarmsConfig(stop=("gold",))})
    told = run(tmp_path / "chose", tiny_folder, rollouts, gold=Judged(letters), rl=stops)
    assert told.gold_stops
    assert "RL was to stop where gold fell, so gold flatters its end" in told.line()
    none = run(tmp_path / "none", tiny_folder, rollouts, rl=stops, gold_accuracy=None)
    assert (none.gold_stops, "flatters" in none.line()) == (False, False), "there was no gold to stop it"


def test_nothing_is_concluded_from_a_gold_model_that_may_guess(
    tiny_folder: Path, rollouts: list[Rollout], tmp_path: Path
) -> None:
    sure = run(tmp_path / "sure", tiny_folder, rollouts, gold=Judged(letters))
    for accuracy, why in (
        (Estimate(value=0.52, low=0.4, high=0.64, n=30),
         "the gold model itself is not shown to know better than chance (52% [40%, 64%], n = 30)"),
        (None, "the gold model itself was not measured: no held-out accuracy"),
    ):  # fmt: skip
        name = "none" if accuracy is None else "chance"
        found = run(tmp_path / name, tiny_folder, rollouts, gold=Judged(letters), gold_accuracy=accuracy)
        assert (found.best_of_n, found.rl) == (sure.best_of_n, sure.rl), "the curves are kept"
        assert found.line().count("gold unmeasured") == 2
        assert found.line().endswith(f" · {why}")
        assert "followed" not in found.line()


def test_prompts_of_one_user_are_not_independent(tiny_folder: Path, rollouts: list[Rollout], tmp_path: Path) -> None:
    """One user asked everything: the same numbers, and no interval."""
    mine = [p.model_copy(update={"user_id": "u"}) for p in PROMPTS]
    alone = run(tmp_path / "alone", tiny_folder, rollouts, prompts=mine)
    several = run(tmp_path / "several", tiny_folder, rollouts)
    for one, many in ((alone.best_of_n, several.best_of_n), (alone.rl, several.rl)):
        assert one.points[-1].proxy.value == many.points[-1].proxy.value
        assert one.points[-1].proxy.reason == "one user only: no interval"
        assert many.points[-1].proxy.low is not None


def test_every_reply_behind_the_curves_is_written(tiny_folder: Path, rollouts: list[Rollout], tmp_path: Path) -> None:
    gold = Judged(lambda text: float(len(text)))
    summary = run(tmp_path, tiny_folder, rollouts, gold=gold)
    rows = tables.read(tmp_path / "scores.parquet", ScoredReply)
    by_way = {way: [r for r in rows if r.way == way] for way in ("best_of_n", "rl", "start")}
    assert {way: len(mine) for way, mine in by_way.items()} == {"best_of_n": 48, "rl": 12 * 2 * RL.group, "start": 48}
    assert gold.asked == len(rows)
    assert (summary.best_of_n.replies, summary.rl.replies, summary.rl.prompts) == (48, 12 * 2 * RL.group, 8)
    assert [r.proxy for r in by_way["rl"]] == [r.score for r in rollouts]
    assert all(r.kl is not None and r.kl >= 0 for r in by_way["rl"])
    again = OveroptimisationSummary.model_validate_json((tmp_path / "curves.json").read_text("utf-8"))
    assert again == summary


def test_without_a_gold_model_the_proxy_stands_alone(
    tiny_folder: Path, rollouts: list[Rollout], tmp_path: Path
) -> None:
    summary = run(tmp_path, tiny_folder, rollouts)
    assert summary.best_of_n.points[-1].proxy.value > 0
    assert summary.rl.points[-1].gold.value is None
    assert summary.line().endswith(
        "there is no gold model: set reward.gold_share, to 0.3 for example, and one is trained"
    )
    assert {r.gold for r in tables.read(tmp_path / "scores.parquet", ScoredReply)} == {None}


def test_a_killed_run_draws_nothing_twice_and_ends_in_the_same_bytes(
    tiny_folder: Path, rollouts: list[Rollout], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", tiny_folder, rollouts, gold=Judged(letters))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("characterflywheel.reward.overoptimisation.stage._rl", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", tiny_folder, rollouts, gold=Judged(letters))
    kept = tmp_path / "killed" / ".partial" / "start.jsonl"
    before = kept.stat().st_mtime_ns
    run(tmp_path / "killed", tiny_folder, rollouts, gold=Judged(letters))
    assert kept.stat().st_mtime_ns == before
    whole, resumed = (output_hashes(tmp_path / name) for name in ("whole", "killed"))
    assert whole == resumed


def test_few_prompts_are_read_where_rl_was_long_and_erased_ones_never(
    tiny_folder: Path, rollouts: list[Rollout], tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"rl_prompts": 7})
    summary = run(tmp_path / "few", tiny_folder, rollouts, config=config)
    assert summary.rl.replies == 3 * 2 * RL.group, "whole steps"
    assert summary.rl.points[0].steps[0] == 1
    assert summary.rl.points[-1].steps[1] == 12
    left = run(tmp_path / "erased", tiny_folder, rollouts, prompts=PROMPTS[2:])
    assert (left.best_of_n.prompts, left.rl.prompts) == (6, 6)
    none = run(tmp_path / "none", tiny_folder, rollouts, prompts=[])
    assert none.line().startswith("best of n: 48 candidates, two to a prompt are needed · RL: no rollout is left")
