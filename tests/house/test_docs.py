"""The pages cannot drift from the code: generated tables, links, and the commands they show."""

import re
import runpy
from pathlib import Path

import pytest
import typer.main

from characterflywheel import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_generated_tables_are_current() -> None:
    """After a change of config/ or records.py: make docs"""
    for path, text in runpy.run_path(str(ROOT / "scripts" / "document.py"))["pages"]().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:\s]+)[^):]*\)|src=\"([^\":]+)\"", text)
    dead = [a or b for a, b in targets if not (page.parent / (a or b)).exists()]
    assert not dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_shown_exists(page: Path) -> None:
    group = typer.main.get_command(cli.app)
    known = set(group.commands)  # type: ignore[attr-defined]
    shown = re.findall(r"(?:^|`)(?:\.venv/bin/)?flywheel ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(shown) <= known
