"""Every benchmark runs from its command line and writes the ratios that the documents quote."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ("--model", "tiny", "--threads", "1", "--repeats", "1", "--prompt-tokens", "20", "--replies", "2",
        "--reply-tokens", "4")  # fmt: skip


def run(script: str, tmp_path: Path, *options: str) -> tuple[Any, str]:
    """The figures that a benchmark wrote, and what it printed."""
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-W", "error", str(BENCHMARKS / script), *options, "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(figures.read_text(encoding="utf-8")), done.stdout


def test_shared_prefix(tmp_path: Path) -> None:
    figures, printed = run("shared_prefix.py", tmp_path, *TINY)
    assert [row["dtype"] for row in figures["rows"]] == ["float32", "bfloat16"]
    assert figures["loss_difference"] < 1e-5
    assert figures["gradient_difference"] < 1e-5
    for row in figures["rows"]:
        shared, padded, lean = row["seconds"].values()
        assert row["speedup"] == pytest.approx(padded / shared)
        assert row["speedup_reply_logits_only"] == pytest.approx(lean / shared)
        assert [len(rounds) for rounds in row["seconds_all"].values()] == [1, 1, 1]
    assert figures["speedup"] == figures["rows"][0]["speedup"]
    assert figures["versions"]["torch"] in printed
    assert "--prompt-tokens 20" in figures["command"]


def test_sampling(tmp_path: Path) -> None:
    figures, printed = run("sampling.py", tmp_path, *TINY, "--prompts", "3", "--shared-prompts", "2")
    installed = importlib.util.find_spec("ctranslate2") is not None
    assert (figures["ctranslate2_missing"] is None) == installed
    assert {name: (case["prompts"], case["replies"]) for name, case in figures["cases"].items()} == {
        "separate_prompts": (3, 1),
        "shared_prompts": (2, 2),
    }
    for case in figures["cases"].values():
        speed = case["tokens_per_second"]
        assert case["ratios"]["native/generate"] == pytest.approx(speed["native"] / speed["generate"])
        assert set(case["ratios"]) == {"ctranslate2/generate", "native/generate", "native/ctranslate2"}
        assert (case["ratios"]["ctranslate2/generate"] is not None) == installed
        for tokens in case["tokens"].values():
            assert case["prompts"] * case["replies"] <= tokens[0] <= 4 * case["prompts"] * case["replies"]
    assert "native/generate" in printed


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("chitchat_dataset") is None, reason="needs the chitchat-dataset package")
def test_continue_real(tmp_path: Path) -> None:
    figures, _ = run("continue_real.py", tmp_path, "--seeds", "1", "--keep", "0.002")
    assert set(figures["auc"]) >= {"signal model", "TF-IDF + LR", "length only"}
    assert figures["ratio_above_chance_to_tfidf"] > 0
