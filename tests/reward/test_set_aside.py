"""What the gold model learns from trains no other model: its users' comparisons and rewrites."""

from pathlib import Path

import pytest
from reward_fixture import Letters, pair, pairs, tiny_policy

from characterflywheel import generation, lineage, tables
from characterflywheel.config import FlywheelConfig, RewardConfig, SFTConfig
from characterflywheel.phases import herding
from characterflywheel.pipeline import Work
from characterflywheel.records import ChatMessage, Example, Preference, Prompt, SetAside
from characterflywheel.reward.stage import train_rewards
from characterflywheel.training import dpo as dpo_stage
from characterflywheel.training import sft as sft_stage
from characterflywheel.training import sources
from characterflywheel.workshop import Workshop
from characterflywheel.workspace import Workspace, init

CONFIG = RewardConfig(layers=2, epochs=1, max_prompt_tokens=64, max_reply_tokens=24, gold_share=0.3)
ROWS = [*pairs(), pair(80, "Same.", "Same.")]


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("aside")
    (root / "reward").mkdir()
    policy = tiny_policy(root / "policy")
    train_rewards(Work(root / "reward", 1), CONFIG, ROWS, [], [], policy, Letters(), threads=1)
    return root / "reward"


def aside(folder: Path) -> set[str]:
    return {row.user_id for row in tables.read(folder / "gold.parquet", SetAside)}


def test_the_gold_models_users_are_named(reward: Path) -> None:
    rows = tables.read(reward / "gold.parquet", SetAside)
    assert rows == sorted(rows, key=lambda row: row.prompt_id)
    assert 0.2 < len({row.prompt_id for row in rows}) / len({p.prompt_id for p in ROWS if not p.held_out}) < 0.4
    assert {(row.prompt_id, row.user_id) for row in rows} < {(p.prompt_id, p.user_id) for p in ROWS}


def test_an_erasure_finds_a_user_who_was_set_aside(reward: Path) -> None:
    rows = tables.read(reward / "gold.parquet", SetAside)
    found = lineage.table(reward / "gold.parquet").naming(lineage.Ids({rows[0].user_id}, set(), set()))
    assert found.tolist() == [i for i, row in enumerate(rows) if row.user_id == rows[0].user_id]


def test_without_a_gold_model_nobody_is_set_aside(tmp_path: Path) -> None:
    folder = tmp_path / "reward"
    folder.mkdir()
    config = CONFIG.model_copy(update={"gold_share": 0.0})
    train_rewards(Work(folder, 1), config, ROWS, [], [], tiny_policy(tmp_path / "policy"), Letters(), threads=1)
    assert aside(folder) == set()


def test_neither_sft_nor_dpo_learns_from_them(reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: dict[str, set[str]] = {}

    def dpo(work: Work, config: object, parent: Path, rows: list[Preference], **more: object) -> None:
        learnt["dpo"] = {row.user_id for row in rows}

    def sft(work: Work, config: object, parent: Path, rows: list[Example], **more: object) -> None:
        for row in sources.offer(SFTConfig(), rows, more["reserved"]).examples:  # type: ignore[arg-type]
            learnt.setdefault(row.source, set()).add(row.user_id or "")

    monkeypatch.setattr(dpo_stage, "train_dpo", dpo)
    monkeypatch.setattr(sft_stage, "train_sft", sft)
    monkeypatch.setattr(Workshop, "parent_folder", tmp_path)
    gold = aside(reward)
    everybody = {p.user_id for p in ROWS}
    for name in ("pairs", "rewrites", "selected", "prompts"):
        (tmp_path / name).mkdir()
    tables.write(tmp_path / "prompts" / "prompts.parquet", Prompt, [])
    tables.write(tmp_path / "pairs" / "pairs.parquet", Preference, ROWS)
    tables.write(tmp_path / "rewrites" / "rewrites.parquet", Example, [example(p, "rewrite") for p in ROWS])
    tables.write(tmp_path / "selected" / "examples.parquet", Example, [example(p, "user") for p in ROWS])
    folders = {
        "judge": reward,
        "model": tmp_path,
        **{n: tmp_path / n for n in ("pairs", "rewrites", "selected", "prompts")},
    }
    shop = Workshop(Workspace(tmp_path), FlywheelConfig(), None, None, 1)
    herding.train_dpo(shop, Work(tmp_path, 1, folders))  # type: ignore[arg-type]
    herding.train_sft(shop, Work(tmp_path, 1, folders))  # type: ignore[arg-type]
    assert gold
    assert learnt == dict.fromkeys(("dpo", "rewrite", "user"), everybody - gold)


def test_who_is_set_aside_is_part_of_what_the_policy_learns_from(tmp_path: Path) -> None:
    """The reward stage is an input of SFT and DPO, so that another share makes other models of them."""
    space = init(tmp_path / "shop", "tiny")
    made = {}
    for share in (0.0, 0.25):
        reward = space.config().reward.model_copy(update={"gold_share": share})
        stages = generation.plan(space, space.config().model_copy(update={"reward": reward}), 1)
        made[share] = {stage.name: stage for stage in stages}
    for name in ("sft", "dpo"):
        assert made[0.25][name].inputs["judge"] is made[0.25]["reward"]
        assert made[0.0][name].hash != made[0.25][name].hash
    assert made[0.0]["annotate"].hash == made[0.25]["annotate"].hash


def example(p: Preference, source: str) -> Example:
    return Example(
        id=f"{source}-{p.id}", prompt_id=p.prompt_id, user_id=p.user_id, character_id="mo", source=source,
        messages=(*p.prompt, ChatMessage(role="assistant", content="I like it. You?")),
    )  # fmt: skip
