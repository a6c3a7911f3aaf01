"""A whole generation with people who are not simulated: tasks judged on the desk, an experiment lived in the service.

The model is a small random Llama, the week is written through the store as the chat service writes it, and the clock is
given; every stage, file and door is the real one.
"""

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from characterflywheel import desk, generation, ledger
from characterflywheel import workspace as workspaces
from characterflywheel.characters import bundled_characters
from characterflywheel.errors import Waiting
from characterflywheel.ids import derive_id
from characterflywheel.people import RealPeople
from characterflywheel.records import Answers, Conversation, Judgement, Message, Task, User
from characterflywheel.release import registry
from characterflywheel.serving.assignment import Assigned, Assigner
from characterflywheel.store import EventStore
from test_generation import small_model  # noqa: F401 - a fixture

SPOKEN = "I love the sea and the stars tonight what do you like ships or bread tell me more of your day friend"
SETTINGS = """
[models]
base = "{base}"
threads = 1
[gate]
held = "experiment"
win_rate_min = 0.0
max_metric_worsening = 1.0
max_steerability_worsening = 1.0
max_style_drift = 1000.0
[experiment]
arm_share = 0.5
min_users = 100
"""


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.at = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.at


class Product:
    """A live product's traffic: people who write, and rows as the chat service leaves them."""

    def __init__(self, store: EventStore, seed: int) -> None:
        self.store, self.rng = store, random.Random(seed)
        self.cast = list(bundled_characters().values())
        store.add_characters(self.cast)

    def arrive(self, users: list[User]) -> None:
        self.store.add_users(users)
        self.store.add_conversations(
            Conversation(
                id=f"c-{user.id}", user_id=user.id, character_id=self.cast[i % 12].id, source=user.population,
                character_version=self.cast[i % 12].version, created_at=user.created_at,
            )
            for i, user in enumerate(users)
        )  # fmt: skip

    def turn(self, user: User, at: datetime, arm: Assigned | None = None) -> list[Message]:
        words = " ".join(self.rng.choices(SPOKEN.split(), k=9))
        said = Message(
            id=derive_id("said", user.id, at), conversation_id=f"c-{user.id}", user_id=user.id, role="user",
            content=words, created_at=at,
        )  # fmt: skip
        served = {"model": arm.model, "experiment": arm.experiment, "arm": arm.arm} if arm else {"model": "base"}
        reply = {"id": derive_id("reply", user.id, at), "role": "assistant", "content": f"Ahoy! {words}.", **served}
        return [said, said.model_copy(update=reply)]

    def week(self, starts: datetime, users: list[User]) -> None:
        """Everybody comes on the first day; the treatment's users come back twice as often."""
        assigner = Assigner(self.store)
        for day in range(7):
            messages, exposures = [], []
            for i, user in enumerate(users):
                arm, at = assigner.arm_of(user), starts + timedelta(days=day, seconds=1 + i)
                if day and self.rng.random() > (0.4 if arm and arm.arm == "treatment" else 0.2):
                    continue
                if arm and (exposure := assigner.exposure(user.id, arm, at)):
                    exposures.append(exposure)
                    assigner.exposed(exposure)
                messages += self.turn(user, at, arm)
            self.store.append(messages=messages, exposures=exposures)


def judge(annotation: Path, folder: Path) -> None:
    """Annotators answer every open task, and rewrite."""
    desk.export(annotation, folder / "tasks.jsonl")
    answers = []
    for line in (folder / "tasks.jsonl").read_text().splitlines():
        task = Task.model_validate_json(line)
        order = sorted(task.candidates, key=lambda candidate: -len(candidate.text))
        answers.append(
            Judgement(
                id=f"j-{task.id}", task_id=task.id, prompt_id=task.prompt_id, reviewer=task.reviewer, seconds=9.0,
                answers=tuple(Answers(candidate_id=c.id, false_refusal=False, templated=False) for c in order),
                ranking=tuple(c.id for c in order), rewrite="Ahoy my friend, tell me more of the sea and your day.",
                created_at=datetime.now(UTC),
            ).model_dump_json()
        )  # fmt: skip
    (folder / "answers.jsonl").write_text("\n".join(answers) + "\n")
    assert desk.take_in(annotation, folder / "answers.jsonl", folder / "rejected").accepted == len(answers)


@pytest.mark.slow
def test_a_generation_on_real_people_goes_through_to_a_verdict(small_model: Path, tmp_path: Path) -> None:  # noqa: F811
    made = workspaces.init(tmp_path / "w", "tiny")
    text = made.config_file.read_text().replace("# world = false", "world = false")
    made.config_file.write_text(text + SETTINGS.format(base=small_model))
    config, clock = made.config(), Clock()
    before = clock.at - timedelta(days=9)
    with EventStore.open(made.events) as store:
        product, people = Product(store, 1), RealPeople(made.annotation, store, clock)
        with pytest.raises(Waiting, match="no message has come in"):
            generation.turn(made, config, store, people, 1)
        early = [
            User(id=f"early-{i}", population="user" if i % 6 else "internal", created_at=before) for i in range(120)
        ]
        product.arrive(early)
        for i, user in enumerate(early):
            times = [before + timedelta(minutes=9 * i + turn) for turn in range(product.rng.randint(1, 4))]
            store.append(messages=[message for at in times for message in product.turn(user, at)])
        with pytest.raises(Waiting, match="annotation tasks await judgement"):
            generation.turn(made, config, store, people, 1)
        judge(made.annotation, tmp_path)
        with pytest.raises(Waiting, match="gen1-against-base began"):
            generation.turn(made, config, store, people, 1)
        users = [User(id=f"user-{i}", population="user", created_at=clock.at) for i in range(600)]
        product.arrive(users)
        product.week(clock.at, users)
        clock.at += timedelta(days=7, seconds=1)
        row = generation.turn(made, config, store, people, 1)
    assert row is not None
    assert (row.people, row.verdict, row.truth) == ("real", "promote", None)
    assert row.experiment is not None
    assert sum(arm.users for arm in row.experiment.arms) == 600
    assert "continue" in row.lines["traffic"]
    in_service = registry.read(made.registry).in_service
    assert in_service is not None
    assert (in_service.model, ledger.read(made.ledger)) == ("gen1", [row])
