"""What a model was trained on leads an erasure to it, also where a set of examples named the person."""

from pathlib import Path

import erasure_fixture as made
from characterflywheel import erase, tables
from characterflywheel.config import SFTConfig
from characterflywheel.records import ChatMessage, Example
from characterflywheel.training.mixture import MixtureRow, blend, write
from characterflywheel.training.sources import Lost

ANNA, BOB = "anna-1990@example.org", "bob-1984@example.org"
SAID = {ANNA: ["My grandmother kept bees.", "yes"], BOB: ["Nobody has seen my kites.", "yes"]}


def told(user: str | None, text: str) -> Example:
    """An example of a file, which none of the workspace's tables leads to."""
    messages = (ChatMessage(role="user", content="Well?"), ChatMessage(role="assistant", content=text))
    return Example(
        id=f"of-{text}", prompt_id="of a file", user_id=user, character_id=None, source="adhoc", messages=messages
    )


def test_an_erasure_finds_the_mixture_and_the_model_that_learnt_from_it(tmp_path: Path) -> None:
    """`other_sft` was made from nothing of the workspace, but its mixture names both."""
    space = made.build(tmp_path / "w", SAID)
    other, sft = (space.artifacts / made.FOLDERS[name] for name in ("other_sft", "sft"))
    config = SFTConfig(weights={"adhoc": 1.0}, epochs=1)
    write(other, config, 1, blend(config, [told(ANNA, "a"), told(BOB, "b"), told(None, "c")], 1))
    write(sft, config, 1, blend(config, [told(BOB, "d")], 1, refused=[Lost.of(told(ANNA, "e"), "evaluation_user")]))
    made.finish("other_sft", other)
    made.finish("sft", sft)
    done = erase.forget(space, ANNA)
    assert done.proof.left == ()
    left = tables.read(other / "mixture.parquet", MixtureRow)
    assert sorted(row.user_id or "" for row in left) == ["", BOB]
    assert [row.user_id for row in tables.read(sft / "mixture.parquet", MixtureRow)] == [BOB]
    why = {model.folder.removeprefix("artifacts/"): model.why for model in done.models}
    assert why[other.name] == "1 rows of its mixture"
    done = erase.forget(space, BOB)
    assert tables.read(sft / "mixture.parquet", MixtureRow) == []
    assert len(tables.read(other / "mixture.parquet", MixtureRow)) == 1
