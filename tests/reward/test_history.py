import shutil
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from reward_fixture import Letters, pairs, tiny_policy
from safetensors.torch import load_file, save_file

from characterflywheel import tables
from characterflywheel.config import RewardConfig
from characterflywheel.pipeline import Work
from characterflywheel.records import Preference
from characterflywheel.reward.composite import RewardModels
from characterflywheel.reward.history import Past, Preferences, matrix, taught_by
from characterflywheel.reward.stage import train_rewards
from characterflywheel.reward.summary import Cell, RewardSummary

CONFIG = RewardConfig(layers=2, epochs=3, learning_rate=3e-3, max_prompt_tokens=64, max_reply_tokens=24)


class Generation(NamedTuple):
    past: Past
    summary: RewardSummary
    pairs: list[Preference]


def asked_by(generation: int) -> list[Preference]:
    """The fixture's pairs by people of this generation; in the second one, two people of the first come back."""
    rows = []
    for row in pairs():
        back = generation == 2 and row.user_id in ("user-0", "user-9")
        user = row.user_id if back else f"{row.user_id}-of-{generation}"
        rows.append(row.model_copy(update={"id": f"{row.id}-{generation}", "user_id": user}))
    return [r.model_copy(update={"user_id": r.user_id.removesuffix("-of-1")}) for r in rows]


@pytest.fixture(scope="module")
def generations(tmp_path_factory: pytest.TempPathFactory) -> list[Generation]:
    root = tmp_path_factory.mktemp("generations")
    policy, made = tiny_policy(root / "policy"), []
    for number in (1, 2, 3):
        past = Past(number, root / f"reward-{number}", root / f"annotate-{number}")
        rows = asked_by(number)
        past.rewards.mkdir()
        past.pairs.mkdir()
        tables.write(past.pairs / "pairs.parquet", Preference, rows)
        before = [one.past for one in made]
        summary = train_rewards(
            Work(past.rewards, number), CONFIG, rows, [], [], policy, Letters(),
            generation=number, past=before, threads=1,
        )  # fmt: skip
        made.append(Generation(past, summary, rows))
    return made


def of(cells: tuple[Cell, ...], models: int, on: int) -> Cell:
    return next(cell for cell in cells if (cell.models, cell.pairs) == (models, on))


def test_every_generation_on_every_set(generations: list[Generation]):
    sizes = [len(one.summary.history) for one in generations]
    assert sizes == [1, 4, 9]
    cells = generations[2].summary.history
    assert {(cell.models, cell.pairs): cell.standing for cell in cells} == {
        (1, 1): "own", (1, 2): "next", (1, 3): "later",
        (2, 1): "past", (2, 2): "own", (2, 3): "next",
        (3, 1): "past", (3, 2): "past", (3, 3): "own",
    }  # fmt: skip
    for one in generations:
        own = of(cells, one.past.generation, one.past.generation)
        assert own.pointwise == one.summary.pointwise_accuracy
        assert own.pairwise == one.summary.pairwise_accuracy
        assert own.left_out == 0
    # what was measured once is carried
    assert generations[1].summary.history == tuple(c for c in cells if 3 not in (c.models, c.pairs))


def test_the_ledger_gets_the_accuracy_on_the_new_policy(generations: list[Generation]):
    for before, one in pairwise(generations):
        cell = of(one.summary.history, before.past.generation, one.past.generation)
        assert one.summary.quality().new_policy == cell.pointwise


def test_a_cell_is_what_the_saved_models_say_of_people_they_have_not_met(generations: list[Generation]):
    models = RewardModels.load(generations[1].past.rewards, Letters(), threads=1)
    met = {"user-0"}  # user-9's pairs were held out from the second generation's models as from the first's
    assert taught_by(generations[1].pairs) & taught_by(generations[0].pairs) == met
    held_out = [p for p in generations[0].pairs if p.held_out and p.user_id not in met]
    sides = [(p.prompt, p.chosen[-1].content, p.rejected[-1].content) for p in held_out]
    cell = of(generations[2].summary.history, 2, 1)
    for model, found in ((models.pointwise, cell.pointwise), (models.pairwise, cell.pairwise)):
        right = [p > 0.5 for p in model.prefers(*(list(side) for side in zip(*sides, strict=True)))]
        assert found.value == pytest.approx(sum(right) / len(right))
        assert found.n == len(held_out)


