"""The benchmark of the scoring server runs from its command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scoring_server.py"
TINY = ("--model", "tiny", "--layers", "2", "--threads", "1", "--repeats", "1", "--seconds", "0.5", "--replies", "2")


@pytest.mark.slow
def test_scoring_server_benchmark(tmp_path: Path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), *TINY, "--clients", "1", "2", "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert found["difference"] < 1e-6
    assert [(r["clients"], r["prompts"]) for r in found["rows"][::3]] == [
        (1, "own"),
        (1, "one"),
        (2, "own"),
        (2, "one"),
    ]
    for row in found["rows"]:
        assert row["n"] > 0
        assert row["replies_per_s"] == pytest.approx(2 * row["requests_per_s"])
        assert 0 < row["p50_ms"] <= row["p99_ms"]
    assert "largest difference" in done.stdout
