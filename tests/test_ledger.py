"""The ledger is sorted, idempotent by generation, atomic, and names a bad line."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from characterflywheel import ledger
from characterflywheel.errors import FlywheelError
from characterflywheel.records import Estimate


def row(generation: int, verdict: ledger.Verdict | None = "keep") -> ledger.LedgerRow:
    half = Estimate(value=0.5, low=0.4, high=0.6, n=40)
    judged = ledger.JudgedWinRate(pointwise=half, pairwise=half)
    compared = ledger.Compared(value=0.5, low=0.4, high=0.6, n=40, before=half)
    return ledger.LedgerRow(
        generation=generation,
        model=f"V{generation}",
        parent=f"V{generation - 1}",
        seed=1,
        people="simulated",
        stages={"curate": "curate-000000000000"},
        reward=ledger.RewardQuality(pointwise_accuracy=half, pairwise_accuracy=half),
        win_rate=ledger.WinRates(internal=judged, user=judged),
        production={},
        steerability=ledger.Steerability(instruction_following=compared, instruction_violation=compared),
        gate=ledger.Gate(decision="ship"),
        verdict=verdict,
    )


def test_a_missing_ledger_has_no_rows(tmp_path: Path) -> None:
    assert ledger.read(tmp_path / "ledger.jsonl") == []


@settings(max_examples=15, deadline=None)
@given(order=st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_any_order_of_writing_gives_the_same_bytes(order: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    for generation in order:
        ledger.append(folder / "a.jsonl", row(generation))
    for generation in sorted(set(order)):
        ledger.append(folder / "b.jsonl", row(generation))
    assert (folder / "a.jsonl").read_bytes() == (folder / "b.jsonl").read_bytes()
    assert [r.generation for r in ledger.read(folder / "a.jsonl")] == sorted(set(order))


def test_writing_a_generation_again_replaces_it_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger.append(path, row(1, "keep"))
    ledger.append(path, row(1, "promote"))
    assert [r.verdict for r in ledger.read(path)] == ["promote"]
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.jsonl"]


def test_the_contract_of_design_section_10(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger.append(path, row(1))
    found = json.loads(path.read_text())
    assert {
        "generation", "parent", "stages", "reward", "win_rate", "production", "steerability", "gate", "experiment",
        "verdict", "seconds",
    } <= set(found)  # fmt: skip
    assert {"value", "low", "high", "n"} <= set(found["win_rate"]["user"]["pairwise"])
    assert {"decision", "criteria"} <= set(found["gate"])


def test_a_bad_line_and_a_double_row_are_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    line = row(1).model_dump_json()
    path.write_text(line + "\n{broken\n")
    with pytest.raises(FlywheelError, match="jsonl:2"):
        ledger.read(path)
    path.write_text(line + "\n" + line + "\n")
    with pytest.raises(FlywheelError, match="generation 1 has 2 rows"):
        ledger.read(path)
