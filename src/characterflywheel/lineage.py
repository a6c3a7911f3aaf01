"""Which rows came from which: what DESIGN section 5 promises of every derived row, read off the columns.

Ids are of three kinds, told by the name of the column they stand in: users (`user_id`), conversations
(`conversation_id`), and everything else that a row can be (`message_id`, `prompt_id`, `task_id`, ...). A row that
names an erased id came from it, and hands the erasure on to every row that names its own `id`. No stage is known
here: a new one is covered as soon as its rows say where they came from.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .errors import FlywheelError
from .scan import Scanner

Kind = Literal["user", "conversation", "row"]
Rows = NDArray[np.int64]
_OF = "of "
_NOTHING: Rows = np.empty(0, np.int64)


class Ids(NamedTuple):
    """Ids of each kind. A conversation's id counts as a row's too, where a filter names what it dropped."""

    user: set[str]
    conversation: set[str]
    row: set[str]

    def of(self, kind: Kind) -> set[str]:
        """Those of one kind."""
        found: set[str] = getattr(self, kind)
        return found

    def size(self) -> int:
        return sum(len(self.of(kind)) for kind in get_args(Kind))


def kind_of(column: str, holder: str) -> Kind | None:
    """What kind of id a column holds; None where it holds none that leads to a person.

    `holder` is the table, the file's stem or the field whose record the column belongs to.
    """
    if column == "id":
        kinds: dict[str, Kind | None] = {"users": "user", "user": "user", "conversations": "conversation"}
        return None if holder in ("character", "characters") else kinds.get(holder, "row")
    if not column.endswith("_id") or column == "character_id":
        return None
    return {"user_id": "user", "conversation_id": "conversation"}.get(column, "row")  # type: ignore[return-value]


class Column(NamedTuple):
    """Ids of one kind with the rows they stand in. A row `refers` to what its `detail` names, but came not from it."""

    kind: Kind
    rows: Rows
    values: pa.Array
    refers: bool = False


@dataclass(frozen=True)
class Table:
    """A Parquet or JSON-lines file as lineage sees it: how many rows, the ids they name, and their own."""

    path: Path
    rows: int
    columns: tuple[Column, ...]
    own: Column | None

    def naming(self, ids: Ids, *, referring: bool = False) -> Rows:
        """The rows that name one of `ids`, sorted; with `referring`, also those that only mention one."""
        found = [
            column.rows[pc.is_in(column.values, pa.array(ids.of(column.kind), column.values.type)).to_numpy(False)]
            for column in self.columns
            if ids.of(column.kind) and (referring or not column.refers)
        ]
        return np.unique(np.concatenate(found)) if found else _NOTHING

    def own_ids(self, rows: Rows) -> set[str]:
        """The ids of these rows themselves."""
        if self.own is None or not len(rows):
            return set()
        chosen = np.isin(self.own.rows, rows)
        return set(self.own.values.filter(pa.array(chosen)).to_pylist()) - {None}

    @cached_property
    def kind(self) -> Kind:
        return self.own.kind if self.own else "row"


def closure(tables: Iterable[Table], ids: Ids) -> Ids:
    """`ids`, and the ids of every row that came from one of them, however far away."""
    tables, known = list(tables), Ids(set(ids.user), set(ids.conversation), set(ids.row) | ids.conversation)
    before = -1
    while before != known.size():
        before = known.size()
        for table in tables:
            known.of(table.kind).update(table.own_ids(table.naming(known)))
    return known


def table(path: Path) -> Table:
    """Read a file's ids. A line that is no JSON object counts as a row without ids.

    Raises FlywheelError for a Parquet file that cannot be read.
    """
    columns: list[Column] = []
    own: list[Leaf] = []
    try:
        leaves = list(_leaves(path, ids_only=True))
    except pa.ArrowInvalid as error:
        raise FlywheelError(f"{path} is no Parquet file ({error}): remove or restore it.") from error
    for leaf in leaves:
        kind = kind_of(leaf.name, leaf.holder)
        if kind:
            columns.append(Column(kind, leaf.rows, leaf.values))
        elif leaf.name == "detail":
            columns.append(Column("row", leaf.rows, pc.replace_substring_regex(leaf.values, f"^{_OF}", ""), True))
        if leaf.name == "id" and leaf.top:
            own.append(leaf)
    kind = kind_of("id", path.stem)
    if not own or kind is None:
        return Table(path, _length(path), tuple(columns), None)
    values = pa.concat_arrays([leaf.values for leaf in own])
    return Table(path, _length(path), tuple(columns), Column(kind, np.concatenate([leaf.rows for leaf in own]), values))


class Said(NamedTuple):
    """A row that holds a needle, by its number."""

    row: int
    needle: int


def saying(path: Path, scanner: Scanner) -> list[Said]:
    """Where a file's texts, at any depth, hold a needle."""
    if path.suffix != ".parquet":
        data = path.read_bytes()
        starts = np.cumsum([0] + [len(line) for line in data.splitlines(keepends=True)])
        return [Said(int(np.searchsorted(starts, hit.start, "right")) - 1, hit.needle) for hit in scanner.hits(data)]
    found = []
    for leaf in _leaves(path, ids_only=False):
        _, offsets, data = leaf.values.buffers()
        ends = np.frombuffer(offsets, np.int64)[leaf.values.offset :][: len(leaf.values) + 1]
        for hit in scanner.hits(data.to_pybytes() if data else b""):
            place = int(np.searchsorted(ends, hit.start, "right")) - 1
            inside = 0 <= place < len(leaf.rows) and hit.start + len(scanner.needles[hit.needle]) <= ends[place + 1]
            if inside:
                found.append(Said(int(leaf.rows[place]), hit.needle))
    return found


