"""The benchmark of the memory plan runs from its command line and writes what it compares."""

from pathlib import Path

import pytest

from test_benchmarks import run


@pytest.mark.slow
def test_training_memory(tmp_path: Path) -> None:
    options = ("--model", "tiny", "--threads", "1", "--prompt-tokens", "20", "--reply-tokens", "4",
               "--micro-batch-tokens", "48")  # fmt: skip
    figures, printed = run("training_memory.py", tmp_path, *options)
    assert [row["way"] for row in figures["rows"]][:2] == ["all weights", "all weights, checkpointing"]
    for row in figures["rows"]:
        assert row["error"] == pytest.approx(row["predicted"]["total"] / row["measured"] - 1)
    assert figures["largest_error"] == max(abs(row["error"]) for row in figures["rows"])
    assert "predicted MiB" in printed
