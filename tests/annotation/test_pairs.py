"""Pairs: labels are shares of reviewers, every filter has its reason, whole users are held out."""

import pytest
from annotation_fixture import START, prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from characterflywheel.annotation.pairs import Reviewed, held_out_users, make_pairs
from characterflywheel.config import AnnotateConfig
from characterflywheel.records import Answers, Candidate, Judgement, Prompt

INTERNAL, USER = prompts(2)
CONFIG = AnnotateConfig(max_length_ratio=3, max_emoji_difference=2)


def reviewed(
    prompt: Prompt,
    texts: dict[str, str],
    rankings: list[str],
    violates: dict[str, tuple[int, ...]] | None = None,
    rewrites: list[str | None] | None = None,
) -> Reviewed:
    """Candidates named by single letters; a ranking is a word of them, best first."""
    broken = violates or {}
    candidates = {
        name: Candidate(id=name, prompt_id=prompt.id, policy=f"p-{name}", text=text, finish_reason="stop")
        for name, text in texts.items()
    }
    judgements = [
        Judgement(
            id=f"j{number}", task_id=f"t{number}", prompt_id=prompt.id, reviewer=f"annotator-{number}",
            answers=tuple(
                Answers(candidate_id=name, false_refusal=False, templated=False, violates=broken.get(name, ()))
                for name in ranking
            ),
            ranking=tuple(ranking), rewrite=rewrites[number] if rewrites else None, seconds=1.0, created_at=START,
        )
        for number, ranking in enumerate(rankings)
    ]  # fmt: skip
    return Reviewed(prompt, candidates, judgements)


def test_labels_are_shares_of_reviewers() -> None:
    """Rankings abc, acb, bac: a over b by 2 of 3, a over c by 3 of 3, b over c by 2 of 3."""
    one = reviewed(USER, {"a": "one two", "b": "two three", "c": "three four"}, ["abc", "acb", "bac"])
    kept = make_pairs([one], CONFIG, 1).kept
    found = {(p.chosen_policy, p.rejected_policy): (p.label, p.reviewers) for p in kept}
    assert found == {
        ("p-a", "p-b"): (pytest.approx(2 / 3), 3),
        ("p-a", "p-c"): (1.0, 3),
        ("p-b", "p-c"): (pytest.approx(2 / 3), 3),
    }
    assert all(p.prompt == USER.messages and p.chosen[0].role == "assistant" for p in kept)


def test_strength_is_how_far_apart_reviewers_rank_a_pair() -> None:
    """Four candidates, so three places at most. Rankings abcd and bacd.

    a over b: +1 and -1 places, a tie. a over c: +2 and +1, (2/3 + 1/3) / 2 = 1/2; so is b over c. a over d: +3 and +2,
    5/6; so is b over d. c over d: +1 twice, 1/3.
    """
    texts = {"a": "one two", "b": "two three", "c": "three four", "d": "four five"}
    config = CONFIG.model_copy(update={"keep_ties": True})
    kept = make_pairs([reviewed(USER, texts, ["abcd", "bacd"])], config, 1).kept
    found = {p.chosen_policy[-1] + p.rejected_policy[-1]: (p.label, p.strength) for p in kept}
    expected = {"ab": 0.0, "ac": 1 / 2, "ad": 5 / 6, "bc": 1 / 2, "bd": 5 / 6, "cd": 1 / 3}
    assert found == {
        name: (0.5 if name == "ab" else 1.0, pytest.approx(strength)) for name, strength in expected.items()
    }


def test_a_majority_by_small_steps_against_one_large_step_has_no_strength() -> None:
    """a over b by one place for two reviewers, b over a by three places for one: (1 + 1 - 3) / 9 is below 0."""
    texts = {"a": "one two", "b": "two three", "c": "three four", "d": "four five"}
    kept = make_pairs([reviewed(USER, texts, ["abcd", "cdab", "bcda"])], CONFIG, 1).kept
    pair = next(p for p in kept if {p.chosen_policy, p.rejected_policy} == {"p-a", "p-b"})
    assert (pair.chosen_policy, pair.label, pair.strength) == ("p-a", pytest.approx(2 / 3), 0.0)


