"""From the event store's tables, through its export, to the metrics: the columns are those that the store writes."""

from pathlib import Path

from experiment_exports import START
from test_metrics import CONFIG, small_world

from characterflywheel.experiment import metrics
from characterflywheel.records import Character, Conversation, Instruction
from characterflywheel.store import EventStore, Position


def test_an_export_of_the_store_gives_the_same_moments(tmp_path: Path) -> None:
    events = small_world()
    character = Character(
        id="baker", name="Baker", category="home", traits=("warm",), greeting="Hello!",
        instructions=(Instruction(text="Talk of bread."),),
    )  # fmt: skip
    with EventStore.open(tmp_path / "flywheel.db") as store:
        store.add_characters([character])
        store.add_users(events.users)
        store.add_conversations(
            Conversation(
                id=f"c-{user.id}", user_id=user.id, character_id="baker", character_version=1, source="user",
                created_at=START,
            )
            for user in events.users
        )  # fmt: skip
        store.append(messages=events.messages, exposures=events.exposures)
        nothing = Position(messages=0, signals=0, exposures=0)
        store.export(tmp_path / "export", nothing, store.position(), consenting_only=False)
    stored = metrics.observe(tmp_path / "export", "g1", CONFIG)
    assert stored == metrics.observe(events.write(tmp_path / "direct"), "g1", CONFIG)
    assert stored.moments["treatment"].sums["messages"] == 6
