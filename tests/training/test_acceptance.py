"""The rules of acceptance: what they take, what they leave, and why."""

import math
from collections import Counter
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from characterflywheel.config import RejectionConfig
from characterflywheel.records import Candidate, Scored
from characterflywheel.training.selection.acceptance import UNACCEPTABLE, Verdicts, decide

Rows = list[tuple[int, float]]
"""Candidates as (prompt, score); prompt p is of character p % 3."""
ROWS = st.lists(st.tuples(st.integers(0, 8), st.integers(-20, 20).map(lambda n: n / 4)), min_size=1, max_size=60)
RULES = st.sampled_from([{"accept": "share", "accept_share": 0.5}, {"accept": "best"},
                         {"accept": "threshold", "min_score": 0.5}])  # fmt: skip


def decided(rows: Rows, texts: dict[int, str] | None = None, backwards: bool = False, **config: Any) -> Verdicts:
    named = [f"{n:02}" for n in range(len(rows))]
    candidates: dict[str, list[Candidate]] = {}
    for n, (prompt, _) in enumerate(rows):
        text = (texts or {}).get(n, f"text {n}")
        candidates.setdefault(f"p{prompt}", []).append(
            Candidate(
                id=named[n], prompt_id=f"p{prompt}", policy="a", text=text.removesuffix("..."),
                finish_reason="length" if text.endswith("...") else "stop",
            )
        )  # fmt: skip
    parts = {
        named[n]: Scored(score=score, preference=score, vetoed="harm" if "poison" in (texts or {}).get(n, "") else None)
        for n, (_, score) in enumerate(rows)
    }
    if backwards:
        candidates = {p: several[::-1] for p, several in reversed(candidates.items())}
    return decide(candidates, parts, {p: f"c{int(p[1:]) % 3}" for p in candidates}, RejectionConfig(**config))


def kept(verdicts: Verdicts) -> list[int]:
    return sorted(int(id) for id, reason in verdicts.reasons.items() if reason is None)


def test_each_reason_is_told() -> None:
    """One prompt, best first: cut off, unsafe, empty, good, the same again, the next best, which is not asked for."""
    texts = {0: "the sea and...", 1: "poison", 2: " ", 3: "fine", 4: "fine ", 5: "well"}
    rows = [(0, 9.0), (0, 8.0), (0, 7.0), (0, 6.0), (0, 5.0), (0, 4.0)]
    reasons = decided(rows, texts).reasons
    assert list(reasons.values()) == ["cut_off", "unsafe", "empty", None, "repeated", "not_best"]


def test_a_share_of_prompts_best_score_best() -> None:
    """Best replies 3, 2, 1, 0: half of the prompts is two, so 2 is the threshold."""
    rows = [(0, 3.0), (1, 2.0), (2, 1.0), (3, 0.0), (0, 2.5)]
    verdicts = decided(rows, accept_share=0.5)
    assert (kept(verdicts), verdicts.threshold) == ([0, 1], 2.0)
    assert [verdicts.reasons[i] for i in ("02", "03", "04")] == ["below_threshold", "below_threshold", "not_best"]
    assert kept(decided(rows, accept_share=0.5, accept_per_prompt=2)) == [0, 1, 4]


def test_best_takes_all_and_a_threshold_is_absolute() -> None:
    rows = [(0, 3.0), (1, 2.0), (2, 1.0), (3, 0.0)]
    assert kept(decided(rows, accept="best")) == [0, 1, 2, 3]
    assert kept(decided(rows, accept="threshold", min_score=1.0)) == [0, 1, 2]
    nothing = decided(rows, accept="threshold", min_score=9.0)
    assert kept(nothing) == []
    assert set(nothing.reasons.values()) == {"below_threshold"}


def test_a_margin_is_over_the_typical_candidate() -> None:
    """Prompt 0 has 4, 3, 0 (median 3, mean 7/3); prompt 1 has 9, 9, 9."""
    rows = [(0, 4.0), (0, 3.0), (0, 0.0), (1, 9.0), (1, 9.0), (1, 9.0)]
    for over, margin, expected in (("median", 1.0, [0]), ("median", 1.1, []), ("mean", 1.6, [0]), ("mean", 1.7, [])):
        verdicts = decided(rows, accept="best", margin=margin, margin_over=over)
        assert kept(verdicts) == expected
        assert verdicts.reasons["03"] == "small_margin"


