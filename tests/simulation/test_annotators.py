"""Annotators: they agree with one another more than chance, err, tire, and rewrite so that instructions are kept."""

import itertools

import numpy as np
import pytest
from conftest_world import BAD, GOOD

from characterflywheel import instructions
from characterflywheel.characters import bundled_characters
from characterflywheel.ids import derive_seed
from characterflywheel.records import Candidate, ChatMessage, Judgement, Task
from characterflywheel.simulation.annotators import is_templated, rewritten
from characterflywheel.simulation.lore import Lore
from characterflywheel.simulation.world import SimulatedPeople

CHARACTERS = bundled_characters()
REPLIES = (
    BAD,
    "The bread is fine I think.",
    GOOD,
    "I do not know what to say about the oven in the old kitchen of the house where",
)
ASKED = ChatMessage(role="user", content="I burnt my bread this morning, what should I do?")


def task(number: int, reviewer: str, replies: tuple[str, ...] = REPLIES, character: str = "baker") -> Task:
    return Task(
        id=f"t{number}-{reviewer}", kind="static", prompt_id=f"p{number}", character=CHARACTERS[character],
        history=(ASKED,), reviewer=reviewer,
        candidates=tuple(
            Candidate(id=f"c{k}", prompt_id=f"p{number}", policy="x", text=text, finish_reason="stop")
            for k, text in enumerate(replies)
        ),
    )  # fmt: skip


@pytest.fixture
def judged(people: SimulatedPeople) -> list[Judgement]:
    return people.judge([task(n, f"annotator-{k}") for n in range(25) for k in range(4)])


def test_judging_is_a_function_of_the_tasks(people: SimulatedPeople, judged: list[Judgement]) -> None:
    again = people.judge([task(n, f"annotator-{k}") for n in range(25) for k in range(4)])
    assert again == judged


def test_annotators_prefer_better_replies_but_disagree(judged: list[Judgement]) -> None:
    first = [one.ranking.index("c2") < one.ranking.index("c0") for one in judged]
    assert np.mean(first) > 0.9
    assert len({one.ranking for one in judged}) > 3


def test_annotators_see_what_is_broken_with_errors(judged: list[Judgement]) -> None:
    truth = set(instructions.violations(CHARACTERS["baker"], BAD))
    found = [set(one.answers[0].violates) for one in judged]
    hits = np.mean([len(f & truth) / len(truth) for f in found])
    assert 0.6 < hits < 1
    assert all(f <= set(instructions.verifiable(CHARACTERS["baker"])) for f in found)
    refusals = [np.mean([one.answers[k].false_refusal for one in judged]) for k in (0, 2)]
    assert refusals[0] > 0.6
    assert refusals[1] < 0.2


def test_judging_takes_time_and_annotators_tire(judged: list[Judgement]) -> None:
    mine = [one for one in judged if one.reviewer == "annotator-0"]
    assert all(one.seconds > 0 for one in mine)
    assert all(a.created_at < b.created_at for a, b in itertools.pairwise(mine))


def test_templates_are_phrases_that_come_again() -> None:
    twice = ("I see, tell me more about that my friend.", "Well, tell me more about that today.", "Bread is nice.")
    one = task(0, "annotator-0", twice)
    assert [is_templated(one, c) for c in one.candidates] == [True, True, False]


@pytest.mark.parametrize("name", sorted(CHARACTERS))
def test_rewrites_keep_every_instruction_when_nothing_is_forgotten(lore: Lore, name: str) -> None:
    character = CHARACTERS[name]
    for reply in REPLIES:
        rng = np.random.default_rng(derive_seed(name, reply))
        text = rewritten(character, (ASKED,), reply, 0.0, lore.words, rng)
        if text is None:
            assert not instructions.violations(character, reply), "nothing to put right"
        else:
            assert not instructions.violations(character, text), text
            assert len(text.split()) >= 3


def test_people_forget_an_instruction_now_and_then(lore: Lore) -> None:
    baker, rng = CHARACTERS["baker"], np.random.default_rng(0)
    texts = [rewritten(baker, (ASKED,), REPLIES[3], 1.0, lore.words, rng) for _ in range(20)]
    broken = [len(instructions.violations(baker, text)) for text in texts if text]
    assert max(broken) == 1
    assert sum(broken) > 5


def test_rewrites_come_where_even_the_best_reply_breaks_the_description(judged: list[Judgement]) -> None:
    for one in judged:
        best = next(a for a in one.answers if a.candidate_id == one.ranking[0])
        assert one.rewrite is None or best.violates
    assert any(one.rewrite for one in judged)
