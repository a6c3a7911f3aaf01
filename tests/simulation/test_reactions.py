"""The hidden utility: bounded, anchored at real answers, with peaks where people have them."""

import numpy as np
import pytest
from conftest_world import BAD, GOOD

from characterflywheel.characters import bundled_characters
from characterflywheel.records import ChatMessage
from characterflywheel.simulation.lore import Lore
from characterflywheel.simulation.reactions import ACTS, CEILING, _emoji, p_act, p_continue, utility
from characterflywheel.simulation.senses import NOTICED, Matrix, Scene
from characterflywheel.simulation.users import Column, draw_crowd


def values(lore: Lore, reply: str, n: int = 300) -> tuple[Column, Matrix]:
    asked = (ChatMessage(role="user", content="What do you like best about the stars?"),)
    seen = lore.senses.observe([Scene(bundled_characters()["astronomer"], asked, reply)]).repeat(n, axis=0)
    return utility(seen, draw_crowd(lore.real.fits, n, "test"), lore.anchor), seen


def test_real_answers_are_the_zero_of_utility(lore: Lore) -> None:
    assert abs(lore.answer_values.mean()) < 0.1
    assert np.all(np.diff(lore.answer_values) >= 0)
    assert lore.rating(-9) == min(lore.real.observed["rating"])
    assert lore.rating(9) == max(lore.real.observed["rating"])


def test_good_company_keeps_people_and_bad_company_loses_them(lore: Lore) -> None:
    good, good_seen = values(lore, GOOD)
    bad, bad_seen = values(lore, BAD)
    assert np.abs(np.concatenate([good, bad])).max() <= CEILING
    assert good.mean() > bad.mean() + 1.5
    crowd = draw_crowd(lore.real.fits, len(good), "test")
    assert p_continue(good, crowd).mean() > p_continue(bad, crowd).mean() + 0.1
    turn = np.zeros(len(good))
    for act in ACTS:
        better, worse = (p_act(act, v, s, crowd, turn).mean() for v, s in ((good, good_seen), (bad, bad_seen)))
        assert (better > worse) == (act.slope > 0), act.kind


def test_feedback_is_rare_after_average_answers(lore: Lore) -> None:
    n = len(lore.answers)
    crowd = draw_crowd(lore.real.fits, n, "rare")
    value = utility(lore.answers, crowd, lore.anchor)
    rates = {act.kind: p_act(act, value, lore.answers, crowd, np.ones(n)).mean() for act in ACTS}
    assert 0.02 < rates["thumb_up"] < 0.06
    assert 0.005 < rates["thumb_down"] < 0.04
    assert 0.003 < rates["love"] < 0.02
    assert rates["report"] < 0.002


def test_one_emoji_is_the_peak() -> None:
    taste = _emoji(np.arange(9.0))
    assert taste[0] == 0
    assert taste.argmax() == 1
    assert np.all(np.diff(taste[1:]) < 0)
    assert taste[-1] < 0


def test_everyone_has_a_length_they_like(lore: Lore) -> None:
    crowd = draw_crowd(lore.real.fits, 1, "length")
    seen = np.zeros((60, len(NOTICED)))
    seen[:, NOTICED.index("log_words")] = np.log1p(np.arange(60))
    liking = utility(seen, crowd[np.zeros(60, dtype=np.int64)], 0.0)
    assert np.log1p(liking.argmax()) == pytest.approx(crowd.likes_words[0], abs=0.1)


def test_the_same_seed_draws_the_same_people(lore: Lore) -> None:
    first, again, other = (draw_crowd(lore.real.fits, 5, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.weights, again.weights)
    assert not np.array_equal(first.weights, other.weights)
    assert len(first[np.array([1, 3])]) == 2