def test_kept_ties_train_and_are_never_held_out() -> None:
    texts = {"a": "one two", "b": "two three"}
    rows = [reviewed(prompt, texts, ["ab", "ba"]) for prompt in prompts(40, 10)]
    out = held_out_users([one.prompt for one in rows], CONFIG.held_out_share, 1)
    pairs = make_pairs(rows, CONFIG.model_copy(update={"keep_ties": True}), 1)
    assert {p.user_id for p in pairs.kept} == {one.prompt.user_id for one in rows} - out
    assert {(p.label, p.strength, p.held_out) for p in pairs.kept} == {(0.5, 0.0, False)}
    assert {row.reason for row in pairs.dropped} == {"tie"}
    assert len(pairs.kept) + len(pairs.dropped) == 40


def reasons(one: Reviewed) -> list[str]:
    pairs = make_pairs([one], CONFIG, 1)
    return [row.reason for row in pairs.dropped] + ["kept"] * len(pairs.kept)


def test_reasons() -> None:
    assert reasons(reviewed(USER, {"a": "one two", "b": "two three"}, ["ab", "ba"])) == ["tie"]
    assert reasons(reviewed(USER, {"a": "One two", "b": "one  two"}, ["ab"])) == ["identical"]
    assert reasons(reviewed(USER, {"a": "one", "b": "one two three four"}, ["ab"])) == ["length_ratio"]
    assert reasons(reviewed(USER, {"a": "one", "b": "one two three"}, ["ab"])) == ["kept"]
    assert reasons(reviewed(USER, {"a": "one 🙂🙂🙂", "b": "one two"}, ["ab"])) == ["emoji_difference"]
    assert reasons(reviewed(USER, {"a": "one 🙂🙂", "b": "one two"}, ["ab"])) == ["kept"]


def test_steerability_pairs_must_improve_on_the_description() -> None:
    texts = {"a": "one two", "b": "two three"}
    both = {"a": (0, 1), "b": (0, 1)}
    assert reasons(reviewed(INTERNAL, texts, ["ab"], both)) == ["both_break_description"]
    assert reasons(reviewed(INTERNAL, texts, ["ab"], {"a": (0,), "b": (0, 1)})) == ["kept"]
    assert reasons(reviewed(INTERNAL, texts, ["ab"], {"b": (0,)})) == ["kept"]
    assert reasons(reviewed(USER, texts, ["ab"], both)) == ["kept"]


def test_rewrites_beat_the_best_ranked_reply_and_become_examples() -> None:
    texts = {"a": "one two", "b": "two three"}
    one = reviewed(USER, texts, ["ab", "ba"], rewrites=["A better line?", " A better line? "])
    pairs = make_pairs([one], CONFIG, 1)
    rewritten = [(p.chosen[0].content, p.rejected_policy, p.label) for p in pairs.kept if p.chosen_policy == "rewrite"]
    assert rewritten == [("A better line?", "p-a", 1.0), ("A better line?", "p-b", 1.0)]
    assert [example.messages[-1].content for example in pairs.rewrites] == ["A better line?"]
    assert pairs.rewrites[0].messages[:-1] == USER.messages


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 60), st.integers(2, 20), st.floats(0.1, 0.5), st.integers(0, 99))
def test_held_out_users_are_some_but_never_all(number: int, users: int, share: float, seed: int) -> None:
    rows = prompts(number, users)
    chosen = held_out_users(rows, share, seed)
    for source in ("internal", "user"):
        people = {p.user_id for p in rows if p.source == source}
        if len(people) > 1:
            assert 0 < len(chosen & people) < len(people)


def test_held_out_share_is_met() -> None:
    rows = prompts(400, 200)
    chosen = held_out_users(rows, 0.25, 1)
    assert abs(sum(p.user_id in chosen for p in rows) / 400 - 0.25) < 0.02
