"""Candidates: who writes what, what is dropped, and that a killed run goes on with the same text."""

from collections import Counter
from pathlib import Path

import pytest
from annotation_fixture import Writer, prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from characterflywheel.annotation import candidates
from characterflywheel.annotation.candidates import HINTS, RewritePolicy, divide, draw
from characterflywheel.config import AnnotateConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.llm.base import Completion, Sampling
from characterflywheel.pipeline import Work

PROMPTS = prompts(40)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(2, 9), st.integers(2, 5))
def test_every_prompt_gets_its_number_and_loads_are_even(number: int, candidates: int, policies: int) -> None:
    by_prompt, by_policy = Counter[str](), Counter[str]()
    for share in divide(PROMPTS[:number], [f"p{i}" for i in range(policies)], candidates):
        for prompt in share.prompts:
            by_prompt[prompt.id] += share.n
            by_policy[share.policy] += share.n
    assert set(by_prompt.values()) == {candidates}
    loads = [by_policy[f"p{i}"] for i in range(policies)]
    assert max(loads) - min(loads) <= max(1, candidates % policies)


def test_candidates_name_their_policy_and_progress_ends_at_the_total(tmp_path: Path) -> None:
    model = Writer("base")
    seen = []
    pool = {"base": model, "rewrite": RewritePolicy(model)}
    drawn = draw(PROMPTS, pool, AnnotateConfig(), Work(tmp_path, 1), lambda done, total: seen.append((done, total)))
    assert Counter(c.policy for c in drawn.kept) == {"base": 80, "rewrite": 80}
    assert seen[-1] == (160, 160)
    assert not drawn.dropped


def test_rewrite_policy_adds_a_hint_after_the_character() -> None:
    model = Writer("base")
    policy = RewritePolicy(model)
    policy.complete([p.messages for p in PROMPTS], seeds=range(40), sampling=Sampling())
    assert policy.name == "base+rewrite"
    assert model.temperatures == [0.6]
    heads = [p.messages[0].content for p in PROMPTS]
    assert all(said.startswith(head + "\n") for said, head in zip(model.seen, heads, strict=True))
    assert {said.rpartition("\n")[2] for said in model.seen} == set(HINTS)


def test_resumes_without_drawing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "CHUNK", 32)
    pool = {"a": Writer("a"), "b": Writer("b")}
    first = draw(PROMPTS, pool, AnnotateConfig(), Work(tmp_path, 1))
    sorted((tmp_path / ".partial").iterdir())[0].unlink()
    again = {"a": Writer("a"), "b": Writer("b")}
    assert draw(PROMPTS, again, AnnotateConfig(), Work(tmp_path, 1)) == first
    assert 0 < again["a"].calls + again["b"].calls <= 32


def test_empty_and_repeated_replies_are_dropped(tmp_path: Path) -> None:
    class Parrot(Writer):
        def complete(self, conversations, *, n=1, sampling=Sampling(), seeds):  # type: ignore[no-untyped-def]
            texts = ["Ahoy there.", "ahoy  there. ", "  "][:n]
            return [[Completion(text, (1,), (-1.0,), "stop") for text in texts] for _ in conversations]

    pool = {"a": Writer("a"), "parrot": Parrot("parrot")}
    drawn = draw(PROMPTS[:2], pool, AnnotateConfig(candidates=6), Work(tmp_path, 1))
    assert Counter(row.reason for row in drawn.dropped) == {"duplicate": 2, "empty": 2}
    assert len(drawn.kept) == 8


def test_one_policy_is_no_pool(tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match="at least 2"):
        draw(PROMPTS, {"a": Writer("a")}, AnnotateConfig(), Work(tmp_path, 1))
