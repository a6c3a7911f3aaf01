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
