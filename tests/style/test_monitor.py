"""The monitor finds a planted habit, leaves noise alone, and agrees with scipy."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from characterflywheel.errors import FlywheelError
from characterflywheel.records import ChatMessage
from characterflywheel.style.features import FEATURES, Feature
from characterflywheel.style.monitor import MIN_PROMPTS, Reply, Side, compare, side

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


def test_no_alarm_is_told_beside_an_interval_that_holds_zero() -> None:
    """Of two replies to each of 40 prompts, one says sorry at 8 prompts, then none. The t test of the means is sure;
    Newcombe's interval, which takes a mean of two flags for one flag, is not: -0.1 + hypot(0.0876, 0.0604) > 0.
    """
    names = tuple(map(str, range(40)))
    flags = np.array([[1.0, 0.0]] * 8 + [[0.0, 0.0]] * 32)
    sides = [Side(name, names, names, x.mean(1)[:, None], x.reshape(-1, 1)) for name, x in
             (("first", flags), ("second", 0 * flags))]  # fmt: skip
    (row,) = compare("selection", *sides, {"sorry": FEATURES["sorry"]})
    assert row.q == pytest.approx(stats.ttest_1samp(flags.mean(1), 0).pvalue)
    assert (row.q < 0.05, row.difference, row.alarm) == (True, pytest.approx(-0.1), False)
    assert row.effect == pytest.approx(-0.1 / np.sqrt(0.05 * 0.95))
    assert row.high == pytest.approx(-0.1 + np.hypot(0.0876, 0.0604), abs=1e-3)


@pytest.mark.parametrize("shared", [True, False])
def test_a_handful_of_prompts_that_differ_alike_is_no_alarm(shared: bool) -> None:
    """Every reply ends in "." before and in "!" after, so that a t test has no variance and takes two prompts for
    certainty. It needs `MIN_PROMPTS`; two users with a coin each would agree so in one of two."""

    def ends(name: str, n: int, mark: str) -> Side:
        prefix = "p" if shared else name
        return side(name, [Reply(f"{prefix}{i}", f"{prefix}{i}", HISTORY, f"tea{mark}") for i in range(n)])

    for n in (2, 3, MIN_PROMPTS - 1):
        rows = compare("checkpoints", ends("old", n, "."), ends("new", n, "!"))
        assert [row.feature for row in rows if row.alarm] == []
        assert any(row.q == 0 for row in rows), "what would have rung"
    rows = compare("checkpoints", ends("old", MIN_PROMPTS, "."), ends("new", MIN_PROMPTS, "!"))
    assert "exclamations" in {row.feature for row in rows if row.alarm}


def test_false_discoveries_are_controlled() -> None:
    """50 comparisons of one model with itself: at a false discovery rate of 5%, about 2.5 have an alarm."""
    sides = [side("same", _replies(seed, 30)) for seed in range(51)]
    alarms = [any(row.alarm for row in compare("checkpoints", *two)) for two in pairwise(sides)]
    assert sum(alarms) <= 6


class Drawn(NamedTuple):
    """How two sides are drawn: prompts of users, replies to each, whether both answer the same prompts."""

    prompts: int
    users: int
    replies: int
    shared: bool = True


def _drawn(how: Drawn, rng: np.random.Generator, shift: NDArray[np.float64]) -> tuple[Side, Side]:
    """Eight correlated features, skewed counts (even) and flags with rates of 3 to 50% (odd), the second side shifted.

    The latent value is 0.5 of the user, 0.6 of the prompt, 0.4 of the reply (all its features), the rest noise.
    """
    width, rates = len(shift), np.tile([0.03, 0.1, 0.3, 0.5], 2)[: len(shift) // 2]
    owner = np.sort(rng.integers(how.users, size=how.prompts))

    def common() -> NDArray[np.float64]:
        users, prompts = rng.standard_normal((how.users, width)), rng.standard_normal((how.prompts, width))
        return 0.5 * users[owner] + 0.6 * prompts

    def one(name: str, latent: NDArray[np.float64], prefix: str) -> Side:
        size = (how.prompts, how.replies)
        z = latent[:, None] + 0.4 * rng.standard_normal((*size, 1)) + 0.48 * rng.standard_normal((*size, width))
        x = z.copy()
        x[..., 0::2] = np.round(np.exp(z[..., 0::2]))
        x[..., 1::2] = z[..., 1::2] > stats.norm.ppf(1 - rates)
        ids = tuple(f"{prefix}{i:03}" for i in range(how.prompts))
        return Side(name, ids, tuple(f"{prefix}{user}" for user in owner), x.mean(1), x.reshape(-1, width))

    latent = common()
    other = (latent, "p") if how.shared else (common(), "q")
    return one("first", latent, "p"), one("second", other[0] + shift, other[1])


EIGHT = {f"f{i}": Feature("binary" if i % 2 else "real", "drawn", lambda h, r: 0.0) for i in range(8)}
DESIGNS = (Drawn(16, 16, 1), Drawn(40, 20, 1), Drawn(40, 10, 8), Drawn(30, 30, 1, shared=False))


def test_where_nothing_differs_alarms_are_as_rare_as_stated_and_intervals_hold_zero() -> None:
    """80 comparisons of each of four designs, no feature differs: a discovery in at most 5% of comparisons, and zero in
    95% of intervals, each within what chance allows so many (a binomial's 99.9% bound; features are correlated, so
    that of intervals counts comparisons). Both are also not far lower for real features, whose test is exact: a test
    that never rings would pass the first.
    """
    rng = np.random.default_rng(7)
    found = [compare("checkpoints", *_drawn(how, rng, np.zeros(8)), EIGHT) for how in DESIGNS for _ in range(80)]
    n = len(found)
    rings = sum(any(row.q is not None and row.q < 0.05 for row in rows) for rows in found)
    assert rings <= stats.binom.ppf(0.999, n, 0.05)
    for i in range(8):
        held = sum((rows[i].low or 0) <= 0 <= (rows[i].high or 0) for rows in found)
        assert held >= stats.binom.ppf(0.001, n, 0.95), (i, held / n)
    small = [row.p < 0.05 for rows in found for row in rows if not row.binary and row.p is not None]
    assert 0.02 < np.mean(small) < 0.08


def test_where_some_features_differ_few_discoveries_are_false() -> None:
    """Features 0 and 1 of eight differ: of all discoveries, the mean share of false ones is at most 5% and 3 of its
    standard errors; and the true ones are found more often than not."""
    rng, shift = np.random.default_rng(8), np.array([1.0, 1.0, 0, 0, 0, 0, 0, 0])
    shares, true = [], 0
    for _ in range(120):
        rows = compare("checkpoints", *_drawn(Drawn(40, 20, 4), rng, shift), EIGHT)
        names = [i for i, row in enumerate(rows) if row.q is not None and row.q < 0.05]
        shares.append(sum(i > 1 for i in names) / max(1, len(names)))
        true += 0 in names
    assert np.mean(shares) <= 0.05 + 3 * np.std(shares) / len(shares) ** 0.5
    assert true > 100


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


def test_a_few_shared_prompts_do_not_throw_the_others_away() -> None:
    """Of 30 and 45 prompts 10 are shared, less than half of a side: all 75 count, as two samples."""
    first = _replies(5, 30)
    second = _replies(6, 10) + _replies(7, 35, prefix="q")
    (row, *_) = compare("rl", side("steps 1 to 2", first), side("steps 3 to 4", second))
    assert (row.method, row.n) == ("welch", 30)
    (row, *_) = compare("rl", side("steps 1 to 2", first), side("steps 3 to 4", second[:20]))
    assert (row.method, row.n) == ("paired", 10)


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
