"""The small model: its n-grams against a plain reference, its shape, and that it is what the decision page says."""

import asyncio
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from characterflywheel.config import SafetyConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.safety.moderator import make_moderator
from characterflywheel.safety.small_model import BITS, LENGTHS, STRIDE, WEIGHTS, WINDOW, SmallModel, ngrams

DATA = Path(__file__).parents[2].parent / "shared" / "data"
MODEL = SmallModel(SafetyConfig().model_threshold)


def reference(plain: str, seed: int) -> list[int]:
    """FNV-1a from `seed` over every byte n-gram of the text between spaces, mixed and cut to 16 bits, in Python."""
    data, found = f" {plain} ".encode(), []
    for length in LENGTHS:
        for start in range(len(data) - length + 1):
            hashed = seed
            for byte in data[start : start + length]:
                hashed = (hashed ^ byte) * 16777619 % 2**32
            found.append(((hashed ^ hashed >> 15) * 2654435761 % 2**32) >> (32 - BITS))
    return found


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
def test_ngrams_are_those_of_a_plain_reference(text: str) -> None:
    assert ngrams(text, "text").tolist() == reference(text, 1)
    assert ngrams(text, "context").tolist() == reference(text, 2)


def test_probability_is_the_logistic_of_the_weights() -> None:
    with np.load(WEIGHTS) as file:
        text, context, bias = (file[name].astype(float) for name in ("text", "context", "bias"))
        assert "Apache-2.0" in str(file["about"])
    said, before = reference("that is nice", 1), reference("hello there", 2)
    logit = text[said].sum() / math.sqrt(len(said)) + context[before].sum() / math.sqrt(len(before)) + bias
    assert MODEL.probability("That is  NICE", "hello there") == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-5)
    assert WEIGHTS.stat().st_size < 1_000_000


@given(st.text(max_size=200), st.text(max_size=200))
def test_it_answers_whatever_is_said(text: str, context: str) -> None:
    assert 0 < MODEL.probability(text, context) < 1
    assert MODEL("", "") == ()


def test_a_long_text_is_as_harmful_as_its_worst_window() -> None:
    bad = "you should take two of these pills a day with antibiotics and you will be fine, it is a viral infection. "
    nice = "we went to the beach and had such a lovely time in the sun with our friends. "
    long = nice * (3 * WINDOW // len(nice))
    assert MODEL.probability(long + bad * 3, "") > MODEL.probability(long, "") + 0.05
    assert MODEL.probability(long[:WINDOW], "") <= MODEL.probability(long[: WINDOW + STRIDE], "") + 1e-9


def test_the_moderator_asks_it_where_configured() -> None:
    moderator = make_moderator(SafetyConfig(classifiers=("rules", "model"), model_threshold=1e-6))
    assert asyncio.run(moderator.check("hello")).categories == ("unsafe",)
    assert [judge.name for judge in moderator.judges] == ["rules", "model"]
    assert [judge.name for judge in make_moderator(SafetyConfig()).judges] == ["rules"]


def test_weights_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match="install the package again"):
        SmallModel(0.5, tmp_path / "none.npz")
    short = tmp_path / "short.npz"
    np.savez(short, text=np.zeros(4), context=np.zeros(4), bias=0.0)
    with pytest.raises(FlywheelError, match="train it again"):
        SmallModel(0.5, short)


@pytest.mark.skipif(not DATA.exists(), reason="real data (../shared/data) is not on this machine")
def test_it_is_worth_what_the_decision_page_says() -> None:
    rows = [row for row in pq.read_table(DATA / "diasafety.parquet").to_pylist() if row["split"] == "val"]
    refused = np.array([bool(MODEL(row["response"], row["context"])) for row in rows])
    unsafe = np.array([row["label"] == "unsafe" for row in rows])
    assert refused[unsafe].mean() == pytest.approx(0.155, abs=0.01)
    assert refused[~unsafe].mean() == pytest.approx(0.010, abs=0.005)
