"""What a reader notices: each feature on replies that differ in it alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from characterflywheel.characters import bundled_characters
from characterflywheel.records import ChatMessage
from characterflywheel.simulation.lore import Lore
from characterflywheel.simulation.senses import NOTICED, Scene, unfinished

BAKER = bundled_characters()["baker"]
HISTORY = (ChatMessage(role="user", content="I burnt my bread this morning, what should I do?"),)


def notice(lore: Lore, reply: str, history: tuple[ChatMessage, ...] = HISTORY) -> dict[str, float]:
    return dict(zip(NOTICED, lore.senses.observe([Scene(BAKER, history, reply)])[0].tolist(), strict=True))


def test_features_tell_replies_apart(lore: Lore) -> None:
    plain = notice(lore, "The bread is nice today.")
    assert notice(lore, "What bread did you burn this morning?")["relevance"] > plain["relevance"]
    assert notice(lore, "The bread is nice. What did you bake?")["question"] == 1
    assert notice(lore, "The bread is nice. What did you bake?")["curiosity"] == 1
    assert notice(lore, "- bread\n- milk\n- eggs")["lists"] > 0.7
    assert notice(lore, "As an AI language model, I cannot help with that.")["refusal"] > 0.7
    assert notice(lore, "It is important to keep in mind that ovens are hot.")["preachy"] > 0.7
    assert notice(lore, "Blorgh fnarp zzt wibblesnork grantle.")["gibberish"] == 1
    assert notice(lore, "The bread is nice 🍞🍞")["emojis"] == 2
    assert plain["gibberish"] < 0.5
    assert plain["refusal"] == plain["preachy"] == plain["lists"] == plain["unsafe"] == 0


def test_saying_it_again_is_noticed(lore: Lore) -> None:
    said = "Try again with a cooler oven and some patience."
    history = (*HISTORY, ChatMessage(role="assistant", content=said), *HISTORY)
    assert notice(lore, said, history)["novelty"] == 0
    assert notice(lore, said, history)["repetition"] > 0.9
    assert notice(lore, said)["repetition"] == 0


@pytest.mark.parametrize(
    ("reply", "low", "high"),
    [("Good morning.", 0, 0), ("Good morning 🙂", 0, 0), ("I went to the", 1, 1), ("", 1, 1), ("so nice", 0.05, 0.5)],
)
def test_unfinished(reply: str, low: float, high: float) -> None:
    assert low <= unfinished(reply) <= high


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=80))
def test_features_are_bounded_whatever_is_said(lore: Lore, reply: str) -> None:
    seen = np.array(list(notice(lore, reply).values()))
    assert np.isfinite(seen).all()
    assert (seen[:-2] >= 0).all()
    assert (seen[:-2] <= 1 + 1e-9).all()
