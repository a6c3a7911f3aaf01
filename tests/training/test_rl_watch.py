"""Every alarm of RL on numbers worked by hand."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from training_fixture import prompt

from characterflywheel.config import RLAlarmsConfig
from characterflywheel.records import Estimate
from characterflywheel.style.monitor import Difference
from characterflywheel.training.rl import watch
from characterflywheel.training.rl.watch import (
    Alarm,
    Look,
    Seen,
    alarms,
    entropy_share,
    look,
    looks_at,
    onsets,
    see,
    watched,
)  # fmt: skip

CONFIG = RLAlarmsConfig()
QUIET = Estimate(value=0.0, low=-1.0, high=1.0, n=8)
SEEN = Seen(4, QUIET, Estimate(value=1.0, n=2), Estimate(value=0.5, low=0.4, high=0.6, n=8), QUIET, QUIET, ())


def rung(seen: Seen, config: RLAlarmsConfig = CONFIG) -> list[str]:
    return [one.kind for one in alarms(seen, config)]


def test_a_quiet_look_rings_nothing() -> None:
    assert alarms(SEEN, CONFIG) == []
    unmeasured = Estimate(value=None, n=0, reason="nothing")
    assert alarms(Seen(4, unmeasured, unmeasured, unmeasured, unmeasured, None, ()), CONFIG) == []


@pytest.mark.parametrize(("value", "rings"), [(9.9, False), (10.1, True)])
def test_kl_above_its_bound(value: float, rings: bool) -> None:
    assert rung(SEEN._replace(kl=Estimate(value=value, low=5, high=15, n=8))) == ["kl"] * rings


@pytest.mark.parametrize(("value", "rings"), [(0.51, False), (0.49, True)])
def test_entropy_below_its_share(value: float, rings: bool) -> None:
    assert rung(SEEN._replace(entropy_share=Estimate(value=value, n=2))) == ["entropy"] * rings


@pytest.mark.parametrize(
    ("value", "low", "rings"), [(0.64, 0.6, False), (0.66, 0.51, True), (0.8, 0.45, False), (0.66, None, False)]
)
def test_a_win_rate_above_65_percent_that_is_no_chance(value: float, low: float | None, rings: bool) -> None:
    """Few prompts win by luck: the interval must clear one half too."""
    assert rung(SEEN._replace(win_rate=Estimate(value=value, low=low, high=0.9, n=8))) == ["win_rate"] * rings


UP, DOWN = Estimate(value=0.5, low=0.1, high=0.9, n=8), Estimate(value=-0.5, low=-0.9, high=-0.1, n=8)


@pytest.mark.parametrize(
    ("score", "gold", "rings"),
    [
        (UP, DOWN, True),
        (UP, QUIET, False),
        (QUIET, DOWN, False),
        (UP, UP, False),
        (DOWN, DOWN, False),
        (UP, None, False),
    ],
)
def test_the_proxy_is_up_while_gold_is_down(score: Estimate, gold: Estimate | None, rings: bool) -> None:
    assert rung(SEEN._replace(score=score, gold=gold)) == ["gold"] * rings


def test_the_config_says_what_stops() -> None:
    seen = SEEN._replace(kl=Estimate(value=20.0, low=18.0, high=22.0, n=8), score=UP, gold=DOWN)
    config = RLAlarmsConfig(stop=("gold",))
    assert [(one.kind, one.action) for one in alarms(seen, config)] == [("kl", "warn"), ("gold", "stop")]
    kl = alarms(seen, config)[0]
    assert (kl.step, kl.value, kl.bound, kl.low, kl.high, kl.n) == (4, 20.0, 10.0, 18.0, 22.0, 8)
    assert kl.says == "KL to the start 20.00 nats a reply"


def drifted() -> Sequence[Difference]:
    """Twelve prompts; all later replies but one have an emoji."""
    asked = {p.id: p for p in map(prompt, range(12))}
    plain = [(id, f"the sea is cold {i}") for i, id in enumerate(asked)]
    return watch.style_drift(asked, plain, [(id, f"{t} 🌊" if i else t) for i, (id, t) in enumerate(plain)], "later")


def test_style_drift_needs_a_discovery_and_an_effect() -> None:
    """Twelve prompts; later replies all have an emoji, nothing else changes. The interval is scaled with the effect."""
    asked = {p.id: p for p in map(prompt, range(12))}
    plain = [(id, f"the sea is cold {i}") for i, id in enumerate(asked)]
    happy = [(id, f"{text} 🌊" if i else text) for i, (id, text) in enumerate(plain)]
    assert alarms(SEEN._replace(style=watch.style_drift(asked, plain, plain, "later")), CONFIG) == []
    rows = watch.style_drift(asked, plain, happy, "steps 1 to 4")
    found = alarms(SEEN._replace(style=rows), CONFIG)
    assert (
        {"emojis", "has_emoji"}
        <= {one.feature for one in found}
        <= {"emojis", "has_emoji", "words", "characters", "unfinished"}
    )
    (emoji,) = (one for one in found if one.feature == "emojis")
    (row,) = (one for one in rows if one.feature == "emojis")
    values = np.array([0.0] * 12 + [0.0] + [1.0] * 11)
    assert emoji.value == pytest.approx((11 / 12) / values.std())
    assert emoji.low == pytest.approx(row.low / values.std())
    assert emoji.says.startswith("emojis 0 to 0.917")
    assert emoji.n == 12
    few = dict(list(asked.items())[:7])
    assert alarms(SEEN._replace(style=watch.style_drift(few, plain[:7], happy[:7], "x")), CONFIG) == [], (
        "too few prompts"
    )
    strict = RLAlarmsConfig(style_effect=50.0)
    assert alarms(SEEN._replace(style=rows), strict) == []


WORDS = "the sea is cold and stars are out tea like you i feel sorry why of course"


def chatter(rng: random.Random) -> str:
    """Words with now and then a question, an emoji, a list or a stage direction."""
    text = " ".join(rng.choices(WORDS.split(), k=8))
    for chance, mark in ((0.05, " 🌊"), (0.3, "?"), (0.1, "!"), (0.05, "\n- one\n- two"), (0.05, " *waves*")):
        text += mark * (rng.random() < chance)
    return text


def test_where_nothing_drifts_few_looks_ring() -> None:
    """Of 150 such looks 1 rang; where the policy had 12 replies to the start's 4, 14 did: of rare features it had some
    where the start had none. So both sides are given as many (`step`)."""
    rng, asked, rang = random.Random(1), {p.id: p for p in map(prompt, range(16))}, 0
    for _ in range(50):
        start, policy = ([(id, chatter(rng)) for id in asked for _ in range(4)] for _ in range(2))
        rang += bool(alarms(SEEN._replace(style=watch.style_drift(asked, start, policy, "later")), CONFIG))
    assert rang <= 4


# Looks


def test_a_look_by_hand() -> None:
    """Against the start's 1: 1 ties, 2 wins: 0.75. Gold: mean of 0, 4 less 5."""
    one = look(8, prompt(3), [1.0, 3.0], [1.0, 2.0], [1.0], [0.0, 4.0], [5.0])
    assert one == Look(step=8, prompt_id="prompt-03", user_id="u3", kl=2.0, win_rate=0.75, score=0.5, gold=-3.0)
    assert look(8, prompt(3), [1.0], [1.0], [2.0]).gold is None


