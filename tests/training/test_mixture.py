from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_fixture import example

from characterflywheel.records import Dropped, Example
from characterflywheel.training.mixture import Mixture, mix

SOURCES = ("internal", "user", "rewrite", "safety", "general")
WEIGHTS = {"internal": 1.0, "user": 1.5, "rewrite": 2.0}


def examples() -> list[Example]:
    """Four examples of each of three sources, each to its own prompt."""
    return [example(i, f"reply {i}", source=SOURCES[i % 3]) for i in range(12)]


def counts(mixture: Mixture) -> dict[str, int]:
    return {share.source: share.drawn for share in mixture.sources}


def test_weights_are_passes_over_a_source() -> None:
    mixture = mix(examples(), WEIGHTS, epochs=2, seed=1)
    assert counts(mixture) == {"internal": 2 * 4, "user": 2 * 6, "rewrite": 2 * 8}
    times = Counter(e.id for e in mixture.examples)
    assert {times[e.id] for e in examples() if e.source == "internal"} == {2}
    assert {times[e.id] for e in examples() if e.source == "rewrite"} == {4}
    assert all(2 <= times[e.id] <= 4 for e in examples() if e.source == "user")


def test_an_epoch_ends_before_the_next_begins() -> None:
    mixture = mix(examples(), dict.fromkeys(SOURCES, 1.0), epochs=3, seed=1)
    ids = [e.id for e in mixture.examples]
    for epoch in range(3):
        assert sorted(ids[12 * epoch : 12 * epoch + 12]) == sorted(e.id for e in examples())
    assert ids[:12] != ids[12:24]


def test_a_source_without_a_weight_teaches_nothing_but_is_stated() -> None:
    mixture = mix(examples(), {"user": 1.0}, epochs=1, seed=1)
    assert counts(mixture) == {"internal": 0, "user": 4, "rewrite": 0}
    assert {e.source for e in mixture.examples} == {"user"}


def test_the_same_reply_to_the_same_prompt_is_learnt_once() -> None:
    rows = [
        example(3, "hi", asked=0), example(1, "hi", asked=0, source="rewrite"), example(2, "hi", asked=1),
        example(4, "ho", asked=0),
    ]  # fmt: skip
    mixture = mix(rows, dict.fromkeys(SOURCES, 1.0), epochs=1, seed=1)
    assert sorted(e.id for e in mixture.examples) == ["example-01", "example-02", "example-04"]
    assert mixture.dropped == (
        Dropped(id="example-03", stage="sft", reason="duplicate", detail="of example-01", prompt_id=rows[0].prompt_id),
    )
    offered = {s.source: (s.offered, s.distinct) for s in mixture.sources}
    assert offered == {"rewrite": (1, 1), "user": (3, 2)}


@pytest.mark.parametrize("seed", [1, 2])
def test_order_follows_the_seed_and_not_the_input(seed: int) -> None:
    first = mix(examples(), WEIGHTS, 2, seed)
    assert mix(examples()[::-1], WEIGHTS, 2, seed) == first
    assert mix(examples(), WEIGHTS, 2, seed + 10).examples != first.examples


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abc"), st.sampled_from(SOURCES)), max_size=20),
    st.dictionaries(st.sampled_from(SOURCES), st.floats(0, 3)), st.integers(1, 3),
)  # fmt: skip
def test_a_mixture_accounts_for_every_example(
    offered: list[tuple[int, str, str]], weights: dict[str, float], epochs: int
) -> None:
    rows = [example(i, text, asked=asked, source=source) for i, (asked, text, source) in enumerate(offered)]
    mixture = mix(rows, weights, epochs, 5)
    assert sum(s.distinct for s in mixture.sources) + len(mixture.dropped) == len(rows)
    assert len(mixture.examples) == sum(s.drawn for s in mixture.sources)
    for share in mixture.sources:
        assert share.drawn == pytest.approx(epochs * share.weight * share.distinct, abs=epochs * 0.5 + 1e-9)
