"""A workspace: the one folder that holds a product's configuration, characters, events, models and report.

Layout (DESIGN section 10): `flywheel.toml`, `characters/`, `flywheel.db`, `artifacts/STAGE-HASH/`, `ledger.jsonl`,
`registry.json`, `report/index.html`, `annotation/`, `rejected/`. Only paths and set-up live here: neither torch nor
the store is imported.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import config
from .characters import BUNDLED
from .errors import FlywheelError
from .pipeline import write_atomically


@dataclass(frozen=True)
class Workspace:
    """The paths of a workspace; `Workspace.open` checks that it is one."""

    root: Path

    @classmethod
    def open(cls, root: Path) -> "Workspace":
        """The workspace at `root`; an error says what is missing and how to make one."""
        if not root.is_dir():
            raise FlywheelError(f"there is no folder {root}: create a workspace with `flywheel init {root}`.")
        if not (root / "flywheel.toml").is_file():
            raise FlywheelError(f"{root} is no workspace (no flywheel.toml): create one with `flywheel init {root}`.")
        return cls(root)

    @property
    def config_file(self) -> Path:
        return self.root / "flywheel.toml"

    @property
    def characters(self) -> Path:
        return self.root / "characters"

    @property
    def pictures(self) -> Path:
        """Pictures of characters, `ID.png`; one without has its initials."""
        return self.root / "pictures"

    @property
    def database(self) -> Path:
        return self.root / "flywheel.db"

    @property
    def events(self) -> Path | str:
        """Where events are kept: the database that `store.url` names, else this folder's own file."""
        return self.config().store.url or self.database

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.jsonl"

    @property
    def registry(self) -> Path:
        return self.root / "registry.json"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def annotation(self) -> Path:
        return self.root / "annotation"

    @property
    def rejected(self) -> Path:
        return self.root / "rejected"

    def config(self) -> config.FlywheelConfig:
        """The workspace's configuration; an unknown key or a value out of bounds is an error that names it."""
        return config.load(self.config_file)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from changing this workspace; the system lets go even after `kill -9`."""
        with (self.root / ".lock").open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise FlywheelError(
                    f"{self.root} is in use by process {holder}: wait until it ends, or use another workspace."
                ) from None
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield


def init(root: Path, preset: str) -> Workspace:
    """Create a workspace from a preset, with the bundled characters in it.

    A folder that holds anything foreign is refused, and so is a workspace that exists: nothing is overwritten.
    `flywheel.toml` is written last, so a killed `init` can be run again.
    """
    if preset not in config.preset_names():
        raise FlywheelError(f"preset {preset!r} does not exist; there are {', '.join(config.preset_names())}.")
    if root.exists() and not root.is_dir():
        raise FlywheelError(f"{root} is a file: name a folder for the workspace.")
    if (root / "flywheel.toml").exists():
        raise FlywheelError(f"{root} is a workspace already: go on with `flywheel run {root}`.")
    foreign = sorted(path.name for path in root.iterdir() if path.name != "characters") if root.exists() else []
    if foreign:
        raise FlywheelError(f"{root} is not empty (it holds {foreign[0]!r}): name a new folder for the workspace.")
    workspace = Workspace(root)
    workspace.characters.mkdir(parents=True, exist_ok=True)
    for source in sorted(BUNDLED.glob("*.toml")):
        target = workspace.characters / source.name
        if not target.exists():
            shutil.copyfile(source, target)
    write_atomically(workspace.config_file, TEMPLATE.format(preset=preset))
    return workspace


TEMPLATE = """\
# This workspace starts from a preset; whatever is written below overrides it.
# `flywheel run DIR --plan` shows what a change makes new. Every key: docs/operations.md.
preset = "{preset}"

# seed = 1

# With people of your own, switch the simulated crowd off:
# world = false

# [models]
# base = "/models/my-llama"    # any Llama-family Hugging Face folder with a chat template
# threads = 2                  # as many as there are cores
"""
