"""Characters: the bundled dozen is sound, and a bad file is one clear error."""

from pathlib import Path
from typing import get_args

import pytest

from characterflywheel.characters import bundled_characters, load_characters, system_prompt
from characterflywheel.errors import FlywheelError
from characterflywheel.instructions import emojis, verifiable, violations
from characterflywheel.records import RuleKind

GOOD = 'name = "A"\ncategory = "c"\ntraits = ["kind"]\ngreeting = "Hi"\n[[instructions]]\ntext = "Be brief."\n'


def test_bundled_characters_are_varied_and_follow_their_own_rules() -> None:
    characters = bundled_characters()
    assert len(characters) == 12
    assert list(characters) == sorted(characters)
    kinds = set()
    for character in characters.values():
        assert 2 <= len(verifiable(character)) <= 3
        assert violations(character, character.greeting) == ()
        for rule in filter(None, (one.rule for one in character.instructions)):
            kinds.add(rule.kind)
            if rule.kind == "exactly_one_emoji":
                assert all(emojis(word) == (word,) for word in rule.words)
    assert kinds == set(get_args(RuleKind))


def test_system_prompt_is_name_traits_and_instructions_as_plain_lines() -> None:
    assert system_prompt(bundled_characters()["coach"]) == (
        "You are Coach Dina Marsh: a boxing coach, loud, loyal, never gives up on anyone.\n"
        "Cheer the user on.\nCall the user champ.\nNever write a list.\nAnswer in at most 25 words."
    )
    assert max(len(system_prompt(character).split()) for character in bundled_characters().values()) <= 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.split("[[", maxsplit=1)[0], "the character has no instructions"),
        ("name = ", "not valid TOML"),
        (GOOD + "hue = 1\n", "hue"),
        (GOOD + 'rule = { kind = "max_words" }\n', "max_words needs a number"),
        (GOOD + 'rule = { kind = "shout" }\n', "shout"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.toml").write_text(text, encoding="utf-8")
    with pytest.raises(FlywheelError, match=message) as caught:
        load_characters(tmp_path)
    assert "bad.toml" in str(caught.value)


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match="missing"):
        load_characters(tmp_path / "nowhere")
    with pytest.raises(FlywheelError, match="has no character"):
        load_characters(tmp_path)
    (tmp_path / "one.toml").write_text(GOOD, encoding="utf-8")
    assert list(load_characters(tmp_path)) == ["one"]
    (tmp_path / "two.toml").write_text('id = "one"\n' + GOOD, encoding="utf-8")
    with pytest.raises(FlywheelError, match="'one' is taken"):
        load_characters(tmp_path)
