"""The benchmark of the model backends runs and writes its figures."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "backends.py"


def test_it_measures_every_contender(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-W", "error", str(SCRIPT), "--requests", "8", "--repeats", "1", "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spent = json.loads(figures.read_text(encoding="utf-8"))["microseconds"]
    assert all(len(rounds) == 1 and rounds[0] > 0 for rounds in spent.values())
    assert spent["endpoint, guarded"][0] < spent["openai"][0]
