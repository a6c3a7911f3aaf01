import json
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_fixture import example

from characterflywheel import lineage, tables
from characterflywheel.config import SFTConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.records import Dropped, Example, ExampleSource
from characterflywheel.training.mixture import Mixture, MixtureReport, MixtureRow, blend, mix, write
from characterflywheel.training.sources import Lost

SOURCES = get_args(ExampleSource)
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


@pytest.mark.parametrize("near", [None, 0.9])
def test_what_is_not_learnt_takes_nothing_from_what_is(near: float | None) -> None:
    """The same exchange in a source of weight 0, first by id: its copy is the one that goes."""
    rows = [example(1, "hi there", asked=0), example(3, "hi there", asked=0, source="rewrite")]
    mixture = mix(rows, {"user": 0.0, "rewrite": 1.0}, epochs=1, seed=1, near=near)
    assert [e.id for e in mixture.examples] == ["example-03"]
    assert [(row.id, row.detail) for row in mixture.dropped] == [("example-01", "of example-03")]
    capped = mix(rows, dict.fromkeys(SOURCES, 1.0), epochs=1, seed=1, near=near, max_examples={"user": 0})
    assert [e.id for e in capped.examples] == ["example-03"]


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


def letters(example: Example) -> int:
    """A count of tokens for tests."""
    return len(example.messages[-1].content)


def test_an_example_comes_again_only_when_all_of_its_source_have() -> None:
    """Weight 0.75 of 4 examples over 3 epochs: 9 draws, so each 2 or 3 times."""
    rows = [example(i, f"reply {i}") for i in range(4)]
    for seed in range(10):
        mixture = mix(rows, {"user": 0.75}, 3, seed)
        assert sorted(Counter(e.id for e in mixture.examples).values()) == [2, 2, 2, 3]


def test_caps_bound_a_source_in_every_pass() -> None:
    mixture = mix(examples(), WEIGHTS, 2, 1, max_examples={"user": 3, "rewrite": 100, "internal": 0})
    assert counts(mixture) == {"internal": 0, "user": 6, "rewrite": 16}
    assert Counter((row.source, row.epoch) for row in mixture.rows) == {
        ("user", 0): 3, ("user", 1): 3, ("rewrite", 0): 8, ("rewrite", 1): 8,
    }  # fmt: skip


def test_a_bound_on_tokens_by_hand() -> None:
    """Ten of 10 tokens and ten of 20, which may have half: 7 are in the bound without their last, 120 <= 240 / 2."""
    rows = [example(i, "x" * 9 + str(i)) for i in range(10)]
    rows += [example(10 + i, "y" * 19 + str(i), source="rewrite") for i in range(10)]
    mixture = mix(rows, dict.fromkeys(SOURCES, 1.0), 1, 1, max_token_share={"rewrite": 0.5}, tokens=letters)
    told = {share.source: share for share in mixture.sources}
    assert (told["user"].tokens, told["rewrite"].tokens) == (100, 140)
    assert (told["rewrite"].drawn, told["rewrite"].token_share) == (7, 140 / 240)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.sampled_from(SOURCES[:3])), min_size=1, max_size=25),
    st.dictionaries(st.sampled_from(SOURCES[:2]), st.sampled_from([0.1, 0.3, 0.5, 1.0]), min_size=1),
    st.integers(1, 2), st.integers(0, 3),
)  # fmt: skip
def test_bounds_on_tokens_are_kept_and_no_source_could_have_more(
    sizes: list[tuple[int, str]], bounds: dict[ExampleSource, float], epochs: int, seed: int
) -> None:
    """A source without its last example is within its bound; one more of any would break it."""
    rows = [example(i, "x" * size + f" {i}", source=source) for i, (size, source) in enumerate(sizes)]
    weights = dict.fromkeys(SOURCES, 1.0)
    present = {e.source for e in rows}
    if present <= set(bounds) and sum(bounds[s] for s in present) < 1:
        with pytest.raises(FlywheelError, match=r"adds up to .* must be >= 1"):
            mix(rows, weights, epochs, seed, max_token_share=bounds, tokens=letters)
        return
    mixture = mix(rows, weights, epochs, seed, max_token_share=bounds, tokens=letters)
    for epoch in range(epochs):
        one_pass = [row for row in mixture.rows if row.epoch == epoch]
        total = sum(row.tokens or 0 for row in one_pass)
        for source in present:
            theirs = [row.tokens or 0 for row in one_pass if row.source == source]
            if source in bounds:
                assert sum(theirs) - max(theirs, default=0) <= bounds[source] * total + 1e-6
            else:
                assert len(theirs) == sum(e.source == source for e in rows), "no bound, nothing taken away"
        if present <= {s for s, bound in bounds.items() if bound == 1.0}:
            assert len(one_pass) == len(rows)


def test_tokens_that_are_bounded_must_be_counted() -> None:
    with pytest.raises(FlywheelError, match="needs a count of tokens"):
        mix(examples(), WEIGHTS, 1, 1, max_token_share={"user": 0.5})


