"""benchmarks/herding.py: what it makes of finished runs. Turning its worlds takes hours and is no test."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
herding = pytest.importorskip("herding")


def run(utility: dict[str, float], alarms: list[tuple[int, str, str]] | None = None) -> "herding.Run":
    return herding.Run(utility, 12.0, [(0.0, 1.0, 9.0), (0.5, 1.1, 9.5)], alarms or [], 1.0)


def test_gain_is_students_over_seeds_of_differences_paired_by_prompt() -> None:
    draw = np.random.default_rng(0)
    a, b = ({s: run({f"p{i}": float(draw.normal()) for i in range(20)}) for s in (1, 2, 3, 4)} for _ in range(2))
    mean, each = herding.gain(a, b)
    assert each == pytest.approx([a[s].mean - b[s].mean for s in (1, 2, 3, 4)])
    expected = stats.ttest_1samp(each, 0).confidence_interval(0.95)
    assert (mean.low, mean.high, mean.n) == (pytest.approx(expected.low), pytest.approx(expected.high), 4)


def test_only_seeds_of_both_arms_are_compared() -> None:
    mean, each = herding.gain({1: run({"p": 1.0}), 2: run({"p": 5.0})}, {1: run({"p": 0.5}), 3: run({"p": 9.0})})
    assert each == [0.5]
    assert herding.said(mean) == "-" or mean.low is None  # one seed has no interval


def test_a_kept_run_is_read_back_as_it_was(tmp_path: Path) -> None:
    """A finished arm is not run again; lists of JSON become the tuples that they were."""
    made = run({"p": 1.0}, [(4, "win_rate", "warn")])
    file = tmp_path / "grpo1.json"
    file.write_text(herding.json.dumps(made._asdict()), encoding="utf-8")
    assert herding.kept(file, "grpo", start=None, args=None) == made


def test_a_row_has_each_seed_and_the_rewards_rise() -> None:
    name, first, second, mean, up, words, alarms = herding.row(
        "grpo", {1: run({"p": 1.0}, [(4, "kl", "stop")])}, [1, 2]
    )  # fmt: skip
    assert (name, first, second, mean, up, words, alarms) == ("grpo", 1.0, None, 1.0, 0.5, 12.0, "4:kl")
