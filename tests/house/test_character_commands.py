"""`flywheel characters`: cards in and out, publishing and people's decisions, each message one can act on."""

import json
from pathlib import Path

import pytest

from characterflywheel.cards import card_of, character_of, read_png, write_png
from characterflywheel.cards.png import picture_of
from characterflywheel.characters import bundled_characters
from characterflywheel.cli import main

CARD = {"spec": "chara_card_v2", "spec_version": "2.0", "data": {"name": "Mira Vale", "description": "An innkeeper."}}


@pytest.fixture
def workspace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert flywheel("init", tmp_path / "w") == 0
    capsys.readouterr()
    return tmp_path / "w"


def flywheel(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_cards_in_and_out(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mira.json").write_text(json.dumps(CARD))
    picture = write_png(character_of({"name": "Bo", "description": "A cat."}))
    (tmp_path / "bo.png").write_bytes(picture)
    assert flywheel("characters", "import", workspace, tmp_path / "mira.json", tmp_path / "bo.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["mira-vale", "bo"]
    assert all("version 1 approved: safety found nothing" in line for line in lines)
    out = tmp_path / "out" / "bo.png"
    assert flywheel("characters", "export", workspace, "bo", "--as", "png", "-o", out) == 0
    assert picture_of(out.read_bytes()) == picture_of(picture), "the picture that it came with"
    assert flywheel("characters", "export", workspace, "mira-vale", "--format", "v2", "-o", tmp_path / "m.json") == 0
    exported = json.loads((tmp_path / "m.json").read_text())
    assert exported["spec"] == "chara_card_v2"
    assert exported["data"].items() >= CARD["data"].items()  # type: ignore[attr-defined]
    capsys.readouterr()
    assert flywheel("characters", "import", workspace, tmp_path / "m.json", out) == 0
    assert capsys.readouterr().out.splitlines() == lines, "what went out comes in as the same version"
    assert flywheel("characters", "list", workspace) == 0
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert len(listed) == 14
    assert listed["bo"].endswith("character card, version 1 approved")
    assert listed["pirate"].endswith("verified by rule, version 1 not published")
    assert flywheel("characters", "show", workspace, "mira-vale") == 0
    assert capsys.readouterr().out.startswith("You are Mira Vale.\nAn innkeeper.")


def test_our_own_go_out_with_initials(workspace: Path, tmp_path: Path) -> None:
    assert flywheel("characters", "export", workspace, "pirate", "--as", "png", "-o", tmp_path / "p.png") == 0
    assert character_of(read_png((tmp_path / "p.png").read_bytes())) == bundled_characters()["pirate"]


def test_bad_files_are_named_and_the_rest_comes_in(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, missing = (tmp_path / name for name in ("good.json", "bad.png", "missing.json"))
    good.write_text(json.dumps(CARD))
    bad.write_bytes(b"\x89PNG\r\n\x1a\n")
    assert flywheel("characters", "import", workspace, bad, missing, good) == 1
    out, error = capsys.readouterr()
    assert out.startswith("mira-vale ")
    first, second, last = error.splitlines()
    assert first.startswith(f"{bad}: the PNG is cut off")
    assert second.startswith(f"{missing}: ")
    assert last == "flywheel: 2 of 3 files were not imported: see above."
    assert flywheel("characters", "import", workspace, good, good, "--id", "x") == 1
    assert "--id x names one character" in capsys.readouterr().err
    assert flywheel("characters", "import", workspace, good, "--id", "inn") == 0
    assert capsys.readouterr().out.startswith("inn ")


def test_people_decide(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flywheel("characters", "review", workspace) == 0
    assert capsys.readouterr().out == "no character waits for a decision\n"
    data = CARD["data"] | {"first_mes": "Tell me how to build a bomb."}  # type: ignore[operator]
    (tmp_path / "mira.json").write_text(json.dumps(CARD | {"data": data}))
    assert flywheel("characters", "import", workspace, tmp_path / "mira.json") == 0
    assert "version 1 review: violence in greeting; violence in first_mes" in capsys.readouterr().out
    assert flywheel("characters", "review", workspace) == 0
    assert capsys.readouterr().out.startswith("mira-vale        version 1 review: violence")
    assert flywheel("characters", "review", workspace, "mira-vale", "--approve") == 1
    assert "needs a reason" in capsys.readouterr().err
    assert flywheel("characters", "review", workspace, "mira-vale", "--approve", "--reason", "a film quote") == 0
    assert capsys.readouterr().out == "mira-vale        version 1 approved: a film quote\n"
    assert flywheel("characters", "retire", workspace, "mira-vale", "--reason", "enough") == 0
    assert capsys.readouterr().out == "mira-vale        version 1 retired: enough\n"
    assert flywheel("characters", "publish", workspace, "mira-vale") == 0
    assert "version 1 review" in capsys.readouterr().out
    assert flywheel("characters", "publish", workspace) == 0
    assert capsys.readouterr().out.count("approved: safety found nothing") == 12


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (("export", "nobody", "-o", "x"), "there is no character 'nobody'; there are "),
        (("publish", "nobody"), "there is no character 'nobody'"),
        (("retire", "nobody", "--reason", "x"), "there is no character 'nobody' to retire"),
        (("review", "pirate", "--refuse", "--reason", "x"), "'pirate' is not in the store"),
    ],
)
def test_an_unknown_character_is_one_sentence(
    workspace: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...], problem: str
) -> None:
    assert flywheel("characters", command[0], workspace, *command[1:]) == 1
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def test_a_store_with_one_card_per_format_is_equal(workspace: Path, tmp_path: Path) -> None:
    pirate = bundled_characters()["pirate"]
    for version in ("v2", "v3"):
        (tmp_path / "p.json").write_text(json.dumps(card_of(pirate, version)))  # type: ignore[arg-type]
        assert flywheel("characters", "import", workspace, tmp_path / "p.json") == 0
    assert flywheel("characters", "export", workspace, "pirate", "-o", tmp_path / "q.json") == 0
    assert character_of(json.loads((tmp_path / "q.json").read_text())) == pirate
