"""Status reads the ledger, the registry and the artifact folders, and tells begun from complete."""

import sys
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from characterflywheel.release import registry
from characterflywheel.status import print_status, status
from characterflywheel.workspace import Workspace

sys.path.insert(0, str(Path(__file__).parent / "report"))
import report_fixture as fixture


def said(workspace: Workspace) -> str:
    out = StringIO()
    print_status(status(workspace), Console(file=out, width=200))
    return out.getvalue()


def test_a_fresh_workspace_says_how_to_begin(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    found = status(workspace)
    assert (found.generations, found.in_service, found.current, found.report) == ((), None, (), None)
    assert "No generation yet" in said(workspace)
    assert "the base model" in said(workspace)


def test_generations_service_and_the_stages_in_the_making(tmp_path: Path) -> None:
    workspace = Workspace(fixture.write_workspace(tmp_path, fixture.row(1), fixture.row(2, "keep", 0.01)))
    release = registry.Release(generation=1, model="V1", folder="artifacts/rl-1")
    registry.promote(workspace.registry, release, "better", datetime(2026, 1, 5, tzinfo=UTC))
    named = next(iter(fixture.row(1).stages.values()))
    for folder in (named, "traffic-ffffffffffff"):
        (workspace.artifacts / folder).mkdir(parents=True)
    (workspace.artifacts / "offline-0000" / "samples.jsonl").unlink()
    (workspace.artifacts / "offline-0000").rmdir()
    found = status(workspace)
    assert [one.verdict for one in found.generations] == ["promote", "keep"]
    assert found.in_service == "V1"
    assert [(stage.folder, stage.state) for stage in found.current] == [("traffic-ffffffffffff", "begun")]
    text = said(workspace)
    assert "begun, not complete" in text
    assert "promote" in text
    assert status(workspace) == type(found).model_validate_json(found.model_dump_json())


@pytest.mark.parametrize("torn", ["", "{"])
def test_markup_in_names_is_text(tmp_path: Path, torn: str) -> None:
    row = fixture.row().model_copy(update={"verdict_reason": f"[red]{torn}"})
    assert f"[red]{torn}" in said(Workspace(fixture.write_workspace(tmp_path, row)))