def test_which_steps_are_looked_at() -> None:
    assert [s for s in range(1, 12) if looks_at(s, 10, 4)] == [4, 8, 11]
    assert [s for s in range(1, 12) if looks_at(s, 10, 0)] == []


def test_entropy_is_compared_between_steps_that_do_not_overlap() -> None:
    assert entropy_share([2.0, 2.0, 1.0, 1.0], 4).value == 0.5
    assert entropy_share([2.0, 9.0, 1.0], 4) == Estimate(value=0.5, n=1)
    assert entropy_share([4.0, 2.0, 9.0, 9.0, 1.0, 0.5], 2) == Estimate(value=0.25, n=2)
    assert entropy_share([2.0], 4).value is None
    assert entropy_share([2.0, None, 1.0, None], 4) == Estimate(value=0.5, n=1), "None: a step without a number"
    assert entropy_share([2.0, None], 4).value is None
    assert "at least two" in str(entropy_share([], 4).reason)


def looks(step: int, rng: np.random.Generator) -> list[Look]:
    return [
        Look(step=step, prompt_id=f"p{step}-{i}", user_id=f"u{step}-{i}", kl=float(rng.normal(3)),
             win_rate=float(rng.integers(0, 5)) / 4, score=float(rng.normal(1)), gold=float(rng.normal()))
        for i in range(6)
    ]  # fmt: skip


