"""The benchmark of RL's samplers runs from its command line and writes the figures that the documents quote."""

import importlib.util
from pathlib import Path

import pytest

from test_benchmarks import run

TINY = ("--model", "tiny", "--threads", "1", "--repeats", "1", "--replies", "2", "--reply-tokens", "4")


@pytest.mark.slow
def test_samplers(tmp_path: Path) -> None:
    figures, printed = run("samplers.py", tmp_path, *TINY)
    installed = importlib.util.find_spec("ctranslate2") is not None
    assert (figures["ctranslate2_missing"] is None) == installed
    assert len(figures["samplers"]) == (6 if installed else 4)
    for name, one in figures["samplers"].items():
        assert name in printed
        assert figures["prompts"] * 2 <= one["tokens"] <= figures["prompts"] * 2 * 4
        exact = one["float32"]
        assert exact["absolute"]["low"] <= exact["absolute"]["value"] <= exact["absolute"]["high"]
        assert 0.5 < exact["effective_share"] < 1 + 1e-6
        if "float32" in name:
            assert exact["absolute"]["value"] < 1e-5
            assert exact["kl"]["value"] < 1e-8
        else:
            assert exact["absolute"]["value"] > 1e-3, "another precision is another policy"