def test_pairs_of_people_who_taught_the_models_are_left_out(generations: list[Generation]):
    last = generations[1]
    models = RewardModels.load(last.past.rewards, Letters(), threads=1)
    everyone = frozenset(p.user_id for p in generations[0].pairs)
    own = Preferences(models.pointwise, models.pairwise, frozenset(sorted(everyone)[:-1]))
    held_out = [p for p in last.pairs if p.held_out]
    cell = of(matrix(2, own, held_out, [generations[0].past], threads=1), 2, 1)
    total = sum(p.held_out for p in generations[0].pairs)
    assert cell.left_out + cell.pointwise.n == total
    assert cell.left_out > 0


def test_a_past_model_with_damaged_weights_stops_nothing_and_its_reason_is_not_carried(
    generations: list[Generation], tmp_path: Path
):
    """Not a number in every weight: it loads, and refuses to score. Once it is mended, it is measured."""
    first, second = generations[0], generations[1]
    models = RewardModels.load(second.past.rewards, Letters(), threads=1)
    own = Preferences(models.pointwise, models.pairwise, taught_by(second.pairs))
    held_out = [p for p in second.pairs if p.held_out]
    damaged = tmp_path / "reward-1"
    shutil.copytree(first.past.rewards, damaged)
    (damaged / "evaluation.json").write_text(first.summary.model_copy(update={"history": ()}).model_dump_json())
    weights = load_file(damaged / "pointwise" / "model.safetensors")
    save_file(
        {k: v * float("nan") for k, v in weights.items()}, damaged / "pointwise" / "model.safetensors", {"format": "pt"}
    )
    cells = matrix(2, own, held_out, [first.past._replace(rewards=damaged)], threads=1)
    lost = of(cells, 1, 2)
    assert lost.pointwise.value is None
    assert lost.pointwise.reason.startswith("generation 1's models cannot be read by this version: ")
    assert of(cells, 2, 1).pointwise == of(second.summary.history, 2, 1).pointwise
    shutil.rmtree(damaged)
    shutil.copytree(first.past.rewards, damaged)
    (damaged / "evaluation.json").write_text(first.summary.model_copy(update={"history": cells}).model_dump_json())
    again = matrix(2, own, held_out, [first.past._replace(rewards=damaged)], threads=1)
    assert of(again, 1, 2) == of(second.summary.history, 1, 2)


def test_what_cannot_be_read_says_so_and_stops_nothing(generations: list[Generation], tmp_path: Path):
    first, second = generations[0], generations[1]
    (tmp_path / "evaluation.json").write_text('{"written": "by another version"}')
    models = RewardModels.load(second.past.rewards, Letters(), threads=1)
    own = Preferences(models.pointwise, models.pairwise, taught_by(second.pairs))
    held_out = [p for p in second.pairs if p.held_out]
    broken = first.past._replace(rewards=tmp_path)
    cells = matrix(2, own, held_out, [broken], threads=1)
    assert len(cells) == 4
    lost = of(cells, 1, 2)
    assert lost.pointwise.value is None
    assert lost.pointwise.reason.startswith("generation 1's models cannot be read by this version: ")
    assert of(cells, 2, 1).pointwise == of(second.summary.history, 2, 1).pointwise
    (tmp_path / "pairs.parquet").write_text("no table")
    unread = matrix(2, own, held_out, [first.past._replace(pairs=tmp_path)], threads=1)
    assert of(unread, 2, 1).pointwise.reason == "nothing to measure"
    gone = matrix(2, own, held_out, [first.past._replace(pairs=tmp_path / "gone")], threads=1)
    assert of(gone, 2, 1).pointwise.reason == "nothing to measure"
