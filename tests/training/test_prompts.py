"""Which prompts RL learns from: by score, by variance, at random; a floor of ordinary ones; near-policy only."""

import math
import statistics
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_fixture import START, prompt

from characterflywheel.errors import FlywheelError
from characterflywheel.records import Candidate, Prompt
from characterflywheel.training.rl.prompts import By, choose

Scores = dict[int, list[float | None]]


def candidates(scores: Scores) -> list[Candidate]:
    return [
        Candidate(
            id=f"{number}-{i}", prompt_id=f"prompt-{number:02}", policy="a", text="x", finish_reason="stop", score=score
        )
        for number, several in scores.items()
        for i, score in enumerate(several)
    ]  # fmt: skip


def aged(number: int, days: float) -> Prompt:
    return prompt(number).model_copy(update={"created_at": START - timedelta(days=days)})


def test_each_rule_takes_its_own() -> None:
    """Means 3, 2, 1 and variances 0, 2, 8 by hand; the fourth prompt has one score, the fifth none."""
    scored = candidates({0: [3.0, 3.0], 1: [1.0, 3.0], 2: [-1.0, 3.0], 3: [9.0, None]})
    prompts = [prompt(i) for i in range(5)]

    def first(by: By, count: int) -> set[str]:
        chosen = choose(prompts, scored, count, by=by, ordinary_share=0.0, seed=1)
        return {one.prompt_id for one in chosen.why if one.reason == by}

    assert first("variance", 1) == {"prompt-02"}
    assert first("variance", 5) == {"prompt-02", "prompt-01"}, "equal scores leave nothing to compare"
    assert first("low_score", 1) == {"prompt-02"}
    assert first("low_score", 3) == {"prompt-02", "prompt-01", "prompt-00"}
    assert first("low_score", 5) == {f"prompt-0{i}" for i in range(4)}
    told = {one.prompt_id: one for one in choose(prompts, scored, 5, by="random", ordinary_share=0.0, seed=1).why}
    assert {one.reason for one in told.values()} == {"ordinary"}
    assert (told["prompt-02"].mean, told["prompt-02"].variance, told["prompt-02"].scores) == (1.0, 8.0, 2)
    assert (told["prompt-03"].mean, told["prompt-03"].variance, told["prompt-03"].scores) == (9.0, None, 1)
    assert (told["prompt-04"].mean, told["prompt-04"].variance, told["prompt-04"].scores) == (None, None, 0)


SCORE = st.one_of(st.none(), st.sampled_from([-1.0, 0.0, 0.5]), st.floats(-5, 5))


@settings(deadline=None, max_examples=60)
@given(
    scores=st.dictionaries(st.integers(0, 25), st.lists(SCORE, max_size=4), max_size=20),
    count=st.integers(1, 30), share=st.floats(0, 1), seed=st.integers(0, 99), shuffled=st.randoms(),
    by=st.sampled_from(["variance", "low_score", "random"]), many=st.integers(1, 25),
)  # fmt: skip
def test_what_always_holds(
    scores: Scores, count: int, share: float, seed: int, shuffled: object, by: By, many: int
) -> None:
    """Counts, the floor, no prompt twice, the best by the rule, the same whatever the order of what comes in."""
    prompts, scored = [prompt(i) for i in range(many)], candidates(scores)
    chosen = choose(prompts, scored, count, by=by, ordinary_share=share, seed=seed)
    assert [one.prompt_id for one in chosen.why] == [p.id for p in chosen.prompts]
    assert len({p.id for p in chosen.prompts}) == len(chosen.prompts) == min(count, many)
    ordinary = sum(one.reason == "ordinary" for one in chosen.why)
    assert ordinary >= min(math.ceil(share * count - 1e-6), many - (len(chosen.prompts) - ordinary))
    assert len(chosen.why) - ordinary <= count * (1 - share) + 1e-6
    known = {f"prompt-{n:02}": [s for s in several if s is not None] for n, several in scores.items()}
    for one in chosen.why:
        mine = known.get(one.prompt_id, [])
        assert one.scores == len(mine)
        assert one.mean == (statistics.fmean(mine) if mine else None)
    if by == "low_score":
        ruled = [one.mean for one in chosen.why if one.reason == by]
        left = {p.id for p in prompts} - {one.prompt_id for one in chosen.why if one.reason == by}
        assert all(m <= statistics.fmean(known[id]) for m in ruled if m is not None for id in left if known.get(id))
    mixed, turned = list(prompts) * 2, list(scored)
    shuffled.shuffle(mixed)  # type: ignore[attr-defined]
    shuffled.shuffle(turned)  # type: ignore[attr-defined]
    assert choose(mixed, turned, count, by=by, ordinary_share=share, seed=seed) == chosen


def test_only_fresh_prompts_are_near_policy() -> None:
    """A window of two days before the newest training prompt; what is held out is no prompt, however new."""
    prompts = [aged(0, 0.0), aged(1, 1.5), aged(2, 2.5), prompt(9, "evaluate").model_copy(update={"id": "later"})]
    prompts[3] = prompts[3].model_copy(update={"created_at": START + timedelta(days=9)})
    chosen = choose(prompts, [], 9, by="variance", ordinary_share=0.25, seed=1, fresh_days=2)
    assert {one.prompt_id: one.age_days for one in chosen.why} == {"prompt-00": 0.0, "prompt-01": 1.5}
    now = START + timedelta(days=1)
    later = choose(prompts, [], 9, by="variance", ordinary_share=0.25, seed=1, fresh_days=2, now=now)
    assert [p.id for p in later.prompts] == ["prompt-00"]
    with pytest.raises(FlywheelError, match=r"newest of 3 training prompts is 7.0 days old, at most 2 are near-policy"):
        choose(
            prompts, [], 9, by="random", ordinary_share=0.0, seed=1, fresh_days=2, now=START + timedelta(days=7)
        )  # fmt: skip


def test_bad_input_is_a_clear_error() -> None:
    for score in (math.nan, math.inf):
        with pytest.raises(FlywheelError, match=r"candidate 0-1 of prompt prompt-00 has score (nan|inf)"):
            choose([prompt(0)], candidates({0: [1.0, score]}), 1, by="variance", ordinary_share=0.0, seed=1)
    with pytest.raises(FlywheelError, match="count == 0, must be >= 1"):
        choose([prompt(0)], [], 0, by="variance", ordinary_share=0.0, seed=1)
    with pytest.raises(FlywheelError, match=r"ordinary_share == 1.5, must be in \[0, 1\]"):
        choose([prompt(0)], [], 1, by="variance", ordinary_share=1.5, seed=1)
    assert choose([prompt(0, "evaluate")], [], 3, by="variance", ordinary_share=0.0, seed=1).prompts == []
