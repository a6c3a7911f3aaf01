"""Nothing in the pipeline may know the simulation: only what composes everything may import it (DESIGN section 3)."""

import ast
from pathlib import Path

import characterflywheel

ROOT = Path(characterflywheel.__file__).parent
COMPOSERS = {"generation.py", "cli.py", "commands.py"}


def test_only_composers_import_the_simulation() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in sorted(ROOT.rglob("*.py"))
        if "simulation" not in path.relative_to(ROOT).parts and _imports_simulation(path)
    }
    assert found <= COMPOSERS


def _imports_simulation(path: Path) -> bool:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names += [node.module or "", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return any("simulation" in name.split(".") for name in names)
