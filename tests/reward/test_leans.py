import numpy as np
import pytest
from reward_fixture import asks, pair

from characterflywheel.reward.leans import Judged, judged_replies, leans
from characterflywheel.style.features import FEATURES


def world(seed: int, lean: float, prompts: int = 30, each: int = 1) -> list[Judged]:
    """Four replies a prompt, whose scores go along with exclamation marks by `lean`; prompts differ by far more. A user
    has `each` prompts."""
    rng = np.random.default_rng(seed)
    replies = []
    for i in range(prompts):
        base = rng.normal() * 5
        for k in range(4):
            marks = int(rng.integers(0, 4))
            text = f"I like {['tea', 'bread', 'rain', 'ships'][k]}{'!' * marks}"
            score, won = base + lean * marks + rng.normal(), rng.random()
            replies.append(Judged(f"p{i:02}", f"u{i // each:02}", asks("Hi"), text, score, won))
    return replies


def test_a_lean_is_found_within_prompts_where_prompts_hide_it():
    found = leans(world(1, lean=1.5), seed=1)
    assert {one.feature for one in found} == set(FEATURES)
    worst = found[0]
    assert worst.feature == "exclamations"
    assert worst.flagged
    assert worst.within.value > 0.5 > abs(worst.raw.value)
    assert worst.within.low > 0.3
    assert abs(worst.reviewers.value) < 0.4
    absent = next(one for one in found if one.feature == "emojis")
    assert absent.within.reason == "all values of one side are equal"
    assert (absent.p, absent.flagged) == (None, False)


def test_intervals_need_users_and_p_values_only_prompts():
    alone, few = (next(one for one in leans(world(1, 1.5, each=n), seed=1) if one.feature == "exclamations")
                  for n in (1, 8))  # fmt: skip
    assert (few.raw.value, few.within.value, few.p) == (alone.raw.value, alone.within.value, alone.p)
    assert (few.raw.low, few.raw.reason) == (None, "4 users: too few for an interval")
    assert few.within.low is None
    assert few.flagged


def test_of_very_many_replies_those_to_some_users_are_measured(monkeypatch: pytest.MonkeyPatch):
    replies = world(1, 1.5, each=2)
    monkeypatch.setattr("characterflywheel.reward.leans.MOST", 40)
    found = next(one for one in leans(replies, seed=1) if one.feature == "exclamations")
    assert found.raw.n == 40, "five users with eight replies each"
    assert found.raw != next(one for one in leans(replies, seed=2) if one.feature == "exclamations").raw
    monkeypatch.setattr("characterflywheel.reward.leans.MOST", 120)
    assert {one.raw.n for one in leans(replies, seed=1)} == {120}


def test_no_lean_is_rarely_flagged():
    flagged = sum(any(one.flagged for one in leans(world(seed, lean=0.0), seed=seed)) for seed in range(20))
    assert flagged <= 3


def test_replies_are_counted_once_and_rewrites_never():
    pairs = [pair(0, "one", "two"), pair(1, "one", "three", label=0.75, reviewers=4), pair(2, "one", "two")]
    rewritten = pair(3, "new", "one").model_copy(update={"chosen_policy": "rewrite"})
    replies = judged_replies([*pairs, rewritten], [1.0, 1.0, 5.0, 9.0], [0.0, -1.0, 4.0, 5.0])
    assert [(r.prompt_id, r.text, r.score, r.won) for r in replies] == [
        ("prompt-000", "one", 1.0, 0.875),
        ("prompt-000", "three", -1.0, 0.25),
        ("prompt-000", "two", 0.0, 0.0),
        ("prompt-001", "one", 5.0, 0.5),
        ("prompt-001", "two", 4.0, 0.0),
    ]


def test_one_reply_a_prompt_says_nothing_within():
    found = leans([r for r in world(2, lean=1.0) if "tea" in r.text], seed=1)
    assert found[0].within.value is None
    assert not any(one.flagged for one in found)
    assert leans([], seed=1) == ()
