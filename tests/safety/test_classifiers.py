"""The words that a pattern needs are really needed: looking for them first changes no verdict."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from characterflywheel.safety import classifiers

ALPHABET = st.characters(codec="ascii", exclude_categories=("Cc",))
CASES = [(category, rule) for category, rules in classifiers._RULES.items() for rule in rules]


@pytest.mark.parametrize(("category", "rule"), CASES, ids=[f"{category}-{n}" for n, (category, _) in enumerate(CASES)])
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_match_has_a_needed_word(category: str, rule: str, data: st.DataObject) -> None:
    """Texts drawn from each rule itself; the rules never read across the words' case or spaces."""
    text = data.draw(st.from_regex(re.compile(rule, re.ASCII), alphabet=ALPHABET)).lower()
    plain = classifiers.normalise(text)
    if re.search(rule, plain):
        assert any(word in plain for word in classifiers._NEEDED[category])


def test_needed_words_are_as_texts_are_after_being_made_plain() -> None:
    for words in classifiers._NEEDED.values():
        assert all(word == word.casefold() and word.isascii() for word in words)
        assert len(set(words)) == len(words)


@given(st.text(alphabet=st.characters(max_codepoint=0x250)))
def test_making_plain_ascii_is_no_different(text: str) -> None:
    """The short way for ASCII gives what the long way gives."""
    assert classifiers.normalise(text + "\u200b") == classifiers.normalise(text)
    plain = classifiers.normalise(text)
    assert classifiers.normalise(plain) == plain or not text.isascii()