class Leaf(NamedTuple):
    """Strings that stand in a column, or in a field of a nested record, with the row of each."""

    name: str
    holder: str
    rows: Rows
    values: pa.Array
    top: bool


def _leaves(path: Path, *, ids_only: bool) -> Iterator[Leaf]:
    if path.suffix != ".parquet":
        yield from _json_leaves(path)
        return
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        names = [field.name for field in schema if not ids_only or _leads(field, path.stem)]
        first = 0
        for batch in file.iter_batches(batch_size=1 << 16, columns=names) if names else ():
            rows = np.arange(first, first + batch.num_rows)
            first += batch.num_rows
            for name, array in zip(batch.schema.names, batch.columns, strict=True):
                yield from _arrow_leaves(array, name, path.stem, rows, True)


def _arrow_leaves(array: pa.Array, name: str, holder: str, rows: Rows, top: bool) -> Iterator[Leaf]:
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        parents = pc.list_parent_indices(array).to_numpy()
        yield from _arrow_leaves(array.flatten(), name, holder, rows[parents], False)
    elif pa.types.is_struct(array.type):
        for field, inner in zip(array.type, array.flatten(), strict=True):
            yield from _arrow_leaves(inner, field.name, name, rows, False)
    elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        yield Leaf(name, holder, rows, array.cast(pa.large_string()), top)


def _leads(field: pa.Field, holder: str) -> bool:
    """Whether ids stand in a column or anywhere below it."""
    inner = field.type
    while pa.types.is_list(inner) or pa.types.is_large_list(inner):
        inner = inner.value_type
    if pa.types.is_struct(inner):
        return any(_leads(below, field.name) for below in inner)
    return pa.types.is_string(inner) and (field.name == "detail" or kind_of(field.name, holder) is not None)


def _json_leaves(path: Path) -> Iterator[Leaf]:
    found: dict[tuple[str, str, bool], tuple[list[int], list[str]]] = {}

    def walk(value: object, name: str, holder: str, row: int, depth: int) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, key, name, row, depth + 1)
        elif isinstance(value, list):
            for inner in value:
                walk(inner, name, holder, row, depth + 1)
        elif isinstance(value, str):
            rows, values = found.setdefault((name, holder, depth == 1), ([], []))
            rows.append(row)
            values.append(value)

    for row, line in enumerate(path.read_bytes().splitlines()):
        walk(_parsed(line), path.stem, "", row, 0)
    for (name, holder, top), (rows, values) in found.items():
        if kind_of(name, holder) or name == "detail":
            yield Leaf(name, holder, np.array(rows, np.int64), pa.array(values, pa.large_string()), top)


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _length(path: Path) -> int:
    if path.suffix == ".parquet":
        return int(pq.read_metadata(path).num_rows)
    return len(path.read_bytes().splitlines())
