"""Real conversations: what may be said again, and fits that recover what they were drawn from."""

import numpy as np
import pytest

from characterflywheel.simulation import chitchat
from characterflywheel.simulation.lore import Lore


def test_fits_describe_the_real_conversations(lore: Lore) -> None:
    fits, observed = lore.real.fits, lore.real.observed
    rng = np.random.default_rng(0)
    stays = rng.geometric(rng.beta(fits.leave.a, fits.leave.b, 20_000))
    assert np.median(stays) == pytest.approx(observed["stay"][50], abs=2)
    days = rng.binomial(6, rng.beta(fits.visit.a, fits.visit.b, 20_000))
    assert (days == 0).mean() == pytest.approx(0.55, abs=0.03)
    assert sum(fits.hours) == pytest.approx(1)
    assert min(fits.hours) == fits.hours[3], "few people write at three in the morning, local time"


def test_maximum_likelihood_recovers_known_chances() -> None:
    rng = np.random.default_rng(1)
    stays = rng.geometric(rng.beta(2.0, 8.0, 20_000))
    assert chitchat._beta_geometric(stays) == pytest.approx((2.0, 8.0), rel=0.15)
    days = rng.binomial(6, rng.beta(0.5, 2.0, 20_000))
    assert chitchat._beta_binomial(days, 6) == pytest.approx((0.5, 2.0), rel=0.15)


def test_spread_separates_people_from_moments() -> None:
    rng = np.random.default_rng(2)
    rows = [
        (f"p{person}", float(np.exp(2 + level + rng.normal(0, 0.5))))
        for person, level in enumerate(rng.normal(0, 0.8, 300))
        for _ in range(20)
    ]
    assert chitchat._spread(rows) == pytest.approx((2, 0.8, 0.5), abs=0.1)


def test_words_that_are_said_again_name_nobody_and_harm_nobody(lore: Lore) -> None:
    familiar = frozenset(["hi", "what", "is", "up", "the", "weather", "nice", "today", "write", "me", "at"])
    assert chitchat.presentable("Hi, what is up?", familiar)
    for text in (
        "Hi",
        "what is up Kaylee",
        "write me at a@b.org",
        "the weather is shit today",
        "hi " * 50,
        "call 5551234",
    ):
        assert not chitchat.presentable(text, familiar), text
    assert len(lore.real.exchanges) == chitchat.EXCHANGES
    assert len({e.answer.casefold() for e in lore.real.exchanges}) == chitchat.EXCHANGES
    assert all(chitchat.SHORTEST <= len(chitchat.words(e.answer)) <= chitchat.LONGEST for e in lore.real.exchanges)
    assert not [o for o in lore.real.openers if "@" in o or "http" in o]