def test_a_loud_character_leaves_its_places_to_the_next_best() -> None:
    """Prompts 0, 3, 6 are of one character and score best. Of 3 places it may have half, rounded up: 2."""
    rows = [(0, 9.0), (3, 8.0), (6, 7.0), (1, 3.0), (2, 2.0), (4, 1.0)]
    assert kept(decided(rows, accept_share=0.5)) == [0, 1, 2]
    verdicts = decided(rows, accept_share=0.5, max_character_share=0.5)
    assert kept(verdicts) == [0, 1, 3]
    assert (verdicts.reasons["02"], verdicts.reasons["04"]) == ("character_quota", "below_threshold")
    assert kept(decided(rows, accept_share=0.5, max_per_character=1)) == [0, 3, 4]
    assert kept(decided(rows, accept="best", max_per_character=1)) == [0, 3, 4]


def test_among_few_characters_nobody_can_have_less_than_an_equal_share() -> None:
    rows = [(0, 9.0), (3, 8.0), (1, 3.0), (4, 2.0)]
    assert kept(decided(rows, accept="best", max_character_share=0.1)) == [0, 1, 2, 3]
    alone = [(0, 9.0), (3, 8.0)]
    assert kept(decided(alone, accept="best", max_character_share=0.1)) == [0, 1]


@given(ROWS, RULES, st.integers(1, 3), st.sampled_from([None, 0.0, 1.0]))
def test_what_is_accepted_is_best_of_its_prompt_and_above_what_is_not(
    rows: Rows, rule: dict[str, Any], each: int, margin: float | None
) -> None:
    verdicts = decided(rows, accept_per_prompt=each, margin=margin, **rule)
    taken = kept(verdicts)
    assert len(verdicts.reasons) == len(rows)
    assert max(Counter(rows[n][0] for n in taken).values(), default=0) <= each
    for n in taken:
        assert verdicts.threshold is not None
        assert rows[n][1] >= verdicts.threshold
        better = [m for m, (prompt, score) in enumerate(rows) if prompt == rows[n][0] and score > rows[n][1]]
        assert set(better) <= set(taken), "a prompt's better replies come first"
        if margin is not None:
            assert rows[n][1] - median(s for p, s in rows if p == rows[n][0]) >= margin
    if rule["accept"] == "share" and margin is None:
        prompts = {p for p, _ in rows}
        assert len({rows[n][0] for n in taken}) >= max(1, round(0.5 * len(prompts)))


@given(ROWS, RULES, st.sampled_from([None, 0.2, 0.4, 0.7]), st.sampled_from([None, 1, 2, 5]))
def test_quotas_are_kept_and_no_place_is_lost_that_could_be_filled(
    rows: Rows, rule: dict[str, Any], share: float | None, most: int | None
) -> None:
    free = kept(decided(rows, **rule))
    verdicts = decided(rows, max_character_share=share, max_per_character=most, **rule)
    taken = kept(verdicts)
    by_character = Counter(rows[n][0] % 3 for n in taken)
    best = {p: max(s for q, s in rows if q == p) for p in {p for p, _ in rows}}
    reach = best if rule["accept"] == "share" else {rows[n][0]: rows[n][1] for n in free}
    supply = Counter(p % 3 for p in reach)
    if not taken:
        assert not free
        return
    held = max(share or 1.0, 1 / len(supply))

    def quota(total: int) -> int:
        return min(most or len(rows), math.ceil(held * total - 1e-9))

    assert len(taken) <= len(free)
    assert all(n <= quota(len(taken)) for n in by_character.values())
    for total in range(len(taken) + 1, len(free) + 1):
        assert sum(min(n, quota(total)) for n in supply.values()) < total, "one more could not have been placed"


@given(ROWS, RULES, st.sampled_from([None, 0.4]))
def test_the_order_of_candidates_does_not_matter(rows: Rows, rule: dict[str, Any], share: float | None) -> None:
    one, other = (decided(rows, None, backwards, max_character_share=share, **rule) for backwards in (False, True))
    assert one == other


@given(ROWS, st.lists(st.sampled_from(["", "same", "poison", "cut..."]), max_size=60), RULES)
def test_what_is_unacceptable_stays_out_under_every_rule(rows: Rows, texts: list[str], rule: dict[str, Any]) -> None:
    verdicts = decided(rows, dict(enumerate(texts)), max_character_share=0.5, **rule)
    for n, text in enumerate(texts[: len(rows)]):
        if text != "same":
            assert verdicts.reasons[f"{n:02}"] in UNACCEPTABLE


def test_a_threshold_and_its_score_go_together() -> None:
    for bad in ({"accept": "threshold"}, {"accept": "best", "min_score": 1.0}):
        with pytest.raises(ValueError, match="go together"):
            RejectionConfig(**bad)  # type: ignore[arg-type]
