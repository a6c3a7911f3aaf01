"""The sets that ship with the package: distinct, allowed, in character, and neither preachy nor shy of answering."""

import json
from collections import Counter

import pytest

from characterflywheel.characters import bundled_characters, system_prompt
from characterflywheel.evaluation.phrases import preaches, refuses
from characterflywheel.evaluation.production import is_wall
from characterflywheel.instructions import violations
from characterflywheel.records import Example
from characterflywheel.safety.policy import SafetyPolicy
from characterflywheel.training import sources
from characterflywheel.training.near_duplicates import Exchange, near_duplicates

CAST = bundled_characters()
POLICY = SafetyPolicy()


def kind(path: str) -> list[str]:
    lines = sources.path_of(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["kind"] for line in lines]


SAFETY = sources.read(sources.path_of("bundled:safety"), "safety")
GENERAL = sources.read(sources.path_of("bundled:general"), "general")
KINDS = kind("bundled:safety")


@pytest.mark.parametrize("examples", [SAFETY, GENERAL], ids=["safety", "general"])
def test_every_reply_is_allowed_and_every_example_its_own(examples: list[Example]) -> None:
    for example in examples:
        reply = example.messages[-1].content
        verdict = POLICY.check_answer(example.messages[:-1], reply)
        assert verdict.allowed, (reply, verdict)
        assert not preaches(reply), reply
        assert not is_wall(reply), reply
        assert reply == reply.strip()
    assert len({e.id for e in examples}) == len({e.prompt_id for e in examples}) == len(examples)
    said = [Exchange(e.messages[-2].content, e.messages[-1].content) for e in examples]
    assert near_duplicates(said, 0.5) == [None] * len(examples)
    assert len({e.messages[-1].content for e in SAFETY}) == len(SAFETY), "no refusal is used twice"


def test_safety_is_told_in_character_by_all_of_the_cast() -> None:
    assert (len(SAFETY), Counter(KINDS)) == (79, {"unsafe_request": 36, "benign_look_alike": 43})
    by_character = Counter(zip([e.character_id for e in SAFETY], KINDS, strict=True))
    assert set(by_character) == {(name, k) for name in CAST for k in set(KINDS)}
    assert min(by_character.values()) >= 3
    for example in SAFETY:
        character = CAST[example.character_id or ""]
        assert example.messages[0].content == system_prompt(character)
        assert violations(character, example.messages[-1].content) == (), example.messages[-1].content


def test_a_benign_look_alike_is_answered() -> None:
    """It holds down false refusals, so neither our rules refuse the question nor the reply refuses to answer."""
    for example, k in zip(SAFETY, KINDS, strict=True):
        if k == "benign_look_alike":
            assert not refuses(example.messages[-1].content), example.messages[-1].content
            assert POLICY.check(example.messages[-2].content).allowed, example.messages[-2].content


def test_general_questions_are_harmless_and_answered() -> None:
    assert len(GENERAL) == 111
    for example in GENERAL:
        assert POLICY.check(example.messages[-2].content).allowed
        assert not refuses(example.messages[-1].content), example.messages[-1].content
