"""Rewrite `requirements/base.txt` and `dev.txt` from what is installed: `.venv/bin/python scripts/pin.py`.

Takes the dependencies that pyproject.toml names, follows what they require, and writes each with the version that
this environment has. Run it after upgrading something and testing it.
"""

import importlib.metadata
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
OURSELVES = "characterflywheel"


def closure(requirements: Iterable[str]) -> dict[str, str]:
    """Name to version of everything that installing `requirements` here brings, build tags such as +cpu left off."""
    versions: dict[str, str] = {}
    done = set()
    todo = [Requirement(line) for line in requirements]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name == OURSELVES or (name, frozenset(requirement.extras)) in done:
            continue
        done.add((name, frozenset(requirement.extras)))
        distribution = importlib.metadata.distribution(name)
        versions[name] = distribution.version.split("+")[0]
        for line in distribution.requires or []:
            needed = Requirement(line)
            if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in requirement.extras or {""}):
                todo.append(needed)
    return versions


def pins(header: str, asked: Iterable[str], versions: dict[str, str]) -> str:
    """A requirements file: what we ask for first, then what that brings."""
    names = {canonicalize_name(Requirement(line).name) for line in asked}
    lines = [f"{name}=={versions[name]}" for name in sorted(names & versions.keys())]
    brought = [f"{name}=={versions[name]}" for name in sorted(versions.keys() - names)]
    return "\n".join([header, *lines, "", "# What these need in turn", *brought, ""])


def texts() -> dict[str, str]:
    """What each generated file should hold, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], "setuptools"]
    extra = project["optional-dependencies"]["dev"]
    base = closure(asked)
    dev = {name: version for name, version in closure(extra).items() if name not in base}
    note = "Written by scripts/pin.py; Python 3.11."
    return {
        "base.txt": pins(f"# What the flywheel needs, exactly. {note}", asked, base),
        "dev.txt": pins(f"# What tests, linters and benchmarks need besides base.txt. {note}", extra, dev),
    }


if __name__ == "__main__":
    for name, text in texts().items():
        (ROOT / "requirements" / name).write_text(text, encoding="utf-8")