def test_the_last_looks_are_pooled_and_kl_is_the_newest() -> None:
    rng = np.random.default_rng(1)
    rows = [one for step in (2, 4, 6) for one in looks(step, rng)]
    seen = see(rows, [1.0, 0.5], [], window=2, planned=5)
    pooled, newest = [r for r in rows if r.step > 2], [r for r in rows if r.step == 6]
    assert seen.step == 6
    assert (seen.kl.n, seen.win_rate.n) == (6, 12)
    assert seen.kl.value == pytest.approx(np.mean([r.kl for r in newest]))
    expected = stats.t.interval(0.99, 11, np.mean([r.gold for r in pooled]), stats.sem([r.gold for r in pooled]))
    assert seen.gold is not None
    assert (seen.gold.low, seen.gold.high) == pytest.approx(expected)
    assert seen.win_rate.value == pytest.approx(np.mean([r.win_rate for r in pooled]))
    assert seen.entropy_share.value == 0.5
    assert seen.metrics().keys() == {"kl_to_start", "entropy_share", "win_rate", "score_gain", "gold_gain"}
    blind = see([r.model_copy(update={"gold": None}) for r in rows], [], [], window=2, planned=5)
    assert blind.gold is None
    assert blind.metrics().keys() == {"kl_to_start", "win_rate", "score_gain"}


def test_a_prompt_at_several_looks_counts_once() -> None:
    """As a unit of the interval it is its user's, as a number to be told it is one prompt."""
    rows = [look(step, prompt(i), [0.0], [1.0], [0.0], [0.0], [1.0]) for step in (1, 2) for i in range(3)]
    seen = see(rows, [], [], window=4, planned=2)
    assert seen.gold is not None
    assert (seen.win_rate.n, seen.score.n, seen.gold.n, seen.kl.n) == (3, 3, 3, 3)


def test_where_gold_does_not_move_a_run_of_many_looks_rarely_rings() -> None:
    """The score is truly up, gold truly unmoved. Of 60 runs of 25 looks none rang; at 95% for each look 20 did."""
    rng, rang = np.random.default_rng(0), 0
    for _ in range(60):
        rows: list[Look] = []
        for step in range(25):
            for i in range(4):
                up, still = rng.normal(0.8, 1, 6).tolist(), rng.normal(0, 1, 6).tolist()
                start, start_gold = rng.normal(0, 1, 4).tolist(), rng.normal(0, 1, 4).tolist()
                rows.append(look(step, prompt(4 * step + i), [1.0], up, start, still, start_gold))
            if "gold" in rung(see(rows[-16:], [], [], window=4, planned=25)):
                rang += 1
                break
    assert rang <= 4


@pytest.mark.parametrize("prompts", [4, 16])
def test_a_win_rate_rings_near_its_bound(prompts: int) -> None:
    """The paper's failed V12 had 70.7%: each prompt is the mean of many pairs, not a yes or no."""
    rows = [one for i in range(prompts) for one in looked_at(i, 0.707 + (0.04 if i % 2 else -0.04))]
    seen = see(rows, [], [], window=4, planned=1)
    assert rung(seen) == ["win_rate"]
    assert rung(see([one for i in range(prompts) for one in looked_at(i, 0.64)], [], [], window=4, planned=1)) == []
    alone = see(looked_at(0, 0.9), [], [], window=4, planned=1)
    assert rung(alone) == []


