"""A lived week: what is written, in which order, again and again the same; and the truth beside it."""

import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest_world import BAD, GOOD, STARTS, make_bank

from characterflywheel.errors import FlywheelError
from characterflywheel.experiment.assignment import assign
from characterflywheel.simulation import population
from characterflywheel.simulation.columns import uuid7_column
from characterflywheel.simulation.lore import Lore
from characterflywheel.simulation.population import live_through, set_stage
from characterflywheel.simulation.users import draw_crowd
from characterflywheel.simulation.world import SimulatedPeople
from characterflywheel.store import EventStore, Position

Rows = list[dict[str, object]]


def exported(store: EventStore, folder: Path) -> dict[str, Rows]:
    store.export(folder, Position(), store.position(), consenting_only=False)
    names = ("messages", "signals", "exposures", "users", "conversations")
    return {name: pq.read_table(folder / f"{name}.parquet").to_pylist() for name in names}


@pytest.fixture
def week(people: SimulatedPeople, store: EventStore, tmp_path: Path) -> dict[str, Rows]:
    people.live(make_bank(GOOD))
    return exported(store, tmp_path / "week")


def test_exposures_come_before_messages_and_follow_assignment(week: dict[str, Rows]) -> None:
    shares = {"control": 0.5, "treatment": 0.5}
    first = {}
    for row in week["messages"]:
        if row["role"] == "user" and row["created_at"] >= STARTS:  # type: ignore[operator]
            first.setdefault(row["user_id"], row["created_at"])
    assert len(week["exposures"]) > 100
    for row in week["exposures"]:
        assert row["arm"] == assign(str(row["user_id"]), "test", shares)
        assert row["created_at"] <= first[row["user_id"]]  # type: ignore[operator]
    assert {row["user_id"] for row in week["messages"]} == {row["user_id"] for row in week["exposures"]}


def test_replies_are_the_bank_s_and_carry_model_and_arm(week: dict[str, Rows]) -> None:
    texts = {"control": BAD, "treatment": GOOD}
    for asked, reply in zip(week["messages"][::2], week["messages"][1::2], strict=True):
        assert (asked["role"], reply["role"]) == ("user", "assistant")
        assert asked["conversation_id"] == reply["conversation_id"]
        if reply["arm"]:
            assert reply["content"] == texts[str(reply["arm"])]
            assert reply["model"] == {"control": "old", "treatment": "new"}[str(reply["arm"])]
        else:
            assert (reply["content"], reply["model"], reply["experiment"]) == (BAD, "old", None)
            assert reply["created_at"] < STARTS + timedelta(hours=8)  # type: ignore[operator]
    before = [row for row in week["messages"] if row["created_at"] < STARTS]  # type: ignore[operator]
    assert len(before) > 50, "a week of activity from before, for CUPED"
    kinds = {row["kind"] for row in week["signals"]}
    assert kinds <= {"thumb_up", "thumb_down", "love", "regenerate", "report"}
    assert kinds >= {"thumb_up"}


def test_living_again_changes_nothing(
    week: dict[str, Rows], people: SimulatedPeople, store: EventStore, tmp_path: Path
) -> None:
    people.live(make_bank(GOOD))
    assert exported(store, tmp_path / "again") == week


def test_small_arms_leave_the_others_alone(people: SimulatedPeople) -> None:
    written = people.live_and_count(make_bank(GOOD, arm_share=0.1))
    assert 20 < written.users < 90
    assert written.messages > written.users


def test_equal_arms_have_no_lift_and_better_replies_have(people: SimulatedPeople) -> None:
    same = people.true_lift(make_bank(BAD), n=2000)
    assert (same.breadth, same.depth, same.depth_all) == (0, 0, 0)
    better = people.true_lift(make_bank(GOOD), n=2000)
    assert better.breadth > 0.02
    assert better.depth_all > 0.2
    assert people.true_lift(make_bank(GOOD), n=2000) == better
    assert people.true_lift(make_bank(BAD, control=GOOD), n=2000).depth_all < -0.1


def test_luck_is_common_until_arms_differ(lore: Lore) -> None:
    stage = set_stage(make_bank(GOOD), lore.senses)
    crowd = draw_crowd(lore.real.fits, 300, "luck")
    a, b = (live_through(stage, crowd, np.full(300, arm), lore.anchor, lore.real.fits, 7, 3) for arm in (0, 1))
    before = [visits.pick(np.flatnonzero(visits.day < 0)) for visits in (a, b)]
    assert all(np.array_equal(x, y) for x, y in zip(*before, strict=True))
    assert len(b.person) > len(a.person)
    assert np.all(np.diff(a.at) >= 0)


def test_a_bank_must_answer_every_context(lore: Lore) -> None:
    bank = make_bank(GOOD)
    holes = {"control": bank.replies["control"], "treatment": (*bank.replies["treatment"][:-1], ())}
    with pytest.raises(FlywheelError, match="without a reply"):
        set_stage(type(bank)(**{**vars(bank), "replies": holes}), lore.senses)
    with pytest.raises(FlywheelError, match="one must be 'control'"):
        set_stage(type(bank)(**{**vars(bank), "replies": {"a": bank.replies["control"]}}), lore.senses)


def test_thousands_live_a_week_in_seconds(lore: Lore) -> None:
    stage = set_stage(make_bank(GOOD), lore.senses)
    crowd = draw_crowd(lore.real.fits, 5000, "many")
    begin = time.process_time()
    visits = live_through(stage, crowd, np.arange(5000) % 2, lore.anchor, lore.real.fits, 7, 1)
    assert time.process_time() - begin < 10
    assert len(visits.person) > 10_000
    assert visits.turn.max() < population.LONGEST_STAY


def test_uuids_are_version_7_with_their_time() -> None:
    times = np.array([1_767_571_200_000, 1_767_571_200_001])
    ids = uuid7_column(times, 5)
    assert ids == uuid7_column(times, 5) != uuid7_column(times, 6)
    assert [int(one.replace("-", "")[:12], 16) for one in ids] == times.tolist()
    assert all(one[14] == "7" and one[19] in "89ab" and len(one) == 36 for one in ids)
    assert len(set(uuid7_column(np.zeros(50_000, dtype=np.int64), 1))) == 50_000
