"""Erasure in files: which rows came from the erased, taking them out, and which models had learnt from them.

Parquet and JSON-lines files lose the rows that lineage or their words lead to, and lines that an import kept aside
lose those that name the erased or say what they said. A stage that was not complete begins again. Files are replaced
as a whole, so a kill leaves each as it was or as it should be.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from . import lineage, proof
from .errors import FlywheelError
from .lineage import Ids, Rows
from .pipeline import PARTIAL, ArtifactRecord, sha256_of, write_atomically
from .proof import Needles
from .records import Record

HELD_OUT = {"evaluate", "experiment"}
MIXTURE = "mixture.parquet"
"""What a model was trained on, in its own artifact; the other files there say nothing of that."""
_OWNER = re.compile(r'"(?:user|user_id|sender|id|conversation_id)"\s*:\s*("(?:[^"\\]|\\.)*")')


class Learnt(Record):
    """A model that was made from erased rows, and how: it cannot unlearn them."""

    folder: str
    why: str


class Plan(NamedTuple):
    """What is to be done to the files of a workspace, all by their path in it.

    `ids` are those of everything that came from the erased, `unfinished` the folders of stages to begin again.
    """

    ids: Ids
    rows: dict[str, Rows]
    unfinished: tuple[str, ...]
    models: tuple[Learnt, ...]


def plan(root: Path, ids: Ids, sought: Needles) -> Plan:
    """Follow `ids` and what `sought` finds through every file of the workspace.

    Raises FlywheelError for a Parquet file that cannot be read.
    """
    folders = sorted(path for path in (root / "artifacts").glob("*-*") if path.is_dir())
    incomplete = {path for path in folders if not (path / "artifact.json").exists()}
    for path in (path for path in folders if path not in incomplete):
        shutil.rmtree(path / PARTIAL, ignore_errors=True)  # left by a kill, of no more use
    found = proof.files(root)
    read, broken = {}, set()
    for path in found:
        if proof.is_table(path, root):
            try:
                read[path] = lineage.table(path)
            except FlywheelError:
                if not incomplete & set(path.parents):
                    raise
                broken.add(path)  # a kill in the middle of a write
    said = {path: np.unique([s.row for s in lineage.saying(path, sought.scanner)]).astype(np.int64) for path in read}
    for path, rows in said.items():
        ids.of(read[path].kind).update(read[path].own_ids(rows))
    ids = lineage.closure(read.values(), ids)
    every = {path: np.union1d(table.naming(ids, referring=True), said[path]) for path, table in read.items()}
    for path in (path for path in found if path.suffix == ".rejected"):
        every[path] = _set_aside(path, ids, sought)
        if (reasons := path.with_suffix(".errors.txt")).exists():
            every[reasons] = every[path]
    touched = {path for path, rows in every.items() if len(rows)}
    again = {folder for folder in incomplete if _lies_in(folder, broken | touched)}
    if any(path.is_relative_to(root / "artifacts") for path in touched):
        again = incomplete  # they may hold in other forms what they were given
    going = {_name(root, path): every[path] for path in sorted(touched) if not again & set(path.parents)}
    return Plan(ids, going, tuple(_name(root, path) for path in sorted(again)), _models(root, folders, going))


def _lies_in(folder: Path, paths: Iterable[Path]) -> bool:
    return any(path.is_relative_to(folder) for path in paths)


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _models(root: Path, folders: Iterable[Path], rows: Mapping[str, Rows]) -> tuple[Learnt, ...]:
    """The models made from artifacts that lose rows, and from such models: their inputs in `artifact.json` tell.

    Where all prompts of the erased are held out (a user's split holds for all they wrote), nothing learnt from them.
    """
    records = {p.name: _artifact(p) for p in folders if (p / "artifact.json").exists()}
    by_hash = {record.hash: name for name, record in records.items()}
    inputs = {
        name: sorted({by_hash.get(i, i) for i in record.inputs.values()} & records.keys())
        for name, record in records.items()
    }
    lost = by_artifact({file: len(theirs) for file, theirs in rows.items()})
    splits = {name: _splits(root / "artifacts" / name, rows, root) for name in lost}
    models = [name for name in inputs if next((root / "artifacts" / name).rglob("*.safetensors"), None)]
    learnt: dict[str, str] = {}
    before = -1
    while before != len(learnt):  # each round reaches the models made from those of the round before
        before = len(learnt)
        for name in models:
            direct = [source for source in inputs[name] if source in lost]
            through = [source for source in inputs[name] if source in learnt]
            held_out = set[str]().union(*(splits[source] for source in direct))
            if direct and not (held_out and held_out <= HELD_OUT):
                learnt[name] = ", ".join(f"{sum(lost[one].values())} rows of {one}" for one in direct)
            elif own := lost.get(name, {}).get(MIXTURE):  # a set of examples from a file that names them
                learnt[name] = f"{own} rows of its mixture"
            elif through:
                learnt[name] = f"made from {', '.join(through)}"
    return tuple(Learnt(folder=f"artifacts/{name}", why=why) for name, why in sorted(learnt.items()))


def _splits(folder: Path, rows: Mapping[str, Rows], root: Path) -> set[str]:
    """The splits of an artifact's prompts among these rows."""
    found: set[str] = set()
    for path in folder.glob("*.parquet"):
        theirs = rows.get(path.relative_to(root).as_posix())
        if theirs is not None and "split" in pq.read_schema(path).names:
            found.update(pq.read_table(path, columns=["split"]).column("split").take(pa.array(theirs)).to_pylist())
    return found


def take_out(path: Path, rows: Rows) -> None:
    """Rewrite a file without these rows; a reader, and whoever comes after a kill, sees the old file or the new."""
    written = path.with_name(path.name + ".writing")
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        keep = np.ones(table.num_rows, np.bool_)
        keep[rows] = False
        pq.write_table(table.filter(pa.array(keep)), written, compression="zstd")
    else:
        going = set(rows.tolist())
        lines = path.read_bytes().splitlines(keepends=True)
        written.write_bytes(b"".join(line for number, line in enumerate(lines) if number not in going))
    with written.open("rb") as file:
        os.fsync(file.fileno())
    written.replace(path)


def note_in_artifacts(root: Path, erasure: str, counts: Mapping[str, int]) -> None:
    """Say in each `artifact.json` what was taken out. Its identity stays, so a run neither refuses nor remakes it."""
    for name, lost in by_artifact(counts).items():
        folder = root / "artifacts" / name
        if (folder / "artifact.json").exists():
            record = _artifact(folder)
            outputs = record.outputs | {file: sha256_of(folder / file) for file in lost if (folder / file).exists()}
            changed = record.model_copy(update={"outputs": outputs, "erased": record.erased | {erasure: lost}})
            write_atomically(folder / "artifact.json", changed.model_dump_json(indent=1))


def by_artifact(counts: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Counts by file of the workspace as counts by artifact folder and file in it."""
    found: dict[str, dict[str, int]] = {}
    for file, count in counts.items():
        if file.startswith("artifacts/") and file.count("/") > 1:
            _, folder, name = file.split("/", 2)
            found.setdefault(folder, {})[name] = count
    return found


def _artifact(folder: Path) -> ArtifactRecord:
    return ArtifactRecord.model_validate_json((folder / "artifact.json").read_text(encoding="utf-8"))


def _set_aside(path: Path, ids: Ids, sought: Needles) -> Rows:
    """The lines kept aside by an import that are theirs, by a value or by what they say; and the reasons above them."""
    lines = path.read_bytes().splitlines()
    names = ids.user | ids.conversation
    theirs = {said.row for said in lineage.saying(path, sought.scanner)}
    for number, line in enumerate(lines):
        given = _OWNER.findall(line.decode("utf-8", "replace"))
        if any(_unquoted(value) in names for value in given):
            theirs.add(number)
    reasons = {number - 1 for number in theirs if number and lines[number - 1].startswith(b"# ")}
    return np.array(sorted(theirs | reasons), np.int64)


def _unquoted(value: str) -> str | None:
    try:
        return str(json.loads(value))
    except ValueError:
        return None
