"""Rejection sampling as a stage of a generation: the configured pool, with real (tiny) models, in a real workspace."""

import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from selection_fixture import Longer, prompt

from characterflywheel import generation, tables
from characterflywheel.phases import preherding
from characterflywheel.pipeline import Work
from characterflywheel.records import Example, Prompt
from characterflywheel.training.rejection_sampling import CandidateScore
from characterflywheel.workshop import Workshop
from characterflywheel.workspace import Workspace, init

POOL = """
[models]
base = "{base}"
threads = 1

[rejection_sampling]
candidates = 5
prompts = 4
max_tokens = 6
accept = "best"

[[rejection_sampling.pool]]
name = "parent"
share = 0.6

[[rejection_sampling.pool]]
name = "sibling"
share = 0.2
source = "{sibling}"
hints = ["Be brief."]

[[rejection_sampling.pool]]
name = "before"
share = 0.2
source = "earlier:1"
"""


@pytest.fixture
def workspace(tiny_folder: Path, tmp_path: Path) -> Workspace:
    shutil.copytree(tiny_folder, tmp_path / "sibling")
    space = init(tmp_path / "shop", "tiny")
    with space.config_file.open("a") as file:
        file.write(POOL.format(base=tiny_folder, sibling=tmp_path / "sibling"))
    return space


def test_the_configured_pool_answers_in_a_generation(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares 0.6, 0.2 and 0.2, the last not there yet: of 4 x 5 candidates 15 and 5."""
    monkeypatch.setattr(Workshop, "rewards", lambda shop, work: Longer())
    tables.write(tmp_path / "prompts.parquet", Prompt, [prompt(i) for i in range(6)])
    work = Work(tmp_path / "stage", 3, {"prompts": tmp_path, "judge": SimpleNamespace()})  # type: ignore[dict-item]
    summary = preherding.reject(Workshop(workspace, workspace.config(), None, None, 1), work)
    scores = tables.read(tmp_path / "stage" / "scores.parquet", CandidateScore)
    assert Counter(row.policy for row in scores) == {"parent": 15, "sibling": 5}
    assert (summary.absent, summary.unused, summary.candidates) == (("before",), 2, 20)
    examples = tables.read(tmp_path / "stage" / "examples.parquet", Example)
    assert all("Be brief." not in message.content for e in examples for message in e.messages), "hints are not learnt"


def test_another_sibling_is_another_stage_and_another_address_is_not(workspace: Workspace, tmp_path: Path) -> None:
    def hashes() -> dict[str, str]:
        return {stage.name: stage.hash for stage in generation.plan(workspace, workspace.config(), 1)}

    before = hashes()
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "sibling", tmp_path / "elsewhere" / "sibling")
    text = workspace.config_file.read_text()
    workspace.config_file.write_text(text.replace(str(tmp_path / "sibling"), str(tmp_path / "elsewhere" / "sibling")))
    assert hashes() == before
    (tmp_path / "elsewhere" / "sibling" / "generation_config.json").write_text("{}")
    changed = {name for name, hash in hashes().items() if hash != before[name]}
    assert {"rejection_sampling", "sft", "rl"} <= changed
    assert not changed & {"window", "curate", "annotate", "reward"}
