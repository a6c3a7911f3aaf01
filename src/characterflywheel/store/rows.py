"""Records to rows of the store and back: times as integers, tuples and dictionaries as JSON text."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np

from ..errors import FlywheelError
from ..records import Record
from . import schema

R = TypeVar("R", bound=Record)
Row = tuple[object, ...]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def microseconds(moment: datetime) -> int:
    """Microseconds since 1970 in UTC, exactly. A time without a zone is refused: it would depend on the machine."""
    if moment.tzinfo is None:
        raise FlywheelError(f"time {moment.isoformat()} has no time zone; give it one, e.g. +00:00.")
    return (moment - _EPOCH) // _MICROSECOND


def rows(table: str, records: Iterable[Record]) -> list[Row]:
    """The rows of records, in the order of `schema.columns`."""
    return list(map(_to_row(table), records))


def record(kind: type[R], row: Any) -> R:
    """The record that a row of its table holds; further columns of the row are ignored."""
    known: Mapping[str, Any] = row._mapping
    return kind.model_validate({name: _decoded(name, known[name]) for name in kind.model_fields if name in known})


def rows_of_columns(table: str, columns: Mapping[str, Sequence[object]]) -> list[Row]:
    """Rows from columns of equal length; missing columns are filled from their defaults, times become integers."""
    known = schema.columns(schema.NUMBERED[table])
    defaults = schema.DEFAULTS.get(table, {})
    missing = [name for name in known if name not in columns and name not in defaults]
    unknown = [name for name in columns if name not in known]
    if missing or unknown:
        raise FlywheelError(f"table {table!r}: missing columns {missing}, unknown columns {unknown}; it has {known}.")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise FlywheelError(f"table {table!r}: columns of different length {lengths}; give each row a value in each.")
    length = next(iter(lengths.values()))
    plain = [_plain(name, columns[name]) if name in columns else [defaults[name]] * length for name in known]
    return list(zip(*plain, strict=True))


@cache
def _to_row(table: str) -> Callable[[Record], Row]:
    names = schema.columns(schema.NUMBERED[table])
    values = attrgetter(*names)
    special = [(i, _to_time if name in schema.TIMES else _to_json) for i, name in enumerate(names)
               if name in schema.TIMES or name in schema.JSON]  # fmt: skip

    def row(one: Record) -> Row:
        mixed: list[Any] = list(values(one))
        for i, encoded in special:
            mixed[i] = encoded(mixed[i])
        return tuple(mixed)

    return row


def _to_time(moment: datetime | None) -> int | None:
    return None if moment is None else microseconds(moment)


def _to_json(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _decoded(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in schema.TIMES:
        return _EPOCH + value * _MICROSECOND
    return json.loads(value) if name in schema.JSON else value


def _plain(name: str, column: Sequence[object]) -> Sequence[object]:
    """A column as Python values that databases take; NumPy's are converted at once."""
    if isinstance(column, np.ndarray):
        if column.dtype.kind == "M":
            column = column.astype("datetime64[us]").astype(np.int64)
        column = column.tolist()
    if name in schema.TIMES:
        return [microseconds(value) if isinstance(value, datetime) else value for value in column]
    return column
