"""Kill -9 for tests: a real process that ends itself by SIGKILL at a named point of a real run."""

import importlib
import io
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from processes import FORKS

PATIENCE_SECONDS = 120


@dataclass(frozen=True)
class At:
    """The `call`-th time that `target` ("module:name" or "module:Class.name") is called.

    `halfway`: the target writes to a file, `target(value, file)` or `target(path, text)`; half of it is written.
    """

    target: str
    call: int = 1
    when: Literal["before", "after", "halfway"] = "before"


def kill(at: At, function: Callable[..., Any], *arguments: Any) -> None:
    """Run `function(*arguments)` in a process of its own that dies at the point; fails if it lives past it."""
    process = FORKS.Process(target=_run, args=(at, function, arguments))
    process.start()
    process.join(PATIENCE_SECONDS)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"{at} was not reached in {PATIENCE_SECONDS} s")
    assert process.exitcode == -signal.SIGKILL, f"{at}: the process ended by itself with {process.exitcode}"


def _run(at: At, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    module, _, path = at.target.partition(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real, calls = getattr(owner, name), 0

    def hooked(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < at.call:
            return real(*args, **kwargs)
        if at.when == "halfway":
            _half(real, *args)
        elif at.when == "after":
            real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    setattr(owner, name, hooked)
    function(*arguments)


def _half(real: Callable[..., Any], first: Any, second: Any) -> None:
    if isinstance(second, str):  # write_atomically(path, text)
        first.with_name(first.name + ".writing").write_text(second[: len(second) // 2], encoding="utf-8")
        return
    whole = io.BytesIO()
    real(first, whole)
    second.write(whole.getvalue()[: whole.tell() // 2])
    second.flush()
