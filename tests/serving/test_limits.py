"""Token buckets: never more than they hold, waits that are true, and memory that has a bound."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from characterflywheel.errors import FlywheelError
from characterflywheel.serving.limits import RateLimiter


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


def test_a_minute_s_worth_at_once_then_one_by_one() -> None:
    clock = Clock()
    limiter = RateLimiter(60, clock=clock)
    assert [limiter.take("ada") for _ in range(60)] == [None] * 60
    assert limiter.take("ada") == pytest.approx(1.0)
    assert limiter.take("bob") is None  # everybody has their own
    clock.at += 0.5
    assert limiter.take("ada") == pytest.approx(0.5)
    clock.at += 0.5
    assert limiter.take("ada") is None
    assert limiter.take("ada") == pytest.approx(1.0)
    clock.at += 3600
    assert sum(limiter.take("ada") is None for _ in range(100)) == 60  # a full bucket does not overflow


class Counting:
    """The bucket as the books have it: tokens, counted in floating point."""

    def __init__(self, per_second: float, burst: float) -> None:
        self.rate, self.burst, self.tokens, self.at = per_second, burst, burst, 1000.0

    def take(self, now: float) -> bool:
        self.tokens = min(self.burst, self.tokens + (now - self.at) * self.rate)
        self.at = now
        taken = self.tokens >= 1 - 1e-6
        self.tokens -= taken
        return taken


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 40)), max_size=200),
    st.sampled_from([6.0, 60.0, 240.0]),
    st.integers(1, 5),
)
def test_it_decides_as_counting_tokens_does(steps: list[tuple[str, int]], per_minute: float, burst: int) -> None:
    clock = Clock()
    limiter = RateLimiter(per_minute, burst, clock=clock)
    books = {who: Counting(per_minute / 60, burst) for who in "ab"}
    for who, quarters in steps:
        clock.at += quarters / 4
        wait = limiter.take(who)
        assert (wait is None) == books[who].take(clock.at)
        assert wait is None or 0 < wait <= 60 / per_minute + 1e-6


@given(st.floats(0.2, 5), st.integers(1, 4))
def test_after_the_wait_there_is_a_token(per_second: float, burst: int) -> None:
    clock = Clock()
    limiter = RateLimiter(per_second * 60, burst, clock=clock)
    while (wait := limiter.take("ada")) is None:
        pass
    clock.at += wait
    assert limiter.take("ada") is None


def test_a_hundred_thousand_users_do_not_fill_the_memory() -> None:
    clock = Clock()
    limiter = RateLimiter(600, most=20_000, clock=clock)
    tracemalloc.start()
    for number in range(100_000):
        limiter.take(f"user-{number}")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(limiter) <= 20_000
    assert held < 5_000_000
    for late in ("ada", "bob"):
        clock.at += 61  # everybody's bucket is full again: there is nothing to remember
        limiter.take(late)
    assert len(limiter) <= 2


def test_who_is_at_the_limit_stays_there_while_others_come() -> None:
    clock = Clock()
    limiter = RateLimiter(60, 3, most=100, clock=clock)
    refused = 0
    for number in range(2_000):
        limiter.take(f"user-{number}")
        refused += limiter.take("greedy") is not None
    assert refused == 1_997


@pytest.mark.parametrize(("per_minute", "burst"), [(0, None), (-1, None), (60, 0.5)])
def test_a_limit_that_lets_nobody_pass_is_an_error(per_minute: float, burst: float | None) -> None:
    with pytest.raises(FlywheelError, match="must be"):
        RateLimiter(per_minute, burst)
