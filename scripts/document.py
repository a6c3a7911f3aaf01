"""Rewrite the generated tables of docs/operations.md and docs/formats.md: `make docs`. A test checks them.

The configuration's keys come from config/, the records' fields from records.py, so the pages cannot drift.
"""

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from characterflywheel import records
from characterflywheel.config import FlywheelConfig

ROOT = Path(__file__).resolve().parent.parent
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def config_tables() -> str:
    """Every key by section: default, bounds, meaning."""
    blocks = []
    top = {name: f for name, f in FlywheelConfig.model_fields.items() if not isinstance(f.default, BaseModel)}
    blocks.append("\n".join(["| key | default | bounds | meaning |", "| --- | --- | --- | --- |", *_rows(top)]))
    for name, section in _sections(FlywheelConfig):
        lines = [f"### [{name}]", first_line(section), "", "| key | default | bounds | meaning |"]
        plain = {key: f for key, f in section.model_fields.items() if not isinstance(f.default, BaseModel)}
        blocks.append("\n".join([*lines, "| --- | --- | --- | --- |", *_rows(plain)]))
    return "\n\n".join(blocks)


def _sections(of: type[BaseModel], above: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section by its name in TOML, those inside a section after it; `[NAME]` where there is a list of them."""
    for name, field in of.model_fields.items():
        for item in get_args(field.annotation):
            if isinstance(item, type) and issubclass(item, BaseModel) and get_origin(field.annotation) is tuple:
                yield f"[{above}{name}]", item
        if isinstance(field.default, BaseModel):
            yield above + name, type(field.default)
            yield from _sections(type(field.default), f"{above}{name}.")


def record_tables() -> str:
    """Every record that crosses disk: fields and types."""
    blocks = []
    for record in vars(records).values():
        if isinstance(record, type) and issubclass(record, records.Record) and record is not records.Record:
            lines = [f"### {record.__name__}", first_line(record), "", "| field | type |", "| --- | --- |"]
            lines += [f"| `{name}` | {spell(field.annotation)} |" for name, field in record.model_fields.items()]
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def first_line(cls: type) -> str:
    return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())


def _rows(fields: dict[str, Any]) -> Iterator[str]:
    for name, field in fields.items():
        bounds = ", ".join(
            f"{sign} {getattr(m, key)}" for m in field.metadata for key, sign in BOUNDS.items() if hasattr(m, key)
        )
        options = (
            " or ".join(f"`{option}`" for option in get_args(field.annotation))
            if get_origin(field.annotation) is Literal
            else ""
        )
        yield f"| `{name}` | {default(field.default)} | {bounds or options} | {field.description or ''} |"


def default(value: object) -> str:
    if value is None:
        return "absent"
    if value is PydanticUndefined:
        return "needed"
    if isinstance(value, tuple):
        value = tuple(v.model_dump(exclude_defaults=True) if isinstance(v, BaseModel) else v for v in value)
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def spell(annotation: Any) -> str:
    """A type in words: `list of Message`, `text or absent`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join("absent" if a is type(None) else spell(a) for a in inner)
    if origin is Literal:
        return ", ".join(f"`{option}`" for option in inner)
    if origin is tuple:
        return f"list of {spell(inner[0])}"
    if origin is dict:
        return f"{spell(inner[0])} to {spell(inner[1])}"
    names = {
        "str": "text",
        "int": "integer",
        "float": "number",
        "bool": "true or false",
        "datetime": "time (UTC)",
        "object": "anything",
    }
    return names.get(str(annotation.__name__), str(annotation.__name__))


def pages() -> dict[Path, str]:
    """The pages as they should be: what stands between the markers is replaced."""
    found = {}
    for name, table in {"operations.md": config_tables(), "formats.md": record_tables()}.items():
        path = ROOT / "docs" / name
        marked = re.compile(r"(<!-- generated[^>]*-->\n).*?(<!-- end -->)", re.DOTALL)
        found[path] = marked.sub(lambda m, table=table: m[1] + table + "\n" + m[2], path.read_text(encoding="utf-8"))  # type: ignore[misc]
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
