"""Each style feature on a reply where its value is plain to see."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from characterflywheel.config import StyleConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.records import ChatMessage
from characterflywheel.style import features as features_module
from characterflywheel.style.features import FEATURES, Feature, count_features, measure, phrase_features

HISTORY = (
    ChatMessage(role="system", content="You are Ada."),
    ChatMessage(role="user", content="hi"),
    ChatMessage(role="assistant", content="What a fine day to look at the stars, friend."),
    ChatMessage(role="user", content="I love to walk by the old sea wall"),
)


@pytest.mark.parametrize(
    ("feature", "reply", "value"),
    [
        ("words", "Two words 🙂 -", 2),
        ("characters", "abc", 3),
        ("newlines", "a\nb\n\nc\n", 3),
        ("emojis", "hi 👨‍👩‍👧 🇫🇷 👍🏽", 3),
        ("has_emoji", "plain ☺", 1),
        ("has_emoji", "plain (c) :)", 0),
        ("list_marks", "Look:\n- one\n* two\n3. three\n# Four", 4),
        ("list_marks", "a - b, 3.5 and #tag", 0),
        ("questions", "Why? Really?!", 2),
        ("ends_with_question", "And you? 🙂", 1),
        ("ends_with_question", "Why? Because.", 0),
        ("exclamations", "Oh! Ah!!", 3),
        ("ellipses", "well... so… hm", 2),
        ("lower_case", "all small, i say", 1),
        ("lower_case", "Not all", 0),
        ("lower_case", "", 0),
        ("shouted_words", "WHAT are YOU DOING NOW", 2),
        ("stage_directions", "*waves* hello **you**", 1),
        ("bold", "*waves* hello **you**", 1),
        ("i_feel", "Sometimes I’m feeling old", 1),
        ("i_feel", "You feel old", 0),
        ("as_an_ai", "As an AI, I have no body", 1),
        ("as_an_ai", "I'm an artificial mind", 1),
        ("as_an_ai", "As an aide to the queen", 0),
        ("sorry", "I apologise, truly", 1),
        ("of_course", "Of course, friend", 1),
        ("of_course", "Well, of course", 0),
        ("i_am_glad", "I'm so glad you came", 1),
        ("i_share", "I like my hat", 0.5),
        ("you_share", "You and your hat", 0.5),
        ("user_echo", "the old sea wall", 1),
        ("user_echo", "a new thought entirely", 0),
        ("starts_like_user", "I love that!", 1),
        ("starts_like_before", "What a walk!", 1),
        ("starts_like_before", "A walk!", 0),
        ("repeated_runs", "row row row row row", 1 - 1 / 3),
        ("own_words", "what a fine day it is", 1 / 3),
        ("unfinished", "and then I", 1),
        ("unfinished", "and then I went,", 1),
        ("unfinished", "and then I went. 🙂", 0),
    ],
)
def test_feature(feature: str, reply: str, value: float) -> None:
    assert measure(HISTORY, reply)[feature] == pytest.approx(value)


def test_every_feature_has_an_example_above() -> None:
    marks = [mark for mark in test_feature.pytestmark if mark.name == "parametrize"]
    assert {case[0] for case in marks[0].args[1]} == set(FEATURES)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80))
def test_features_are_finite_and_binary_ones_are_0_or_1(reply: str) -> None:
    for name, value in measure(HISTORY, reply).items():
        assert 0 <= value < 1e4
        assert FEATURES[name].kind == "real" or value in (0, 1)


def test_phrases_are_whole_words() -> None:
    features = phrase_features(["sea"])
    assert measure((), "The Sea!", features) == {"says: sea": 1}
    assert measure((), "The season", features) == {"says: sea": 0}
    with pytest.raises(FlywheelError, match="is empty"):
        phrase_features([" "])


def test_patterns_are_counted() -> None:
    """Two tildes in a row are one match of `~+`; a pattern that also matches nothing counts only what it finds."""
    features = count_features({"tildes": "~+", "sighs": "sigh(s|ed)?", "stars": "[*]*"})
    assert measure((), "He SIGHED~~ and sighs ~ **so**", features) == {"tildes": 2, "sighs": 2, "stars": 2}
    assert {feature.kind for feature in features.values()} == {"real"}
    with pytest.raises(FlywheelError, match=r"'words' is built in \(words\): give another name"):
        count_features({"words": "x"})
    with pytest.raises(FlywheelError, match=r"'open': '\(' is no regular expression"):
        StyleConfig(counts={"open": "("})


def test_the_example_of_a_new_feature_in_the_docstring_is_a_feature() -> None:
    """One line of Python, as the module's docstring shows it."""
    line = next(line for line in (features_module.__doc__ or "").splitlines() if '"shorter": ' in line)
    new = eval(f"{{{line}}}", {"Feature": Feature})
    assert measure(HISTORY, "Old?", new) == {"shorter": 1}
    assert measure(HISTORY, "Old is the wall, and the sea is older still", new) == {"shorter": 0}
