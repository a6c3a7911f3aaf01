"""Near duplicates: the index finds what comparing all pairs finds."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from characterflywheel.errors import FlywheelError
from characterflywheel.training.near_duplicates import Exchange, jaccard, near_duplicates, shingles

WORDS = st.lists(st.sampled_from("sea cold stars rain tea bread".split()), max_size=9).map(" ".join)  # noqa: SIM905
EXCHANGES = st.lists(st.builds(Exchange, WORDS, WORDS), max_size=14)


def brute_force(exchanges: list[Exchange], threshold: float) -> list[int | None]:
    """The definition, with every pair compared."""
    kept: list[int] = []
    found: list[int | None] = []
    for place, one in enumerate(exchanges):
        twin = next(
            (
                other for other in kept
                if jaccard(shingles(one.asked), shingles(exchanges[other].asked)) >= threshold
                and jaccard(shingles(one.reply), shingles(exchanges[other].reply)) >= threshold
            ),
            None,
        )  # fmt: skip
        found.append(twin)
        if twin is None:
            kept.append(place)
    return found


@settings(max_examples=150, deadline=None)
@given(EXCHANGES, st.sampled_from([0.1, 0.3, 0.5, 2 / 3, 0.8, 0.9, 1.0]))
def test_the_index_finds_what_comparing_all_pairs_finds(exchanges: list[Exchange], threshold: float) -> None:
    assert near_duplicates(exchanges, threshold) == brute_force(exchanges, threshold)


def test_a_hand_worked_similarity() -> None:
    """`a b c d e` has abc, bcd, cde; `a b c d f` has abc, bcd, cdf: 2 of 4 items are shared."""
    assert jaccard(shingles("A, b c d e!"), shingles("a b c d f")) == 0.5
    assert shingles("Hello there") == shingles("hello... there") == {("hello", "there")}
    assert shingles("🌊") == {("🌊",)} != shingles("🙂")


def test_one_answer_to_two_questions_and_two_answers_to_one_are_both_kept() -> None:
    question, answer = "do you like the open sea at night", "i like it best when nobody else is there"
    rows = [
        Exchange(question, answer), Exchange("and what of the bread we bake here", answer),
        Exchange(question, "no, it is far too cold for me out there"),
        Exchange(f"Say, {question}?", f"Well, {answer}!"), Exchange(question, answer),
    ]  # fmt: skip
    assert near_duplicates(rows, 0.7) == [None, None, None, 0, 0]
    assert near_duplicates(rows, 1.0) == [None, None, None, None, 0]


def test_many_examples_are_not_compared_pair_by_pair() -> None:
    """3,000 distinct exchanges and 2,000 near copies of one: all pairs would be 12 million."""
    rng = random.Random(1)
    vocabulary = [f"w{n}" for n in range(2000)]
    rows = [Exchange(*(" ".join(rng.choices(vocabulary, k=12)) for _ in range(2))) for _ in range(3000)]
    rows += [Exchange(rows[0].asked, rows[0].reply + f" w{n}") for n in range(2000)]
    began = time.process_time()
    found = near_duplicates(rows, 0.8)
    assert time.process_time() - began < 5
    assert found == [None] * 3000 + [0] * 2000


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.1])
def test_a_threshold_is_a_share(threshold: float) -> None:
    with pytest.raises(FlywheelError, match="must be > 0 and <= 1"):
        near_duplicates([], threshold)
