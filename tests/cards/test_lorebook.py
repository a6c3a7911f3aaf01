"""Which lorebook entries a conversation calls for, by the rules of V2 and V3."""

import time
from typing import Any

import pytest

from characterflywheel.cards.card import CharacterBook
from characterflywheel.cards.decorators import has_decorators, read_decorators, without_decorators
from characterflywheel.cards.lorebook import Lore, Scene, lore_of, pattern_of
from characterflywheel.cards.macros import Voice
from characterflywheel.records import ChatMessage, Role

VOICE = Voice("Mira", "Ann", "mira")
ROLES: tuple[Role, ...] = ("user", "assistant")


def words(text: str) -> int:
    return len(text.split())


def lore(
    *entries: dict[str, Any], said: tuple[str, ...] = ("hello",), budget: int = 1000, greeting: int | None = None,
    **book: Any,
) -> tuple[Lore, ...]:  # fmt: skip
    """The entries called for after `said`, the last of which is the user's."""
    roles = [ROLES[(len(said) - 1 - at) % 2] for at in range(len(said))]
    history = [ChatMessage(role=role, content=text) for role, text in zip(roles, said, strict=True)]
    filled = [{"content": f"entry {number}", "insertion_order": number} | one for number, one in enumerate(entries)]
    found = CharacterBook.model_validate({"entries": filled} | book)
    return lore_of(found, Scene(history, greeting), VOICE, budget, words)


def numbers(found: tuple[Lore, ...]) -> list[int]:
    return [int(one.text.split()[-1]) for one in found]


@pytest.mark.parametrize(
    ("entry", "said", "called"),
    [
        ({"keys": ["Cellar"]}, "what is in the CELLAR?", True),
        ({"keys": ["cellar"]}, "cellars", True),
        ({"keys": ["cellar"]}, "hello", False),
        ({"keys": ["Cellar"], "case_sensitive": True}, "cellar", False),
        ({"keys": ["Cellar"], "case_sensitive": True}, "Cellar", True),
        ({"keys": ["STRASSE"]}, "straße", True),
        ({"keys": ["", " "]}, "hello", False),
        ({"keys": ["{{user}}"]}, "ann, is it?", True),
        ({"keys": ["cellar"], "enabled": False}, "cellar", False),
        ({"keys": ["cellar"], "content": " "}, "cellar", False),
        ({"keys": [], "constant": True}, "hello", True),
        ({"keys": ["a"], "constant": True, "enabled": False}, "a", False),
        ({"keys": ["cat"], "secondary_keys": ["dog"], "selective": True}, "cat", False),
        ({"keys": ["cat"], "secondary_keys": ["dog"], "selective": True}, "cat and dog", True),
        ({"keys": ["cat"], "secondary_keys": ["dog"], "selective": True}, "dog", False),
        ({"keys": ["cat"], "secondary_keys": ["dog"]}, "cat", True),
        ({"keys": ["cat"], "secondary_keys": [], "selective": True}, "cat", True),
        ({"keys": [r"/cel+ar\b/i"], "use_regex": True}, "CELLLAR", True),
        ({"keys": [r"/cel+ar\b/"], "use_regex": True}, "CELLLAR", False),
        ({"keys": [r"cel+ar\b"], "use_regex": True}, "CELLLAR", True),
        ({"keys": ["("], "use_regex": True}, "(", False),
        ({"keys": ["x"], "use_regex": True, "constant": True}, "hello", False),
        ({"keys": ["x"], "use_regex": True, "selective": True, "secondary_keys": ["y"]}, "x", True),
    ],
)
def test_keys(entry: dict[str, Any], said: str, called: bool) -> None:
    assert bool(lore(entry, said=(said,))) is called


@pytest.mark.parametrize(
    ("content", "said", "called"),
    [
        ("@@constant", ("hello",), True),
        ("@@activate", ("hello",), True),
        ("@@dont_activate", ("cat",), False),
        ("@@activate\n@@dont_activate", ("hello",), True),
        ("@@activate_only_after 2", ("a", "b", "cat"), False),
        ("@@activate_only_after 2", ("a", "b", "c", "d", "cat"), True),
        ("@@activate_only_every 2", ("a", "b", "cat"), False),
        ("@@activate_only_every 2", ("a", "b", "c", "d", "cat"), True),
        ("@@activate_only_every 0", ("a", "b", "cat"), True),
        ("@@scan_depth 1", ("cat", "b", "c"), False),
        ("@@scan_depth 3", ("cat", "b", "c"), True),
        ("@@scan_depth 0", ("cat",), False),
        ("@@additional_keys dog, bird", ("cat",), False),
        ("@@additional_keys dog, bird", ("cat bird",), True),
        ("@@additional_keys dog\n@@additional_keys bird", ("cat bird",), False),
        ("@@exclude_keys dog, bird", ("cat bird",), False),
        ("@@exclude_keys dog", ("cat",), True),
        ("@@dont_activate_after_match", ("cat", "b", "cat"), False),
        ("@@dont_activate_after_match", ("a", "b", "cat"), True),
        ("@@keep_activate_after_match", ("cat", "b", "c", "d", "e", "f", "hello"), True),
        ("@@keep_activate_after_match", ("a", "b", "hello"), False),
        ("@@unknown_to_us 4", ("cat",), True),
        ("@@unknown_to_us 4\n@@@constant", ("hello",), True),
        ("@@activate_only_after x\n@@@also_unknown\n@@@dont_activate", ("cat",), False),
        ("@@scan_depth 3\n@@@dont_activate", ("cat",), True),
        ("@@scan_depth 0\n@@scan_depth 9", ("cat",), False),
    ],
)
def test_decorators(content: str, said: tuple[str, ...], called: bool) -> None:
    found = lore({"keys": ["cat"], "content": f"{content}\n\nentry 0"}, said=said)
    assert [one.text for one in found] == (["entry 0"] if called else [])


