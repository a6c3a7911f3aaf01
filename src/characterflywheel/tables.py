"""Records to Parquet and JSON lines and back, with one Arrow schema for each record class.

The schema follows the class, not the rows, so an empty table has its columns and two runs give the same bytes.
"""

import json
import types
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from .errors import FlywheelError

R = TypeVar("R", bound=BaseModel)


def arrow_type(annotation: Any) -> pa.DataType:
    """The Arrow type of a record field: records become structs, tuples lists, dicts JSON text."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        (inner,) = (a for a in get_args(annotation) if a is not type(None))
        return arrow_type(inner)
    if origin is Literal:
        return pa.string()
    if origin is tuple:
        return pa.list_(arrow_type(get_args(annotation)[0]))
    if origin is dict:
        return pa.string()
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return pa.struct(list(arrow_schema(annotation)))
    simple = {
        str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_(),
        datetime: pa.timestamp("us", tz="UTC"),
    }  # fmt: skip
    return simple[annotation]


def arrow_schema(record: type[BaseModel]) -> pa.Schema:
    """The Arrow schema of a record class, fields in the order they are declared."""
    return pa.schema([(name, arrow_type(field.annotation)) for name, field in record.model_fields.items()])


def write(path: Path, record: type[R], rows: Iterable[R]) -> int:
    """Write rows as Parquet; returns how many."""
    table = pa.Table.from_pylist([_plain(row) for row in rows], schema=arrow_schema(record))
    pq.write_table(table, path, compression="zstd")
    return int(table.num_rows)


def read(path: Path, record: type[R]) -> list[R]:
    """Read a table back into validated records."""
    rows = pq.read_table(path).to_pylist()
    if _holds_dictionary(record):
        rows = [_revived(record, row) for row in rows]
    return [record.model_validate(row) for row in rows]


def write_jsonl(path: Path, rows: Iterable[BaseModel]) -> int:
    """Write rows as JSON lines; returns how many."""
    lines = [row.model_dump_json() + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def read_jsonl(path: Path, record: type[R]) -> Iterator[R]:
    """Read JSON lines; a bad line is an error that names the file and the line."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield record.model_validate_json(line)
                except ValidationError as error:
                    raise FlywheelError(f"{path}:{number}: not a {record.__name__}: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    return value


def _holds_dictionary(annotation: Any) -> bool:
    """Whether a dictionary lies in values of this type, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return any(_holds_dictionary(field.annotation) for field in annotation.model_fields.values())
    return get_origin(annotation) is dict or any(map(_holds_dictionary, get_args(annotation)))


def _revived(annotation: Any, value: Any) -> Any:
    """The inverse of `_plain`: dictionaries parsed from their JSON text, at any depth."""
    if value is None or not _holds_dictionary(annotation):
        return value
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {name: _revived(field.annotation, value[name]) for name, field in annotation.model_fields.items()}
    if get_origin(annotation) is dict:
        return json.loads(value)
    (inner,) = (a for a in get_args(annotation) if a not in (type(None), ...))
    return [_revived(inner, item) for item in value] if get_origin(annotation) is tuple else _revived(inner, value)
