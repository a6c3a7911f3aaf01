"""The annotation desk: tasks go out to people as JSON lines, their judgements come back (PAPER section 2).

`annotation/tasks.jsonl` holds every task that a stage has asked for, `annotation/judgements.jsonl` every accepted
answer. Both only grow; a task is judged once. A line that is no valid answer is kept aside with its reason.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from . import tables
from .errors import FlywheelError
from .pipeline import write_atomically
from .records import Judgement, Record, Task

R = TypeVar("R", bound=Record)


class Intake(Record):
    """What an import of judgements did. `rejected` are the lines kept aside in `rejected_file`."""

    accepted: int
    known: int
    rejected: tuple[str, ...]
    rejected_file: str | None = None


def post(folder: Path, tasks: Sequence[Task]) -> None:
    """Put tasks on the desk; those already there are left alone."""
    known = {task.id: task for task in tasks_of(folder)}
    new = [task for task in tasks if task.id not in known]
    if new:
        _write(folder / "tasks.jsonl", [*known.values(), *new])


def tasks_of(folder: Path) -> list[Task]:
    """Every task on the desk, in the order in which they came."""
    return _read(folder / "tasks.jsonl", Task)


def judgements_of(folder: Path) -> dict[str, Judgement]:
    """Every accepted judgement, by task id."""
    return {judgement.task_id: judgement for judgement in _read(folder / "judgements.jsonl", Judgement)}


def open_tasks(folder: Path) -> list[Task]:
    """The tasks that nobody has judged yet."""
    judged = judgements_of(folder)
    return [task for task in tasks_of(folder) if task.id not in judged]


def export(folder: Path, file: Path) -> int:
    """Write the open tasks to `file`, one JSON object a line; returns how many."""
    tasks = open_tasks(folder)
    if not tasks:
        raise FlywheelError(f"no task is open in {folder}: `flywheel run` makes them when a generation needs people.")
    return tables.write_jsonl(file, tasks)


def take_in(folder: Path, file: Path, rejected: Path) -> Intake:
    """Accept judgements from `file`. Bad lines go to `rejected` verbatim, each under its line number and reason."""
    if not file.is_file():
        raise FlywheelError(f"there is no file {file}: give one with a judgement as JSON on each line.")
    tasks = {task.id: task for task in tasks_of(folder)}
    judged = judgements_of(folder)
    known, accepted = 0, 0
    reasons, lines = [], []
    text = file.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 ends no line of JSON
        if not line.strip():
            continue
        try:
            judgement = Judgement.model_validate_json(line)
            _check(judgement, tasks)
            if judged.get(judgement.task_id, judgement) != judgement:
                raise ValueError(f"task {judgement.task_id} is judged already, differently")
        except ValueError as error:  # pydantic's ValidationError is one
            reasons.append(f"line {number}: {_first(error)}")
            lines.append(line)
            continue
        known += judgement.task_id in judged
        accepted += judgement.task_id not in judged
        judged[judgement.task_id] = judgement
    if not (known or accepted or lines):
        raise FlywheelError(f"{file} is empty: it needs a judgement as JSON on each line.")
    if accepted:
        _write(folder / "judgements.jsonl", judged.values())
    if not lines:
        return Intake(accepted=accepted, known=known, rejected=())
    rejected.mkdir(parents=True, exist_ok=True)
    aside = rejected / f"{file.name}.rejected"
    write_atomically(aside, "".join(f"# {reason}\n{line}\n" for reason, line in zip(reasons, lines, strict=True)))
    return Intake(accepted=accepted, known=known, rejected=tuple(reasons), rejected_file=str(aside))


def _check(judgement: Judgement, tasks: dict[str, Task]) -> None:
    task = tasks.get(judgement.task_id)
    if task is None:
        raise ValueError(f"task {judgement.task_id} was never asked for")
    if judgement.prompt_id != task.prompt_id or judgement.reviewer != task.reviewer:
        raise ValueError(f"task {task.id} is {task.reviewer}'s, on prompt {task.prompt_id}")
    if sorted(judgement.ranking) != sorted(candidate.id for candidate in task.candidates):
        raise ValueError(f"the ranking must name each of the task's {len(task.candidates)} candidates once")
    last = len(task.character.instructions) - 1
    for number in (number for answer in judgement.answers for number in answer.violates):
        if not 0 <= number <= last:
            raise ValueError(f"violates names instruction {number}; {task.character.id} has 0 to {last}")


def _first(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return ": ".join([".".join(map(str, problem["loc"])) or "line", problem["msg"]])
    return str(error)


def _read(path: Path, record: type[R]) -> list[R]:
    return list(tables.read_jsonl(path, record)) if path.exists() else []


def _write(path: Path, rows: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(row.model_dump_json() + "\n" for row in rows))
