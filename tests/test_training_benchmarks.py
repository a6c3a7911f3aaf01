"""The benchmarks of training run from their command lines and write the ratios that the documents quote."""

import importlib.util
from pathlib import Path

import pytest

from test_benchmarks import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs the trl package"),
]
TINY = ("--model", "tiny", "--threads", "1", "--repeats", "1")
chats = pytest.mark.skipif(
    importlib.util.find_spec("chitchat_dataset") is None, reason="needs the chitchat-dataset package"
)


def test_grpo_step(tmp_path: Path) -> None:
    """Both sides draw and learn as many tokens, and agree on loss and gradient."""
    figures, printed = run(
        "grpo_step.py", tmp_path, *TINY, "--prompts", "2", "--replies", "2", "--reply-tokens", "4", "--long", "120",
        "--short", "80", "--peers", "autocast,8,checkpointing", "float32,4,plain",
    )  # fmt: skip
    assert figures["agreement"]["loss_difference"] < 1e-5
    assert figures["agreement"]["gradient_difference"] < 1e-4
    for case, size in (("long", 120), ("short", 80)):
        found = figures["cases"][case]
        assert found["prompt_tokens"] == size
        seconds = {name: side["seconds"] for name, side in found["sides"].items()}
        assert figures[f"speedup_{case}_prompt"] == pytest.approx(seconds[found["fastest_peer"]] / seconds["ours"])
        for side in found["sides"].values():
            assert side["figures"][0]["tokens"] == 2 * 2 * 4
            assert sum(side["parts"].values()) == pytest.approx(side["seconds"])
            assert min(side["parts"][part] for part in ("sampling", "scoring", "forward", "backward")) > 0
            assert side["peak_bytes"] > 2**20
    assert "peak GiB" in printed


@chats
def test_sft_step(tmp_path: Path) -> None:
    """An epoch has the same learnt tokens for all, however they are batched, and the losses are alike."""
    figures, _ = run(
        "sft_step.py", tmp_path, *TINY, "--examples", "8", "--step", "4", "--peers", "autocast,8,checkpointing",
        "autocast,1,plain,packed",
    )  # fmt: skip
    sides = figures["sides"]
    assert {side["figures"][0]["tokens"] for side in sides.values()} == {figures["data"]["reply_tokens"]}
    assert sides["ours"]["figures"][0]["loss"] == pytest.approx(
        sides["autocast,8,checkpointing"]["figures"][0]["loss"], abs=0.1
    )
    seconds = {name: side["seconds"] for name, side in sides.items()}
    assert figures["speedup"] == pytest.approx(seconds["autocast,8,checkpointing"] / seconds["ours"])
    assert figures["speedup_packed"] == pytest.approx(seconds["autocast,1,plain,packed"] / seconds["ours"])
    assert figures["speedup_float32"] is None


@chats
def test_dpo_step(tmp_path: Path) -> None:
    """The reference's pass is charged to whoever made it beforehand."""
    figures, _ = run(
        "dpo_step.py", tmp_path, *TINY, "--pairs", "4", "--step", "4", "--peers", "autocast,8,checkpointing",
        "autocast,8,plain,precomputed",
    )  # fmt: skip
    sides = figures["sides"]
    assert len({side["figures"][0]["tokens"] for side in sides.values()}) == 1
    assert {name for name, side in sides.items() if side["parts"].get("reference", 0) > 0} == {
        "ours", "autocast,8,plain,precomputed",
    }  # fmt: skip
    seconds = {name: side["seconds"] for name, side in sides.items()}
    assert figures["speedup_precomputed"] == pytest.approx(seconds["autocast,8,plain,precomputed"] / seconds["ours"])
