"""Where a workspace stands: generations so far, the model in service, the last verdict, the generation in the making.

Read from the ledger, the registry and the artifact folders; nothing is loaded or computed.
"""

from typing import Literal

from rich.console import Console
from rich.table import Table

from . import ledger
from .ledger import Decision, Verdict
from .pipeline import ArtifactRecord
from .records import Record
from .release import registry
from .report import words
from .workspace import Workspace


class StageState(Record):
    """A stage of the generation in the making: complete, or begun (running now, or stopped before its end)."""

    folder: str
    state: Literal["complete", "begun"]
    seconds: float | None = None


class Generation(Record):
    """A finished generation in one line."""

    generation: int
    model: str
    parent: str
    gate: Decision
    verdict: Verdict | None
    seconds: float


class Status(Record):
    """What `flywheel status` prints. `in_service` is None before the first promotion: the base model serves."""

    workspace: str
    generations: tuple[Generation, ...]
    in_service: str | None
    verdict: Verdict | None
    verdict_reason: str
    current: tuple[StageState, ...]
    report: str | None


def status(workspace: Workspace) -> Status:
    """Read a workspace's state. Artifacts that no ledger row names belong to the generation in the making.

    Raises FlywheelError when the ledger or the registry is damaged.
    """
    rows = ledger.read(workspace.ledger)
    release = registry.read(workspace.registry).in_service
    done = {folder for row in rows for folder in row.stages.values()}
    folders = sorted(workspace.artifacts.glob("*-*/")) if workspace.artifacts.is_dir() else []
    current = tuple(_stage(folder.name, workspace) for folder in folders if folder.name not in done)
    report = workspace.report / "index.html"
    last = rows[-1] if rows else None
    return Status(
        workspace=str(workspace.root),
        generations=tuple(
            Generation(
                generation=row.generation,
                model=row.model,
                parent=row.parent,
                gate=row.gate.decision,
                verdict=row.verdict,
                seconds=round(sum(row.seconds.values()), 1),
            )
            for row in rows
        ),
        in_service=release.model if release else None,
        verdict=last.verdict if last else None,
        verdict_reason=(last.verdict_reason or last.gate.reason) if last else "",
        current=current,
        report=str(report) if report.exists() else None,
    )


def _stage(name: str, workspace: Workspace) -> StageState:
    record = workspace.artifacts / name / "artifact.json"
    if not record.exists():
        return StageState(folder=name, state="begun")
    seconds = ArtifactRecord.model_validate_json(record.read_text(encoding="utf-8")).seconds
    return StageState(folder=name, state="complete", seconds=seconds)


def print_status(found: Status, console: Console | None = None) -> None:
    """Print a status for people."""
    console = console or Console(highlight=False)
    console.print(f"[bold]{found.workspace}[/bold]  in service: [bold]{found.in_service or 'the base model'}[/bold]")
    if found.generations:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("generation", "model", "parent", "gate", "verdict", "took"):
            table.add_column(heading)
        for one in found.generations:
            colour = {"promote": "green", "roll_back": "red"}.get(one.verdict or "", "yellow")
            verdict = f"[{colour}]{(one.verdict or 'none').replace('_', ' ')}[/{colour}]"
            table.add_row(str(one.generation), one.model, one.parent, one.gate, verdict, words.duration(one.seconds))
        console.print(table)
        if found.verdict_reason:
            console.print(found.verdict_reason, markup=False)
    else:
        console.print(f"No generation yet; turn the flywheel: flywheel run {found.workspace}", markup=False)
    for stage in found.current:
        took = f"complete, {words.duration(stage.seconds)}" if stage.seconds is not None else "begun, not complete"
        console.print(f"  {stage.folder:<34} {took}", markup=False)
    if found.report:
        console.print(f"report: {found.report}", markup=False)