@pytest.mark.parametrize(("active", "called"), [(1, True), (0, False), (None, True)])
def test_an_entry_for_one_greeting(active: int | None, called: bool) -> None:
    assert bool(lore({"keys": ["cat"], "content": "@@is_greeting 1\nx"}, said=("cat",), greeting=active)) is called


def test_places_and_roles() -> None:
    found = lore(
        {"constant": True, "content": "@@depth 2\n@@role assistant\nentry 0"},
        {"constant": True, "content": "@@position before_desc\n@@depth 2\nentry 1", "position": "before_char"},
        {"constant": True, "content": "@@position nowhere\nentry 2", "position": "before_char"},
        {"constant": True},
        {"constant": True, "content": "@@depth -3\nentry 4"},
    )
    assert [(one.position, one.depth, one.role) for one in found] == [
        ("after_char", 2, "assistant"), ("before_desc", None, "system"), ("before_char", None, "system"),
        ("after_char", None, "system"), ("after_char", 0, "system"),
    ]  # fmt: skip


def test_the_newest_messages_are_scanned() -> None:
    said = ("cat", "b", "c", "d", "e")
    assert not lore({"keys": ["cat"]}, said=said)
    assert lore({"keys": ["cat"]}, said=said, scan_depth=5)
    assert not lore({"keys": ["e"]}, said=said, scan_depth=0)


def test_entries_call_for_others_where_the_book_says_so() -> None:
    chain = ({"keys": ["cat"], "content": "the dog 0"}, {"keys": ["dog"], "content": "a bird 1"}, {"keys": ["bird"]})
    assert numbers(lore(*chain, said=("cat",), recursive_scanning=True)) == [0, 1, 2]
    assert numbers(lore(*chain, said=("cat",))) == [0]
    hidden = ({"keys": ["cat"], "content": "{{hidden_key:dog}}{{// bird}} 0"}, *chain[1:])
    assert [one.text for one in lore(*hidden, said=("cat",), recursive_scanning=True)] == ["0", "a bird 1", "entry 2"]


def test_lowest_priority_goes_first_and_order_is_kept() -> None:
    several = [{"constant": True, "priority": worth} for worth in (5, 1, 9)]
    assert numbers(lore(*several, token_budget=6)) == [0, 2]
    assert numbers(lore(*several, budget=3)) == [2]
    assert lore(*several, token_budget=0) == ()
    ordered = [{"constant": True, "insertion_order": order} for order in (30, 10, 20)]
    assert numbers(lore(*ordered)) == [1, 2, 0]
    assert numbers(lore(*ordered, budget=6)) == [2, 0], "without priority, the lowest insertion order goes"
    spare = [{"constant": True, "priority": 99, "content": "@@ignore_on_max_context\nentry 0"}, {"constant": True}]
    assert numbers(lore(*spare, budget=3)) == [1]
    assert [one.tokens for one in lore(*several)] == [3, 3, 3]


def test_decorators_leave_the_content() -> None:
    found = read_decorators("@@depth 5\n\n@@ROLE User \nLine one.\n@@not a decorator\n")
    assert (found.decorators.depth, found.decorators.role) == (5, "user")
    assert found.text == "Line one.\n@@not a decorator"
    assert read_decorators("@@ nothing").text == "@@ nothing"
    assert without_decorators("plain") == "plain"
    assert has_decorators("@@depth 5\nx")
    assert not has_decorators("a\n@@depth 5")


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"(?:(?:a{1,10}){1,10}){1,10}c", "a" * 16_000),
        (r"^(\w+\s?)+$", "word " * 3_000 + "!"),
        (r"((((((a*)*)*)*)*)*)*b", "a" * 16_000),
        (r"(.*)(.*)(.*)(.*)(.*)\1\2x{99}", "ab" * 8_000),
    ],
)
def test_a_catastrophic_pattern_costs_little(pattern: str, text: str) -> None:
    started = time.perf_counter()
    assert not lore(*({"keys": [pattern + str(n)], "use_regex": True} for n in range(100)), said=(text,))
    assert time.perf_counter() - started < 2, "100 ms by its own clock; the rest is for a busy machine"


@pytest.mark.parametrize(
    "pattern",
    ["(?R)a", "(?1)(a)", "(?&x)", "(?(1)a|b)", "(?:(?:a{99}){99}){99}", "a" * 301, "[", "", "(?P<x>a)", "\\", "(?<x"],
)
def test_a_pattern_without_bounds_matches_nothing(pattern: str) -> None:
    assert pattern_of(pattern, False) is None


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"/a\/b/", "a/b"), (r"(?<word>cat)", "cat"), (r"\p{L}{3}", "abc"), (r"x{e}", "x{e}"),
        (r"\(?cat\)?", "(cat)"), (r"(?<!dog )cat", "a cat"), ("/a.b/s", "a\nb"), (r"{", "{"), (r"c{1,3}t", "cct"),
    ],
)  # fmt: skip
def test_patterns_are_read_as_in_javascript(pattern: str, text: str) -> None:
    found = pattern_of(pattern, False)
    assert found is not None
    assert found.search(text) is not None


def test_a_book_that_asks_for_too_much_is_cut_short_in_time() -> None:
    entry = {"keys": [f"key {n}" for n in range(5)], "content": "@@keep_activate_after_match\nx"}
    started = time.perf_counter()
    assert lore(*[entry] * 2000, said=("k e y " * 2000,) * 101, scan_depth=50) == ()
    assert time.perf_counter() - started < 3
