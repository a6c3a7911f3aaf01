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


@pytest.mark.slow
def test_reward_scoring(tmp_path: Path) -> None:
    """Two backbones, two workloads, two types; an encoder's peer has a row more: its ordinary full mask."""
    figures, printed = run("reward_scoring.py", tmp_path, *TINY, "--encoder", "tiny", "--prompts", "2")
    rows = figures["rows"]
    assert len(rows) == 2 * 2 * (3 + 4)
    assert figures["max_abs_diff"] < 1e-4
    assert figures["minilm_max_abs_diff"] < 1e-4
    assert figures["many_max_abs_diff"] < 1e-4
    assert figures["minilm_many_max_abs_diff"] < 1e-4
    by_name = {tuple(row[key] for key in ("backbone", "workload", "dtype", "contender")): row for row in rows}
    packed = by_name["llama", "one prompt", "float32", "shared prefix, packed"]
    padded = by_name["llama", "one prompt", "float32", "padded"]
    assert figures["speedup"] == packed["speedup"] == pytest.approx(padded["seconds"] / packed["seconds"])
    assert packed["work"] < padded["work"]
    assert figures["packed_bytes"]["float32"] == 2 * figures["packed_bytes"]["bfloat16"] > 0
    assert "padded, full mask" in printed


@pytest.mark.slow
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
def test_signals_real(tmp_path: Path) -> None:
    figures, printed = run("signals_real.py", tmp_path, "--only", "chitchat", "--seeds", "2", "--keep", "0.002")
    auc = figures["chitchat"]["auc"]
    assert set(auc) >= {"signal model", "signal model, reply only", "TF-IDF + LR", "length only"}
    for name, area in auc.items():
        assert area["mean"]["low"] < area["mean"]["value"] < area["mean"]["high"]
        assert len(area["splits"]) == 2
        assert name in printed
