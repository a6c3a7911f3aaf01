"""The whole stage with a panel of reviewers: files, summary, the same bytes twice, waiting for people."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from annotation_fixture import CHARACTERS, Panel, Writer, prompts

from characterflywheel import tables
from characterflywheel.annotation.candidates import RewritePolicy
from characterflywheel.annotation.stage import AnnotateSummary, annotate
from characterflywheel.config import AnnotateConfig
from characterflywheel.errors import FlywheelError, Waiting
from characterflywheel.pipeline import Work
from characterflywheel.records import Candidate, Dropped, Example, Judgement, Preference, Prompt, Task

PROMPTS = prompts(24)
ANNOTATORS = [f"annotator-{k}" for k in range(4)]


class Absent(Panel):
    def judge(self, tasks: Sequence[Task]) -> list[Judgement]:
        raise Waiting(f"{len(tasks)} tasks await judgement")


def run(folder: Path, people: Panel, model: Writer, rows: Sequence[Prompt] = PROMPTS) -> AnnotateSummary:
    folder.mkdir(exist_ok=True)
    pool = {"base": model, "rewrite": RewritePolicy(model)}
    return annotate(Work(folder, 3), AnnotateConfig(prompts=16), rows, pool, CHARACTERS, people, ANNOTATORS)


def test_files_and_summary_agree(tmp_path: Path) -> None:
    summary = run(tmp_path, Panel(), Writer("base"))
    pairs = tables.read(tmp_path / "pairs.parquet", Preference)
    rewrites = tables.read(tmp_path / "rewrites.parquet", Example)
    assert (summary.prompts, summary.tasks, summary.reviewers) == (16, 48, 4)
    assert (summary.pairs, summary.held_out) == (len(pairs), sum(p.held_out for p in pairs))
    assert 0 < summary.held_out < summary.pairs
    assert summary.rewrites == len(rewrites) > 0
    assert summary.candidates == {"base": 32, "rewrite": 32}
    assert sum(summary.reasons.values()) == len(tables.read(tmp_path / "dropped.parquet", Dropped))
    assert len(list(tables.read_jsonl(tmp_path / "judgements.jsonl", Judgement))) == 48
    assert len(tables.read(tmp_path / "candidates.parquet", Candidate)) == 64
    ranking = summary.agreement["ranking"]
    assert ranking.value is not None
    assert ranking.value > 0.2, "the panel judges by length, with errors"
    assert summary.agreement["false_refusal"].reason == "every review says the same"
    assert f"{summary.pairs} pairs" in summary.line()


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    assert run(tmp_path / "a", Panel(), Writer("base")) == run(tmp_path / "b", Panel(), Writer("base"))
    for file in sorted(path.name for path in (tmp_path / "a").iterdir() if path.is_file()):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_waits_for_people_and_then_goes_on_without_drawing_again(tmp_path: Path) -> None:
    with pytest.raises(Waiting):
        run(tmp_path, Absent(), Writer("base"))
    late = Writer("base")
    assert run(tmp_path, Panel(), late).tasks == 48
    assert late.calls == 0


def test_no_prompt_for_annotation_is_a_clear_error(tmp_path: Path) -> None:
    others = [prompt.model_copy(update={"split": "train"}) for prompt in PROMPTS]
    with pytest.raises(FlywheelError, match="none of 24 prompts"):
        run(tmp_path, Panel(), Writer("base"), others)
