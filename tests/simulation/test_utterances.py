"""What simulated people say is what real people said."""

import numpy as np
from conftest_world import BagOfWords, Path

from characterflywheel.characters import bundled_characters
from characterflywheel.simulation.lore import Lore, gather
from characterflywheel.simulation.users import draw_crowd
from characterflywheel.simulation.utterances import CHALLENGES, ODD, challenge

CHARACTERS = list(bundled_characters().values())


def test_openers_are_real_and_differ(lore: Lore) -> None:
    said = lore.words.open(CHARACTERS, np.random.default_rng(0))
    assert set(said) <= set(lore.real.openers)
    assert len(set(said)) == len(said)
    assert said == lore.words.open(CHARACTERS, np.random.default_rng(0))
    assert said != lore.words.open(CHARACTERS, np.random.default_rng(1))


def test_answers_are_real_fit_the_reply_and_are_not_said_twice(lore: Lore) -> None:
    crowd = draw_crowd(lore.real.fits, 20, "answers")
    replies = [lore.real.exchanges[i].said for i in range(20)]
    first = lore.words.answer(crowd, replies, [set()] * 20, np.random.default_rng(0))
    assert set(first) <= {e.answer for e in lore.real.exchanges}
    again = lore.words.answer(crowd, replies, [{text} for text in first], np.random.default_rng(0))
    assert not any(a == b for a, b in zip(first, again, strict=True))
    said = {e.answer: e.said for e in lore.real.exchanges}
    near = lore.senses.embed([said[text] for text in first])
    fit = (near * lore.senses.embed(replies)).sum(axis=1).mean()
    assert fit > (lore.words.said_at @ lore.senses.embed(replies).T).mean() + 0.2


def test_testers_lean_on_instructions() -> None:
    rng = np.random.default_rng(0)
    lines = {challenge(character, rng) for character in CHARACTERS for _ in range(30)}
    assert lines & set(ODD)
    assert len(lines) > 15
    assert not any("{" in line for line in lines)
    rules = {i.rule.kind for c in CHARACTERS for i in c.instructions if i.rule}
    assert rules <= set(CHALLENGES)


def test_a_real_question_is_one_short_question(lore: Lore) -> None:
    question = lore.words.real_question("What do you like to eat?", longest=8)
    assert question is not None
    assert question.count("?") == 1
    assert len(question.split()) <= 8
    assert lore.words.real_question("food", longest=0) is None


def test_embeddings_come_back_from_the_cache_unchanged(lore: Lore, cache: Path) -> None:
    assert len(list(cache.glob("words-*.f16"))) == 1
    again = gather(BagOfWords(), cache)
    assert again.anchor == lore.anchor
    assert np.array_equal(again.words.said_at, lore.words.said_at)
