"""Nothing in the pipeline may know the simulation: only what composes everything may import it (DESIGN section 3)."""

import ast
from pathlib import Path

import characterflywheel

ROOT = Path(characterflywheel.__file__).parent


def test_only_worlds_imports_the_simulation_and_only_the_command_line_imports_worlds() -> None:
    assert _importers("simulation") == {"worlds.py"}
    assert _importers("worlds") == {"cli.py"}


def _importers(name: str) -> set[str]:
    """The files outside the package `name` that import it, at any depth of their code."""
    return {
        str(path.relative_to(ROOT))
        for path in sorted(ROOT.rglob("*.py"))
        if name not in path.relative_to(ROOT).parts and _imports(path, name)
    }


def _imports(path: Path, wanted: str) -> bool:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names += [node.module or "", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return any(wanted in name.split(".") for name in names)
