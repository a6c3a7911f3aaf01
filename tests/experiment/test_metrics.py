"""Breadth and depth of hand-made events, and the SQL in other dialects."""

from pathlib import Path

import pytest
import sqlglot
from experiment_exports import Events

from characterflywheel.config import ExperimentConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.experiment import metrics

CONFIG = ExperimentConfig()


def small_world() -> Events:
    """Control: ann writes 3 messages on 2 days and 2 before, bob 1. Treatment: cat 4 on 3 days, dan 2 on one."""
    events = Events()
    events.user("ann", "control", 10)
    for hour in (-30, -8, 10, 11, 40):
        events.say("ann", hour)
    events.user("bob", "control", 12)
    events.say("bob", 12)
    events.user("cat", "treatment", 30)
    for hour in (30, 50, 80, 81):
        events.say("cat", hour)
    events.user("dan", "treatment", 5)
    events.say("dan", 5)
    events.say("dan", 6, fallback=True)
    return events


def test_hand_made_events(tmp_path: Path) -> None:
    seen = metrics.observe(small_world().write(tmp_path), "g1", CONFIG)
    control, treatment = seen.moments["control"], seen.moments["treatment"]
    assert (control.n, treatment.n) == (2, 2)
    assert control.sums == {
        "active_days": 3, "engaged": 1, "engaged_messages": 3, "fallbacks": 0, "messages": 4, "pre_active_days": 2,
        "pre_messages": 2,
    }  # fmt: skip
    assert treatment.sums == {
        "active_days": 4, "engaged": 1, "engaged_messages": 4, "fallbacks": 1, "messages": 6, "pre_active_days": 0,
        "pre_messages": 0,
    }  # fmt: skip
    assert control.products["messages", "messages"] == 9 + 1
    assert treatment.products["engaged_messages", "messages"] == 16


def test_the_window_is_each_users_own(tmp_path: Path) -> None:
    """Exposed at hour 50: hour 49 is before it, hour 50 + 7 * 24 is just outside, and 8 days before is no covariate."""
    events = Events()
    events.user("ann", "control", 50)
    for hour in (50 - 8 * 24, 49, 50, 50 + 7 * 24 - 0.01, 50 + 7 * 24):
        events.say("ann", hour)
    sums = metrics.observe(events.write(tmp_path), "g1", CONFIG).moments["control"].sums
    assert (sums["messages"], sums["pre_messages"], sums["active_days"]) == (2, 1, 2)


def test_who_is_not_counted(tmp_path: Path) -> None:
    """Testers, users outside the experiment, users of another experiment, and users who met both arms."""
    events = small_world()
    events.user("tester", "control", internal=True)
    events.user("outside", None)
    events.user("other", None)
    events.expose("other", "treatment", 1, experiment="g0")
    events.user("both", "control", 1)
    events.expose("both", "treatment", 2)
    events.expose("ann", "control", 44)  # seen again: still one user, window from the first
    for name in ("tester", "outside", "other", "both"):
        events.say(name, 3)
    seen = metrics.observe(events.write(tmp_path), "g1", CONFIG)
    assert {arm: moments.n for arm, moments in seen.moments.items()} == {"control": 2, "treatment": 2}
    assert seen.moments["control"].sums["messages"] == 4
    assert seen.crossed == 1
    assert sum(row.new_users for row in seen.days) == 4


def test_fallbacks_can_be_left_out(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"leave_out_fallbacks": True})
    sums = metrics.observe(small_world().write(tmp_path), "g1", config).moments["treatment"].sums
    assert (sums["messages"], sums["fallbacks"]) == (5, 1)


def test_messages_are_capped_at_a_pooled_quantile(tmp_path: Path) -> None:
    """With the cap at the 75th percentile of 1, 2, 3, 4 messages, the user with 4 counts as 3."""
    config = CONFIG.model_copy(update={"cap_quantile": 0.75})
    seen = metrics.observe(small_world().write(tmp_path), "g1", config)
    assert seen.cap == 3
    assert (seen.moments["control"].sums["messages"], seen.moments["treatment"].sums["messages"]) == (4, 5)


def test_days(tmp_path: Path) -> None:
    days = {(row.day, row.arm): row for row in metrics.observe(small_world().write(tmp_path), "g1", CONFIG).days}
    assert sorted(days) == [(day, arm) for day in range(4) for arm in ("control", "treatment")]
    first, second = days[0, "treatment"], days[1, "treatment"]
    assert (first.users, first.active_users, first.messages) == (1, 1, 2)
    assert (second.new_users, second.users, second.active_users) == (1, 2, 1)
    assert days[3, "control"].active_users == 0


def test_baseline_is_everyone_from_their_first_message(tmp_path: Path) -> None:
    moments = metrics.baseline(small_world().write(tmp_path), CONFIG)
    assert moments.n == 4
    assert moments.sums["messages"] == 5 + 1 + 4 + 2
    assert moments.sums["pre_messages"] == 0


def test_nobody_exposed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match="no exposed user"):
        metrics.observe(small_world().write(tmp_path), "g9", CONFIG)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match=r"messages\.parquet is missing"):
        metrics.observe(tmp_path, "g1", CONFIG)


def test_foreign_arms_are_an_error(tmp_path: Path) -> None:
    events = small_world()
    events.user("eve", "variant-b")
    with pytest.raises(FlywheelError, match="variant-b"):
        metrics.observe(events.write(tmp_path), "g1", CONFIG)


@pytest.mark.parametrize("dialect", ["postgres", "bigquery", "spark", "clickhouse"])
def test_the_definitions_transpile(dialect: str) -> None:
    statements = (
        metrics.EXPOSED, metrics.EVERYONE, metrics.ACTIVITY, metrics.PEOPLE, metrics.DAILY,
        metrics.MOMENTS.format(sums="sum(messages * messages)"),
    )  # fmt: skip
    for statement in statements:
        (text,) = sqlglot.transpile(statement, read="duckdb", write=dialect, unsupported_level=sqlglot.ErrorLevel.RAISE)
        assert "interval" in text.lower() or "interval" not in statement
