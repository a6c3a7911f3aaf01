"""A few kills of the whole service under load, as `benchmarks/nothing_lost.py` does a hundred times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from live_service import BENCHMARKS, servers


@pytest.mark.parametrize("database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_nothing_acknowledged_over_http_is_lost_or_doubled(tmp_path: Path, database: str, kills: int) -> None:
    if database == "postgresql" and not servers.has_postgres():
        pytest.skip("PostgreSQL's programs (initdb, pg_ctl) are not on this machine")
    figures = tmp_path / "figures.json"
    command = [
        sys.executable,
        "-W",
        "error",
        str(BENCHMARKS / "nothing_lost.py"),
        "--kills",
        str(kills),
        "--database",
        database,
    ]
    done = subprocess.run([*command, "--json", str(figures)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert (found["missing"], found["duplicates"], found["kills"]) == (0, 0, kills)
    assert found[database]["turns_acknowledged"] > 10 * kills
    assert found[database]["refused"] == 0
