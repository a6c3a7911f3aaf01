"""Samples are chosen by seed, and an interactive comparison favours neither model's history."""

from evaluation_fixture import Scripted, prompt

from characterflywheel.evaluation.side_by_side import choose, converse
from characterflywheel.llm.base import Sampling
from characterflywheel.records import ChatMessage

PROMPTS = [prompt(i, "internal" if i % 4 == 0 else "user") for i in range(40)]


def test_choice_is_by_seed_and_takes_turns_between_sources() -> None:
    chosen = choose(PROMPTS, 10, 7)
    assert chosen == choose(PROMPTS[::-1], 10, 7)
    assert chosen != choose(PROMPTS, 10, 8)
    assert [p.source for p in chosen] == ["internal", "user"] * 5
    assert choose(PROMPTS, 6, 7) == chosen[:6]


def test_when_one_source_runs_out_the_other_goes_on() -> None:
    chosen = choose(PROMPTS, 40, 7)
    assert len({p.id for p in chosen}) == 40
    assert choose(PROMPTS[1:4], 10, 7) != []


def test_either_answer_continues_the_conversation() -> None:
    old, new = Scripted("old", lambda said, seed: f"old {said}"), Scripted("new", lambda said, seed: f"new {said}")
    seen: list[str] = []

    def speak(history: list[ChatMessage]) -> str | None:
        seen.append(history[-1].content)
        return f"say {len(seen)}" if len(seen) <= 30 else None

    opening = [ChatMessage(role="system", content="You are Ada.")]
    turns = converse(opening, speak, old, new, turns=99, sampling=Sampling(), seed=3)
    assert [turn.said for turn in turns] == [f"say {i}" for i in range(1, 31)]
    assert (turns[0].old, turns[0].new) == ("old say 1", "new say 1")
    assert seen[1:] == [turn.new if turn.kept == "new" else turn.old for turn in turns]
    assert 8 <= sum(turn.kept == "new" for turn in turns) <= 22
    assert opening == [ChatMessage(role="system", content="You are Ada.")]
