"""Rules are exact, and repairing a reply makes it follow them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from characterflywheel.characters import bundled_characters
from characterflywheel.instructions import emojis, follows, repair, repair_all, sentences, verifiable, violations
from characterflywheel.records import Character, Instruction, Rule

RULES = {
    "max_words": Rule(kind="max_words", number=5),
    "ends_with_question": Rule(kind="ends_with_question"),
    "exactly_one_emoji": Rule(kind="exactly_one_emoji"),
    "no_emoji": Rule(kind="no_emoji"),
    "lower_case": Rule(kind="lower_case"),
    "no_lists": Rule(kind="no_lists"),
    "must_mention": Rule(kind="must_mention", words=("the sea", "sea", "tide")),
    "never_mention": Rule(kind="never_mention", words=("land", "home")),
    "calls_user": Rule(kind="calls_user", words=("matey",)),
    "speaks_of_itself_as": Rule(kind="speaks_of_itself_as", words=("this unit",)),
}


@pytest.mark.parametrize(
    ("kind", "reply"),
    [
        ("max_words", "one two three four five"),
        ("max_words", "one two — three 🙂 four five !"),
        ("ends_with_question", "How are you?"),
        ("ends_with_question", 'She asked, "Why?" 😊'),
        ("ends_with_question", "*waves* Really?!"),
        ("ends_with_question", "你好吗？"),
        ("exactly_one_emoji", "A whole family 👨‍👩‍👧‍👦 came"),
        ("exactly_one_emoji", "Copyright © is text, 👍🏽 is not"),
        ("no_emoji", "Trademark ™ → café"),
        ("lower_case", "hello, it's 5 o'clock in straße"),
        ("no_lists", "In 2024. That was it - well, *smiles* and 3.5 of them"),
        ("no_lists", "First, one. Then 2. Nothing else"),
        ("must_mention", "The TIDE, you see."),
        ("never_mention", "Homely islands, landlubber"),
        ("calls_user", "Ahoy, Matey!"),
        ("speaks_of_itself_as", "This unit owns a mine, i.e. a hole; it is in Meiringen"),
    ],
)
def test_follows(kind: str, reply: str) -> None:
    assert follows(RULES[kind], reply)


@pytest.mark.parametrize(
    ("kind", "reply"),
    [
        ("max_words", "one two three four five six"),
        ("ends_with_question", "How are you? Fine."),
        ("ends_with_question", ""),
        ("exactly_one_emoji", "none"),
        ("exactly_one_emoji", "two 🙂🙂"),
        ("no_emoji", "a flag 🇳🇴"),
        ("lower_case", "Hello"),
        ("no_lists", "Here:\n- one\n- two"),
        ("no_lists", "  2) two"),
        ("no_lists", "Here: 1. eat 2. sleep"),
        ("must_mention", "The season of tidings"),
        ("never_mention", "go HOME."),
        ("calls_user", "Hello, mateys"),
        ("speaks_of_itself_as", "That is fine with me."),
        ("speaks_of_itself_as", "I’m here"),
        ("speaks_of_itself_as", "well, i think so"),
    ],
)
def test_breaks(kind: str, reply: str) -> None:
    assert not follows(RULES[kind], reply)


@pytest.mark.parametrize(
    ("kind", "reply", "expected"),
    [
        ("max_words", "One two. Three four five six.", "One two."),
        ("max_words", "I want to go to the market today", "I want to go."),
        ("ends_with_question", "A fine day for it. Do you agree? Yes", "A fine day for it. Do you agree?"),
        ("exactly_one_emoji", "Bread 🍞 is 🥐 good 🧁.", "Bread 🍞 is good."),
        ("no_emoji", "Hi 🙂 there 🙂", "Hi there"),
        ("lower_case", "Hello World", "hello world"),
        ("no_lists", "Try:\n1. sleep\n2. tea", "Try: sleep tea"),
        ("never_mention", "We sail. We never go home. Aye!", "We sail. Aye!"),
        ("calls_user", "Good day! How are you?", "Good day, matey! How are you?"),
        ("speaks_of_itself_as", "I'm in. I like my broom.", "This unit is in. This unit likes this unit's broom."),
    ],
)  # fmt: skip
def test_repairs_read_well(kind: str, reply: str, expected: str) -> None:
    assert repair(RULES[kind], reply) == expected


PIECES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["🙂", "👩‍🚀", "1️⃣", "\u200d", "\ufe0f", "🏽", "🇳", "I", "I'm", "me", "mine", "my", "land", "the sea", "matey"]
    ),
    st.sampled_from(["- ", "\n", "1. ", "2) ", "\n* ", "?", "!", ".", "?!", " ", "ΑΣ", "İ", "ǅ", "𝐀", "’"]),
)
REPLIES = st.lists(PIECES, max_size=12).map("".join)


@pytest.mark.parametrize("kind", sorted(RULES))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(reply=REPLIES)
def test_repair_makes_a_reply_follow(kind: str, reply: str) -> None:
    repaired = repair(RULES[kind], reply)
    assert follows(RULES[kind], repaired)
    assert repair(RULES[kind], repaired) == repaired


def test_violations_are_numbers_of_rule_bearing_instructions() -> None:
    character = Character(
        id="x", name="X", category="c", traits=(), greeting="",
        instructions=(
            Instruction(text="Be kind."),
            Instruction(text="Be brief.", rule=RULES["max_words"]),
            Instruction(text="Ask.", rule=RULES["ends_with_question"]),
        ),
    )  # fmt: skip
    assert verifiable(character) == (1, 2)
    assert violations(character, "Why?") == ()
    assert violations(character, "This reply is too long by two.") == (1, 2)


@pytest.mark.parametrize("character", bundled_characters().values(), ids=lambda character: character.id)
@pytest.mark.parametrize(
    "reply",
    [
        "I'm so glad you asked! Here is what I think:\n1. I went home by luck.\n2. The dead land is nice, and I like",
        "Sure, I can help",
        "😀 That is a lovely thought 😀 and I would like to hear a great deal more about all of it, my friend, because "
        "I have been alone here for such a very long time and nobody ever talks to me about anything at all today.",
        "",
    ],
)
def test_repair_all_satisfies_every_rule_of_a_character(character: Character, reply: str) -> None:
    assert violations(character, repair_all(character, reply)) == ()


def test_small_parts() -> None:
    assert emojis("a 👩‍🚀 b ☕ ©") == ("👩‍🚀", "☕")
    assert sentences("Hi there! 1. eat well. Why?\nOh") == ["Hi there!", "1. eat well.", "Why?", "Oh"]


@pytest.mark.parametrize(
    "rule",
    [
        {"kind": "max_words"},
        {"kind": "calls_user"},
        {"kind": "max_words", "number": 0},
        {"kind": "must_mention", "words": ["", "a"]},
    ],
)
def test_a_rule_without_what_it_needs_is_refused(rule: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Rule.model_validate(rule)
