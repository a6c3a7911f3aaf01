"""What someone needs to repeat a measurement: hardware, versions, command, settings; and how figures are shown."""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def circumstances(args: argparse.Namespace, packages: Sequence[str], device: str = "cpu") -> dict[str, object]:
    """Hardware, threads where they are set, load, versions of `packages`, command and settings."""
    return {
        "hardware": _accelerator(device) if device != "cpu" else _processor(),
        "cores": os.cpu_count(), "threads": getattr(args, "threads", None), "load_before": os.getloadavg()[0],
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "json"},
    }  # fmt: skip


def version(name: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def show(about: Mapping[str, Any], header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print what was measured on and a table; numbers get three significant digits."""
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if v)
    threads = f"{about['threads']} threads, " if about["threads"] else ""
    print(f"$ {about['command']}\n{about['hardware']}, {about['cores']} cores, {threads}"
          f"load {about['load_before']:.1f} when it began\n{versions}\n")  # fmt: skip
    table(header, rows)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table with the first column to the left; `-` is what was not measured."""
    cells = [[f"{c:.3g}" if isinstance(c, float) else "-" if c is None else str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in (list(header), *cells)) for i in range(len(header))]
    for row in (list(header), *cells):
        print("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]))


def made_with(file: Path, **settings: object) -> None:
    """Call before a kept file is looked for: notes what it is to be made with, and refuses one made with other things.

    Of a file that an earlier version left, nothing is known, which is said.

    Raises:
        SystemExit: `file` is there and was made with other settings.
    """
    beside = file.with_name(f"{file.name}.settings")
    mine = json.loads(json.dumps(settings, default=str))
    if not file.exists():
        beside.write_text(json.dumps(mine), encoding="utf-8")
        return
    if not beside.exists():
        print(f"{file}: kept by an earlier version, which did not note its settings", file=sys.stderr)
        return
    theirs = json.loads(beside.read_text(encoding="utf-8"))
    if theirs != mine:
        other = sorted(k for k in mine.keys() | theirs.keys() if theirs.get(k) != mine.get(k))
        raise SystemExit(f"{file} was made with other settings ({', '.join(other)}): remove it or name another --work.")


def digest(rows: Iterable[object]) -> str:
    """A short hash over rows, for `made_with`."""
    return hashlib.sha256(json.dumps(list(rows), default=str).encode()).hexdigest()[:12]


def said(estimate: Mapping[str, Any] | BaseModel, digits: int = 3, *, n: bool = False, why: bool = False) -> str:
    """An estimate for a table: value, interval where there is one, and `n`; of a missing one `-`, or its reason."""
    mine = estimate.model_dump() if isinstance(estimate, BaseModel) else estimate
    if mine["value"] is None:
        return str(mine.get("reason") or "-") if why else "-"
    value, low, high = (None if v is None else f"{v:.{digits}f}" for v in (mine["value"], mine["low"], mine["high"]))
    interval = "" if low is None and high is None else f" [{low or '?'}, {high or '?'}]"
    return f"{value}{interval}" + (f" {mine['n']}" if n else "")


def write(path: Path | None, figures: Mapping[str, object]) -> None:
    """The figures as JSON, records in them too."""
    if path:
        path.write_text(json.dumps(figures, indent=1, default=_plain) + "\n", encoding="utf-8")


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} is no JSON")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _accelerator(device: str) -> str:
    import torch  # noqa: PLC0415

    return str(torch.cuda.get_device_name(device))