TEXTS = ("we sail at dawn when the tide is high", "we sail at dawn when the tide is low", "tea", "the tide is high")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(TEXTS), st.sampled_from(SOURCES)), max_size=14),
    st.randoms(use_true_random=False), st.sampled_from([None, 0.5, 1.0]),
)  # fmt: skip
def test_nothing_is_drawn_twice_in_a_pass_and_the_order_of_examples_does_not_matter(offered, random, near) -> None:  # type: ignore[no-untyped-def]
    rows = [example(i, text, asked=asked, source=source) for i, (asked, text, source) in enumerate(offered)]
    weights = dict.fromkeys(SOURCES, 1.0)
    mixture = mix(rows, weights, 1, 3, near=near, tokens=letters, max_token_share={"user": 1.0})
    said = [(e.prompt_id, e.messages[-1].content) for e in mixture.examples]
    assert len(set(said)) == len(said)
    assert len(mixture.examples) + len(mixture.dropped) == len(rows)
    assert sum(s.offered for s in mixture.sources) == len(rows)
    assert sum(n for s in mixture.sources for n in s.dropped.values()) == len(mixture.dropped)
    random.shuffle(rows)
    assert mix(rows, weights, 1, 3, near=near, tokens=letters, max_token_share={"user": 1.0}) == mixture


def test_near_duplicates_are_dropped_and_say_of_what() -> None:
    rows = [example(0, TEXTS[0]), example(6, TEXTS[1]), example(1, TEXTS[1])]
    assert len(mix(rows, {"user": 1.0}, 1, 1).examples) == 3
    mixture = mix(rows, {"user": 1.0}, 1, 1, near=0.6)  # 6 triples each, of 7 in all 5 shared: 0.71
    (lost,) = mixture.dropped
    assert (lost.id, lost.reason, lost.detail) == ("example-06", "near_duplicate", "of example-00")
    assert mixture.sources[0].dropped == {"near_duplicate": 1}


def test_what_a_source_gave_is_stated() -> None:
    scored = [example(i, "one two three four"[: 3 + 4 * i]).model_copy(update={"score": float(i)}) for i in range(2)]
    rows = [*scored, example(2, "tea or bread").model_copy(update={"character_id": None})]
    gone = Lost.of(example(7, "x", source="general"), "unsafe", "harm")
    mixture = mix(rows, {"user": 2.0}, 1, 1, tokens=letters, refused=[gone])
    general, user = mixture.sources
    assert (general.source, general.offered, general.distinct, general.dropped) == ("general", 1, 0, {"unsafe": 1})
    assert (general.mean_words, general.mean_score, general.tokens) == (None, None, 0)
    assert (user.offered, user.distinct, user.drawn, user.drawn_distinct) == (3, 3, 6, 3)
    assert (user.mean_words, user.mean_score, user.scored, user.characters) == (2.0, 0.5, 2, 1)
    assert (user.tokens, user.token_share) == (2 * (3 + 7 + 12), 1.0)
    assert mixture.dropped == (gone.row,)


def test_what_a_model_was_trained_on_is_written_and_an_erasure_finds_it(tmp_path: Path) -> None:
    config = SFTConfig(epochs=2, max_examples={"user": 3})
    mixture = blend(config, examples(), 5, tokens=letters)
    also = [Dropped(id="example-99", stage="sft", reason="too_long", prompt_id="prompt-99")]
    write(tmp_path, config, 5, mixture, also)
    rows = tables.read(tmp_path / "mixture.parquet", MixtureRow)
    assert [row.example_id for row in rows] == [e.id for e in mixture.examples]
    assert {(row.source, row.weight) for row in rows} == {(s, 1.0) for s in ("internal", "user", "rewrite")}
    assert [row.epoch for row in rows] == [0] * 11 + [1] * 11
    report = MixtureReport.model_validate_json((tmp_path / "mixture.json").read_text())
    assert (report.examples, report.dropped, report.sources) == (22, {"too_long": 1}, mixture.sources)
    assert report.tokens == sum(map(letters, mixture.examples))
    assert json.loads((tmp_path / "mixture.json").read_text())["max_examples"] == {"user": 3}
    assert tables.read(tmp_path / "dropped.parquet", Dropped) == also
    theirs = lineage.table(tmp_path / "mixture.parquet").naming(lineage.Ids({"u3"}, set(), set()))
    assert theirs.tolist() == [n for n, row in enumerate(rows) if row.example_id == "example-03"]


def test_weights_that_are_not_named_stay() -> None:
    config = SFTConfig.model_validate({"weights": {"safety": 0.5}})
    assert (config.weights["safety"], config.weights["user"], config.weights["general"]) == (0.5, 1.0, 0.0)
    for wrong in ({"weights": {"user": -1}}, {"weights": {"poems": 1}}, {"max_token_share": {"user": 2}},
                  {"max_examples": {"user": -1}}):  # fmt: skip
        with pytest.raises(ValueError, match=r"user|poems"):
            SFTConfig.model_validate(wrong)
