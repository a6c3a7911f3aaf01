"""Commands that read the ledger or change what serves."""

import json
import runpy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from characterflywheel import commands, ledger, workspace, worlds
from characterflywheel.errors import FlywheelError
from characterflywheel.records import Estimate
from characterflywheel.release import registry
from characterflywheel.workspace import Workspace

row: Any = runpy.run_path(str(Path(__file__).parents[1] / "report" / "report_fixture.py"))["row"]


@pytest.fixture
def made(tmp_path: Path) -> Workspace:
    return workspace.init(tmp_path / "w", "tiny")


def test_the_newest_experiment_is_shown_with_intervals_and_verdict(
    made: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger.append(made.ledger, row(1, breadth=0.01))
    ledger.append(made.ledger, row(2, breadth=0.062))
    commands.show_experiment(made, None, as_json=False)
    shown = capsys.readouterr().out
    breadth = next(line for line in shown.splitlines() if line.split()[0] == "breadth")
    assert "+6.2% [" in breadth
    assert ", n " in breadth
    assert "verdict: promote" in shown
    commands.show_experiment(made, 1, as_json=True)
    assert json.loads(capsys.readouterr().out)["breadth_lift"]["value"] == 0.01
    with pytest.raises(FlywheelError, match="no row of generation 3"):
        commands.show_experiment(made, 3, as_json=False)


def test_a_lift_that_was_not_measured_says_why() -> None:
    assert commands.percent(Estimate(value=None, n=12, reason="fewer than 500 users")) == (
        "not measured: fewer than 500 users (n 12)"
    )
    assert commands.percent(Estimate(value=-0.0312, low=-0.05, high=-0.01, n=5991)) == "-3.1% [-5.0%, -1.0%], n 5,991"


def test_a_run_whose_generations_are_complete_says_how_to_go_on(
    made: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger.append(made.ledger, row(1).model_copy(update={"samples": None}))
    commands.run(made, 1, None, commands.Meet(worlds.people_of, worlds.oracle_of))
    out = capsys.readouterr().out
    assert out.startswith(f"1 complete; the next: flywheel run {made.root} --generations 2\n")
    assert out.endswith("index.html\n")


def test_a_plan_of_what_was_turned_says_from_where_new_settings_count(
    made: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.plan(made, 1)
    assert "not turned again" not in capsys.readouterr().out
    ledger.append(made.ledger, row(1))
    commands.plan(made, 1)
    out = capsys.readouterr().out
    assert "generation 1 was turned with other settings and is not turned again" in out
    assert f"`flywheel run {made.root} --generations 2`" in out


def test_what_the_gate_stopped_is_not_promoted_by_accident(made: Workspace) -> None:
    held = row(1)
    ledger.append(made.ledger, held.model_copy(update={"gate": held.gate.model_copy(update={"decision": "hold"})}))
    with pytest.raises(FlywheelError, match=r"the gate said hold to generation 1 .*--against-gate"):
        commands.promote(made, 1, "liked it", against_gate=False)
    assert registry.read(made.registry).history == ()


def test_rollback_puts_the_model_before_back(made: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    at = datetime(2026, 1, 5, tzinfo=UTC)
    for number in (1, 2):
        release = registry.Release(generation=number, model=f"V{number}", folder=f"artifacts/rl-{number}")
        registry.promote(made.registry, release, "verdict", at)
    commands.rollback(made, "complaints")
    assert capsys.readouterr().out == "in service: V1 (generation 1)\n"
    assert registry.read(made.registry).history[-1].reason == "complaints"
