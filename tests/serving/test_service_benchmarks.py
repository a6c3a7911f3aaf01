"""The benchmarks of the chat service run from their command lines and write the figures that the documents quote."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_service import BENCHMARKS

from load import Plan, due_times, requests


def run(script: str, tmp_path: Path, *options: str) -> tuple[Any, str]:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-W", "error", str(BENCHMARKS / script), *options, "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(figures.read_text(encoding="utf-8")), done.stdout + done.stderr


@pytest.mark.slow
def test_gateway(tmp_path: Path) -> None:
    figures, printed = run("gateway.py", tmp_path, "--at", "20", "--stream-at", "20", "--seconds", "1", "--ramp", "1",
                           "--rates", "25", "--repeats", "1", "--delay", "0.01")  # fmt: skip
    assert "LiteLLM's proxy is left out" in printed
    assert (figures["held_rps"], figures["echo_held_rps"], figures["rows_equal"]) == (25, 25, True)
    assert figures["added_p99_ratio"] is None  # the peer was not measured
    assert [(part["rate"], part["stream"]) for part in figures["compared"]] == [(20, False), (20, True)]
    for part in figures["compared"]:
        direct, ours = part["contenders"]["direct"], part["contenders"]["flywheel"]
        assert direct["success"] == ours["success"] == 1
        assert direct["added_ms"]["p50"] == direct["added_ms"]["paired_p99"] == 0
        assert ours["added_ms"]["p50"] == pytest.approx(ours["ms"]["p50"] - direct["ms"]["p50"])
        assert 0 < ours["added_first_ms"]["p50"] <= ours["ms"]["p50"]
        assert direct["ms"]["p50"] >= 10


@pytest.mark.slow
def test_memory(tmp_path: Path) -> None:
    figures, _ = run("memory.py", tmp_path, "--conversations", "60", "--every", "20", "--people", "4")
    assert len(figures["resident_mib"]) == 4
    assert min(figures["resident_mib"]) > 20
    assert figures["growth_ratio"] == pytest.approx(figures["resident_mib"][-1] / figures["resident_mib"][2])


def test_load_is_what_was_planned() -> None:
    plan = Plan("http://127.0.0.1:1/v1", rate=200, seconds=10, seed=3, users=7)
    due = due_times(plan)
    assert len(due) == 2000
    assert (np.diff(due) >= 0).all()
    assert np.diff(due).std() == pytest.approx(1 / 200, rel=0.1)  # as of exponential gaps
    assert (due == due_times(plan)).all()
    made = requests(plan, 20)
    assert len(set(made)) == 20
    assert len({json.loads(one.partition(b"\r\n\r\n")[2])["user"] for one in made}) == 7
