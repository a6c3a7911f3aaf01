"""The section on herding: drawn from the stages' own files, of this version or another, and silent about nothing."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import herding_fixture
import pytest
import report_fixture as fixture
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from characterflywheel import tables
from characterflywheel.config import RLAlarmsConfig, RLConfig
from characterflywheel.report import herding, lines, runs, write_report
from characterflywheel.style.monitor import Difference
from characterflywheel.training.dpo import DPOSummary
from characterflywheel.training.mixture import SourceShare
from characterflywheel.training.rejection_sampling import Acceptance, CandidateScore, RejectionSummary
from characterflywheel.training.rl.stage import RLSummary
from characterflywheel.training.rl.step import Stop
from characterflywheel.training.rl.watch import Alarm
from characterflywheel.training.sft import SourceLoss, TrainingSummary


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = fixture.write_workspace(tmp_path_factory.mktemp("shop"), fixture.row())
    herding_fixture.write_runs(folder, fixture.row())
    return folder


@pytest.fixture(scope="module")
def found(workspace: Path) -> runs.Runs:
    return runs.load(workspace, fixture.row())


@pytest.mark.parametrize(
    ("read", "written"),
    [
        (runs.Acceptance, Acceptance), (runs.Scored, CandidateScore), (runs.Selected, RejectionSummary),
        (runs.Source, SourceShare), (runs.SourceLoss, SourceLoss), (runs.Tuned, TrainingSummary),
        (runs.Patched, DPOSummary), (runs.Climbed, RLSummary), (runs.Alarm, Alarm), (runs.Stopped, Stop),
        (runs.Bounds, RLAlarmsConfig), (runs.StyleAlarm, Difference),
    ],
)  # fmt: skip
def test_the_page_reads_fields_that_are_written(read: type[BaseModel], written: type[BaseModel]) -> None:
    assert set(read.model_fields) <= set(written.model_fields)


def test_the_settings_of_the_alarms_are_where_the_page_looks() -> None:
    assert isinstance(RLConfig().alarms, RLAlarmsConfig)


def test_every_part_is_drawn(found: runs.Runs) -> None:
    figures = {figure.name: figure for figure in herding.figures(found)}
    assert set(figures) == {
        "selection_policies", "selection_characters", "selection_sources", "selection_scores", "mixture",
        "held_out_loss", "tuning", "climbing",
    }  # fmt: skip
    scores = figures["selection_scores"]
    totals = {fate: sum(m.value or 0 for m in scores.marks if m.series == fate) for fate in ("accepted", "never")}
    assert totals["accepted"] == sum(one.accepted for one in found.scores)
    assert totals["never"] == sum(one.reason in ("cut_off", "repeated") for one in found.scores)
    assert sum(m.value or 0 for m in scores.marks) == len(found.scores)
    assert [(m.label, m.value) for m in figures["mixture"].marks] == [
        ("User", 2100), ("Internal", 1100), ("Rewrite", 700), ("Safety", 400)
    ]  # fmt: skip
    assert "accepted" in herding.selection_sentence(found)
    assert "+0.81 (+0.69 to +0.93)" in herding.selection_sentence(found)
    assert "step 18 of 24" in herding.sft_sentence(found)


def test_alarms_stand_in_the_panel_of_what_rang(found: runs.Runs) -> None:
    """The win rate rang at step 36 and crosses its bound; emojis have no panel of their own, so they are in the table
    only; KL came near its bound; what was never above 0 has no panel."""
    (figure,) = [f for f in herding.figures(found) if f.name == "climbing"]
    html = {m[1]: m[0] for m in re.finditer(r"<figure class=\"panel\"><figcaption>(.*?)</figcaption>.*?</figure>",
                                           str(figure.html))}  # fmt: skip
    assert len(re.findall('class="alarm"', html["Win rate over the start, by the reward"])) == 2
    assert "alarms at step 36" in html["Win rate over the start, by the reward"]
    assert len(re.findall('class="alarm"', html["KL to the start, nats a reply"])) == 1
    assert 'class="alarm"' not in html["Words a reply"]
    assert not any("style" in title or "safety" in title for title in html)
    assert "Reward: without its terms (grey), with them (blue)" in html
    series = {m.series for m in figure.marks}
    assert "Entropy of the next token, nats: entropy" in series
    entropy = [m.label for m in figure.marks if m.series.startswith("Entropy")]
    assert len(entropy) == herding_fixture.STEPS - 1
    assert "step 5" not in entropy


def test_a_run_that_was_stopped_says_so(tmp_path: Path) -> None:
    folder = fixture.write_workspace(tmp_path, fixture.row())
    herding_fixture.write_runs(folder, fixture.row(), stopped=True)
    said = herding.rl_sentences(runs.load(folder, fixture.row()))
    assert said[1].startswith("Stopped at step 28: emojis 0.05 to 0.41")
    assert "drew step 24" in said[1]
    found = runs.load(folder, fixture.row())
    assert found.climbed is not None
    assert found.climbed.stopped is not None
    late = found.climbed.stopped.model_copy(update={"step": found.climbed.steps + 1})
    climbed = found.climbed.model_copy(update={"stopped": late})
    assert herding.rl_sentences(found._replace(climbed=climbed))[1].startswith("Went back after the last")


def test_another_versions_files_are_shown_as_far_as_they_go(workspace: Path, tmp_path: Path) -> None:
    """No alarms, no held-out people, no tokens counted; a file of something else is no file; nothing at all is said."""
    folder = fixture.write_workspace(tmp_path, fixture.row())
    assert runs.load(folder, fixture.row()) == runs.Runs()
    page = write_report(folder).read_text(encoding="utf-8")
    assert "What rejection sampling drew is not in this workspace" in page
    assert "RL’s own record is not in this workspace" in page
    at = {name: folder / "artifacts" / fixture.row().stages[name] for name in ("sft", "rl", "rejection_sampling")}
    for one in at.values():
        one.mkdir(parents=True)
    source = {"source": "user", "weight": 1.0, "offered": 9, "distinct": 9, "drawn": 18}
    summary = {"steps": 3, "examples": 18, "sources": [source], "colour": "red"}
    (at["sft"] / "artifact.json").write_text(json.dumps({"summary": summary, "config": {}}))
    (at["rl"] / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5, "entropy": NaN}\n{"step": 2, "reward": 0.6}\n')
    tables.write(
        at["rejection_sampling"] / "scores.parquet", Stop, [Stop(step=1, kept_step=1, why="of another version")]
    )
    old = runs.load(folder, fixture.row())
    assert (herding.unit(old), old.scores, old.bounds.every) == ("examples", (), 0)
    assert [(line.step, line.entropy) for line in old.rl] == [(1, None), (2, None)]
    assert {figure.name for figure in herding.figures(old)} == {"mixture", "climbing"}
    assert "SFT learnt from, in examples" in write_report(folder).read_text(encoding="utf-8")


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300).map(lambda v: list(enumerate(v, 1))),
    st.integers(1, 100),
)
def test_stretches_of_a_long_run_keep_its_mean(points: list[tuple[float, float]], most: int) -> None:
    """Each step is in one stretch, stretches are about as long, and the last ends at the last step."""
    found = lines.thinned(points, most)
    assert len(found) == min(most, len(points))
    assert found[-1][0] == points[-1][0]
    ends = [0.0, *(step for step, _ in found)]
    total = math.fsum((b - a) * value for (a, b), (_, value) in zip(pairwise(ends), found, strict=True))
    assert total == pytest.approx(math.fsum(v for _, v in points), rel=1e-9, abs=1e-3)


def test_a_curve_passes_through_its_points_and_few_steps_are_whole() -> None:
    panel = lines.Panel("rl", "Reward", (lines.Line("reward", "old", ((1, 0.0), (2, 1.0), (3, 0.5))),))
    html = str(lines.panels("climbing", [panel]).html)
    dots = [(float(x), float(y)) for x, y in re.findall(r'<circle class="dot new" cx="([\d.]+)%" cy="([\d.]+)"', html)]
    curve = re.search(r'<polyline class="curve new" points="([^"]+)"', html)
    assert curve is not None
    assert [tuple(map(float, at.split(","))) for at in curve[1].split()] == dots
    assert dots[0][1] > dots[2][1] > dots[1][1]
    assert re.findall(r'text-anchor="\w+">([^<]+)<', html) == ["1", "2", "3"]


def test_alarms_of_style_are_told_by_comparison(workspace: Path, found: runs.Runs) -> None:
    assert [one.comparison for one in found.style] == ["rejected to chosen"]
    page = write_report(workspace).read_text(encoding="utf-8")
    assert "1 alarm by comparison" in page
    assert re.search(r"<td>rejected to chosen</td><td>Says: &lt;b&gt;</td>.*not the same ones", page)


def test_text_from_people_is_escaped(workspace: Path) -> None:
    page = write_report(workspace).read_text(encoding="utf-8")
    assert "<script>document.title" not in page
    assert "&lt;script&gt;document.title" in page
