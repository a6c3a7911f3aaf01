"""The set-up script's sentences, and that the pinned requirements are whole."""

import ast
import importlib.metadata
import re
import runpy
import shutil
import sys
import tomllib
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "set_up.py"))


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
        (
            "WARNING: Retrying ... NewConnectionError ...\nERROR: No matching distribution found for duckdb==2.0.0",
            "the package index cannot be reached",
        ),
        (
            "ERROR: ... duckdb==2.0.0 (from versions: none)\nERROR: No matching ...",
            "the package index cannot be reached",
        ),
        ("ERROR: No matching distribution found for torch==2.13.0", "a pinned package is not to be had"),
        ("ERROR: something new", "pip failed"),
    ],
)
def test_a_failure_of_pip_is_one_sentence_with_a_remedy(script: dict[str, Any], output: str, sentence: str) -> None:
    explained = script["explain"](output)
    assert explained.startswith(sentence)
    assert re.search(r"(run again|use Python 3\.11)\.$", explained)


def test_a_full_disk_is_noticed_before_anything_is_installed(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9e9, 8.5e9, 0.5e9))
    with pytest.raises(script["SetUpError"], match=r"0\.5 GB are free .* 4 GB are needed"):
        script["check_disk"]()


def test_an_old_python_is_told_so(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    with pytest.raises(script["SetUpError"], match=r"3\.11 is needed"):
        script["check_python"]()


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11) or sys.platform != "linux", reason="pins are for Python 3.11 on Linux"
)
@pytest.mark.parametrize("name", ["base.txt", "dev.txt"])
def test_the_pins_are_what_is_installed_and_tested(name: str) -> None:
    """After an upgrade: .venv/bin/python scripts/pin.py"""
    texts = runpy.run_path(str(ROOT / "scripts" / "pin.py"))["texts"]()
    assert (ROOT / "requirements" / name).read_text() == texts[name]


def test_every_package_that_the_source_imports_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    declared = {
        re.split(r"[<>=!~\[; ]", line)[0].lower().replace("_", "-") for line in [*project["dependencies"], *extras]
    }
    providers = importlib.metadata.packages_distributions()
    undeclared = set()
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            for top in {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"characterflywheel"}:
                names = {name.lower().replace("_", "-") for name in providers.get(top, [top])}
                if not names & declared:
                    undeclared.add(f"{path.name}: {top}")
    assert not undeclared