def looked_at(i: int, win_rate: float) -> list[Look]:
    return [look(1, prompt(i), [0.0], [1.0], [0.0]).model_copy(update={"win_rate": win_rate})]


@pytest.mark.parametrize("prompts", [4, 8])
def test_where_nothing_changes_a_win_rate_rarely_rings(prompts: int) -> None:
    """6 replies against 4 of the same kind, each prompt of its own difficulty: of 300 runs of 4 prompts 4 rang, of 8
    2."""
    rng, rang = np.random.default_rng(0), 0
    for _ in range(300):
        rows = [
            look(1, prompt(i), [0.0], rng.normal(size=6).tolist(), rng.normal(size=4).tolist()) for i in range(prompts)
        ]
        rang += "win_rate" in rung(see(rows, [], [], window=4, planned=1))
    assert rang <= 8


def test_style_s_discoveries_are_as_rare_in_a_run_as_in_one_look() -> None:
    """The q of a look is compared with a share of 0.05 for each look that is planned."""
    (row,) = (one for one in drifted() if one.feature == "emojis")
    assert row.q is not None
    close = [row.model_copy(update={"q": 0.01})]
    assert rung(SEEN._replace(style=close)) == ["style"]
    assert rung(SEEN._replace(style=close, looks=4)) == ["style"]
    assert rung(SEEN._replace(style=close, looks=5)) == []


def test_what_was_not_measured_is_not_silent() -> None:
    """Entropy of a single step; gold of one user, which has no interval and so can never ring."""
    kl = Estimate(value=20.0, low=18.0, high=22.0, n=8)
    alone = Estimate(value=-1.0, n=3, reason="one user only: no interval")
    unknown = entropy_share([2.0], 4)
    told = {one.kind: one for one in watched(SEEN._replace(kl=kl, entropy_share=unknown, gold=alone), CONFIG)}
    assert (told["kl"].says, told["kl"].measured, told["kl"].bound) == ("KL to the start 20.00 nats a reply", kl, 10.0)
    assert (told["win_rate"].says, told["win_rate"].measured) == (None, SEEN.win_rate)
    assert told["entropy"].measured == unknown
    assert told["gold"].measured == Estimate(value=None, n=3, reason=alone.reason)
    assert [one.kind for one in watched(SEEN._replace(gold=None), CONFIG)] == ["kl", "entropy", "win_rate"]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=5), st.lists(st.floats(-5, 5), min_size=1, max_size=5))
def test_win_rates_turned_round_add_up_to_one(mine: list[float], theirs: list[float]) -> None:
    there, back = look(1, prompt(0), [0.0], mine, theirs), look(1, prompt(0), [0.0], theirs, mine)
    assert there.win_rate + back.win_rate == pytest.approx(1)
    assert 0 <= there.win_rate <= 1


def test_an_alarm_is_told_once_while_it_rings() -> None:
    def at(step: int, *kinds: str) -> list[Alarm]:
        return [
            Alarm(step=step, kind=kind, feature=feature or None, value=1, bound=0, low=None, high=None, n=1,
                  action="warn", says="")
            for kind, _, feature in (one.partition(" ") for one in kinds)
        ]  # fmt: skip

    seen = [
        at(1),
        at(2, "kl", "style words"),
        at(3, "kl", "style emojis"),
        at(4),
        at(5, "kl"),
        at(6),
        at(7),
        at(8, "kl"),
    ]
    for window, flaps in ((1, [5, 8]), (2, [8]), (3, [])):
        assert [(one.step, one.kind, one.feature) for one in onsets(seen, window)] == [
            (2, "kl", None), (2, "style", "words"), (3, "style", "emojis"), *((step, "kl", None) for step in flaps)
        ], "silent for shorter than the looks that are pooled"  # fmt: skip
    assert onsets([], 4) == []
    assert [one.step for one in onsets([at(1, "kl")], 4)] == [1]
