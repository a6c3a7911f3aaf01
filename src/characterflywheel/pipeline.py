"""Stages as values, their artifacts, and a runner that resumes (DESIGN section 4).

A stage's folder is `NAME-HASH`, the hash over its version, config, seed and the hashes of its inputs. The
function writes its files there and returns a typed summary; `artifact.json` is written last and atomically, after
all other files are on the disk, so its presence means that the stage is complete. Only then are the partial results
that a killed stage resumes from removed. A changed identity is a new folder; nothing stale is served.
"""

import contextlib
import ctypes
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from . import __version__, ids, tables

R = TypeVar("R", bound=BaseModel)
S = TypeVar("S", bound=BaseModel)
UNHASHED = ("artifact.json", "timing.jsonl")
PARTIAL = ".partial"
PACKAGES = ("torch", "transformers", "numpy", "scipy", "scikit-learn", "pyarrow", "tea-tasting")


class ArtifactRecord(BaseModel):
    """The content of `artifact.json`: everything needed to say where a stage's output came from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: str
    hash: str
    version: int
    config: dict[str, Any]
    seed: int
    inputs: dict[str, str]
    outputs: dict[str, str]
    summary: dict[str, Any]
    code_version: str
    packages: dict[str, str]
    device: str
    seconds: float
    peak_memory_mb: float
    notes: dict[str, str] = Field(
        default_factory=dict, description="how it was made, where that is no part of the identity: who computed scores"
    )
    erased: dict[str, dict[str, int]] = Field(
        default_factory=dict,
        description="rows taken out since, by erasure and file; `outputs` are the files' hashes now",
    )


@dataclass(frozen=True)
class Artifact(Generic[S]):
    """A completed stage: its folder and its typed summary."""

    stage: str
    folder: Path
    summary: S
    record: ArtifactRecord

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


@dataclass
class Work:
    """What a stage's function is given: where to write, its seed, its declared inputs, a place for partial results."""

    folder: Path
    seed: int
    inputs: Mapping[str, Artifact[Any]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # for `artifact.json`

    @property
    def partial(self) -> Path:
        """A folder that survives a kill and is removed when the stage completes."""
        path = self.folder / PARTIAL
        path.mkdir(parents=True, exist_ok=True)
        return path

    def resumed(self, name: str, record: type[R], make: Callable[[], Iterable[R]]) -> list[R]:
        """The rows that a killed run left under `name`, else those that `make` returns, kept at once."""
        path = self.partial / f"{name}.jsonl"
        if not path.exists():
            write_atomically(path, "".join(row.model_dump_json() + "\n" for row in make()))
        return list(tables.read_jsonl(path, record))


@dataclass(frozen=True)
class Stage(Generic[S]):
    """A named step: `run(work)` writes files into `work.folder` and returns a summary of type `summary`.

    `inputs` are the stages (by role) whose artifacts `run` reads; their hashes are part of this stage's hash.
    `external` names identities that are not stages: a model folder, a character set.
    """

    name: str
    version: int
    config: BaseModel
    summary: type[S]
    run: Callable[[Work], S]
    seed: int
    inputs: Mapping[str, "Stage[Any]"] = field(default_factory=dict)
    external: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def input_hashes(self) -> dict[str, str]:
        return {role: stage.hash for role, stage in self.inputs.items()} | dict(self.external)

    @cached_property
    def hash(self) -> str:
        """First 12 hex digits of SHA-256 over version, config, seed and input hashes."""
        identity = {
            "name": self.name, "version": self.version, "config": self.config.model_dump(mode="json"),
            "seed": self.seed, "inputs": self.input_hashes,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def folder_name(self) -> str:
        return f"{self.name}-{self.hash}"


class Runner:
    """Runs stages in `root` (the workspace's `artifacts/`), skipping those whose artifact is complete."""

    def __init__(self, root: Path, announce: Callable[[str, str], None] = lambda stage, line: None) -> None:
        self.root = root
        self.announce = announce

    def folder(self, stage: Stage[Any]) -> Path:
        return self.root / stage.folder_name

    def is_complete(self, stage: Stage[Any]) -> bool:
        return (self.folder(stage) / "artifact.json").exists()

    def load(self, stage: Stage[S]) -> Artifact[S]:
        """The artifact of a completed stage; partial results that a kill left beside it go."""
        folder = self.folder(stage)
        record = ArtifactRecord.model_validate_json((folder / "artifact.json").read_text(encoding="utf-8"))
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        return Artifact(stage.name, folder, stage.summary.model_validate(record.summary), record)

    def run(self, stage: Stage[S]) -> Artifact[S]:
        """Run one stage, whose inputs must be complete, or load it if it is complete already."""
        if self.is_complete(stage):
            artifact = self.load(stage)
            self.announce(stage.name, f"done before · {summary_line(artifact.summary)}")
            return artifact
        folder = self.folder(stage)
        _remove_unfinished(folder)
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        reset_peak_memory()
        inputs = {role: self.load(source) for role, source in stage.inputs.items()}
        work = Work(folder, ids.derive_seed(stage.seed, stage.name), inputs)
        summary = stage.run(work)
        seconds = time.monotonic() - started
        record = ArtifactRecord(
            stage=stage.name,
            hash=stage.hash,
            version=stage.version,
            config=stage.config.model_dump(mode="json"),
            seed=stage.seed,
            inputs=stage.input_hashes,
            outputs=output_hashes(folder),
            summary=summary.model_dump(mode="json"),
            code_version=__version__,
            packages={name: importlib.metadata.version(name) for name in PACKAGES},
            device=platform.processor() or platform.machine(),
            seconds=round(seconds, 3),
            peak_memory_mb=round(peak_memory_mb(), 1),
            notes=work.notes,
        )
        flush(folder)
        write_atomically(folder / "artifact.json", record.model_dump_json(indent=1))
        _fsync(folder)
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        self.announce(stage.name, f"{seconds:.1f} s · {summary_line(summary)}")
        release_memory()
        return self.load(stage)


def release_memory() -> None:
    """Give freed memory back to the system, so that one stage's peak does not sit under the next one's."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    torch = sys.modules.get("torch")  # who has not loaded it holds no GPU's memory
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def reset_peak_memory() -> None:
    """Let the peak be counted from here (Linux; elsewhere it stays the whole process's)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_memory_mb() -> float:
    """The most memory this process held since the last reset, in MiB."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def output_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of an artifact, by path relative to its folder.

    Left out are `artifact.json`, `timing.jsonl`, whose seconds differ from run to run, and partial results.
    """
    paths = sorted(path for path in _outputs(folder) if path.is_file() and path.name not in UNHASHED)
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths}


def flush(folder: Path) -> None:
    """Have every file and folder of an artifact on the disk, so that a power cut after this takes none of it."""
    for path in (*_outputs(folder), folder, folder.parent):
        _fsync(path)


def _outputs(folder: Path) -> list[Path]:
    """The files and folders of an artifact, but for partial results."""
    return [path for path in folder.rglob("*") if path.relative_to(folder).parts[0] != PARTIAL]


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, even after a power cut."""
    temporary = path.with_name(path.name + ".writing")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def summary_line(summary: BaseModel) -> str:
    """A summary's own `line()` if it has one, else its plain numbers and words."""
    line = getattr(summary, "line", None)
    if callable(line):
        return str(line())
    plain = {k: v for k, v in summary.model_dump().items() if isinstance(v, int | float | str)}
    return ", ".join(
        f"{k.replace('_', ' ')} {v:.3g}" if isinstance(v, float) else f"{k.replace('_', ' ')} {v}"
        for k, v in plain.items()
    )


def _remove_unfinished(folder: Path) -> None:
    """Clear what a killed run left, except `.partial`, which stages resume from."""
    if folder.exists():
        for path in folder.iterdir():
            if path.name != PARTIAL:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
