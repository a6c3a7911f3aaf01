"""The monitor finds a planted habit, leaves noise alone, and agrees with scipy."""

from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from characterflywheel.errors import FlywheelError
from characterflywheel.records import ChatMessage
from characterflywheel.style.features import FEATURES
from characterflywheel.style.monitor import Reply, compare, side

HISTORY = (ChatMessage(role="user", content="tell me something"),)
WORDS = "sun moon sea tide gull sail rope mast wind rain wave star".split()  # noqa: SIM905


def _replies(seed: int, n: int = 80, habit: str = "", rate: float = 0.0, prefix: str = "p") -> list[Reply]:
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(5, 15))).capitalize() + "." for _ in range(n)]
    return [
        Reply(f"{prefix}{i:03}", f"u{i}", HISTORY, text + (habit if rng.random() < rate else ""))
        for i, text in enumerate(texts)
    ]


def test_a_planted_emoji_habit_is_the_alarm_and_noise_is_not() -> None:
    before, after = _replies(1), _replies(2, habit=" 🌊", rate=0.4)
    rows = {row.feature: row for row in compare("checkpoints", side("old", before), side("new", after))}
    assert {name for name, row in rows.items() if row.alarm} == {"emojis", "has_emoji"}
    emojis = rows["has_emoji"]
    assert (emojis.first_mean, emojis.ratio, emojis.n, emojis.method) == (0, None, 80, "paired")
    assert emojis.low is not None
    assert emojis.low > 0.2


def test_false_discoveries_are_controlled() -> None:
    """50 comparisons of one model with itself: at a false discovery rate of 5%, about 2.5 have an alarm."""
    sides = [side("same", _replies(seed, 30)) for seed in range(51)]
    alarms = [any(row.alarm for row in compare("checkpoints", *two)) for two in pairwise(sides)]
    assert sum(alarms) <= 6


def test_paired_p_values_and_their_adjustment_are_scipys() -> None:
    before, after = _replies(3), _replies(4, habit=" And the tide, and the sea", rate=0.5)
    a, b = side("old", before), side("new", after)
    rows = compare("checkpoints", a, b)
    number = list(FEATURES).index("words")
    expected = stats.ttest_rel(b.means[:, number], a.means[:, number])
    assert rows[number].p == pytest.approx(expected.pvalue)
    assert rows[number].low == pytest.approx(expected.confidence_interval().low)
    assert [r.q for r in rows] == pytest.approx(stats.false_discovery_control([r.p for r in rows]).tolist())


def test_without_shared_prompts_it_is_welchs_test() -> None:
    a = side("old", _replies(5, 30, prefix="p"))
    b = side("new", _replies(6, 45, habit=" more of the sea", rate=0.5, prefix="q"))
    number = list(FEATURES).index("words")
    row = compare("checkpoints", a, b)[number]
    expected = stats.ttest_ind(b.means[:, number], a.means[:, number], equal_var=False)
    assert row.method == "welch"
    assert row.p == pytest.approx(expected.pvalue, rel=0.05)  # degrees of freedom are rounded


def test_a_prompt_counts_once_however_many_replies_it_has() -> None:
    once = _replies(7, 20)
    many = [reply for reply in once for _ in range(6)]
    other = side("new", _replies(8, 20))
    rows = compare("selection", side("old", once), other), compare("selection", side("old", many), other)
    assert [r.p for r in rows[0]] == pytest.approx([r.p for r in rows[1]])


def test_too_little_is_unmeasured_and_says_why() -> None:
    rows = compare("pairs", side("rejected", []), side("chosen", _replies(9, 1)))
    assert all(row.difference is None and row.reason and not row.alarm for row in rows)
    with pytest.raises(FlywheelError, match="measure them again"):
        compare("pairs", side("a", []), side("b", []), {"words": FEATURES["words"]})
