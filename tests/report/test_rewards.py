"""The reward section says where the judges can be trusted, and what an older version did not measure."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_fixture as fixture
from test_page import browser, parse  # noqa: F401 - `browser` is a fixture

from characterflywheel.records import ChatMessage, Estimate, Preference
from characterflywheel.report import write_report
from characterflywheel.report.rewards import comparison_sentence
from characterflywheel.reward.evaluate import evaluate_preference
from characterflywheel.reward.signals import Bias, Criterion, SignalReport
from characterflywheel.reward.summary import Cell, RewardSummary


def held_out(prompts: int = 40) -> list[Preference]:
    """All pairs of four replies a prompt, best first; nothing here was measured on anybody."""
    texts = ("Tea, always! And you?", "Tea.", "I like tea in the morning", "no")
    return [
        Preference(
            id=f"{p}-{i}-{j}", prompt_id=f"p{p}", user_id=f"u{p // 3}", character_id=fixture.HOSTILE if p % 2 else "mo",
            source="user" if p % 3 else "internal", prompt=(ChatMessage(role="user", content="Tea or coffee?"),),
            chosen=(ChatMessage(role="assistant", content=texts[i]),),
            rejected=(ChatMessage(role="assistant", content=texts[j]),),
            chosen_policy="parent", rejected_policy="coached", reviewers=1 + p % 3, label=1.0,
            strength=(j - i) / 3, held_out=True,
        )
        for p in range(prompts) for i in range(4) for j in range(i + 1, 4)
    ]  # fmt: skip


def summary() -> RewardSummary:
    pairs, rng, scores = held_out(), np.random.default_rng(1), {}
    for pair in pairs:
        for side in (pair.chosen, pair.rejected):
            text = side[-1].content
            scores.setdefault((pair.prompt_id, text), len(text) / 8 + rng.normal())
    chosen, rejected = ([scores[p.prompt_id, side(p)[-1].content] for p in pairs]
                        for side in (lambda p: p.chosen, lambda p: p.rejected))  # fmt: skip
    margins = [3 * (a - b) for a, b in zip(chosen, rejected, strict=True)]
    pointwise = evaluate_preference(pairs, margins, chosen, rejected)
    pairwise = evaluate_preference(pairs, margins, orders=([m + 1 for m in margins], [m - 1 for m in margins]))
    lost = Estimate(value=None, n=0, reason="generation 1's models cannot be read by this version")
    cells = [
        Cell(models=m, pairs=p, pointwise=fixture.about(0.7, 0.1, 51), pairwise=fixture.about(0.66, 0.1, 51))
        for m in (1, 2)
        for p in (1, 2)
    ]
    cells[1] = cells[1].model_copy(update={"pointwise": lost, "pairwise": lost})
    return RewardSummary(
        pairs_trained=160, pairs_held_out=len(pairs), dropped={"equal_as_read": 3},
        pointwise_accuracy=pointwise.accuracy, pairwise_accuracy=pairwise.accuracy, signals={},
        pointwise=pointwise, pairwise=pairwise, models_agree=fixture.about(0.81, 0.05, 240), history=tuple(cells),
    )  # fmt: skip


def workspace(root: Path) -> Path:
    row = fixture.row()
    fixture.write_workspace(root, row)
    folder = root / "artifacts" / row.stages["reward"]
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(summary().model_dump_json())
    report = SignalReport(
        auc=fixture.about(0.61, 0.05, 160), positive_share=0.7, temperature=1.2, usable=False,
        criteria=(
            Criterion(name="labels of the rarer class", value=48, bound=10, passed=True),
            Criterion(name="calibration error", value=0.07, bound=0.05, at_most=True, passed=False),
        ),
        biases={"position": Bias(alone=fixture.about(0.55, 0.04, 160), model_within=fixture.about(0.6, 0.05, 160))},
    )  # fmt: skip
    told = {"kinds": ["continue"], "reports": {"continue": report.model_dump(mode="json")}}
    (folder / "signals.json").write_text(json.dumps(told))
    return root


def test_every_part_is_drawn_from_the_stages_own_report(tmp_path: Path) -> None:
    html = write_report(workspace(tmp_path), tmp_path / "numbers.json").read_text()
    parse(html)
    figures = json.loads((tmp_path / "numbers.json").read_text())["figures"]
    made = summary()
    for name in ("slices_pointwise", "slices_pairwise", "characters_pointwise", "reliability_pointwise", "leans"):
        assert f"reward_{name}" in figures
    slices = {m["label"]: m["value"] for m in figures["reward_slices_pointwise"] if m["series"] == "longer wins"}
    assert slices["similar"] == made.pointwise.by("length")["similar"].longer_wins.value
    errors = {m["series"]: m for m in figures["reward_reliability_pointwise"] if m["label"] == "calibration error"}
    assert errors["with temperature"]["value"] == made.pointwise.calibration.after.error.value
    assert errors["as trained"]["low"] == made.pointwise.calibration.before.error.low
    assert len([m for m in figures["reward_leans"] if m["series"] == "within prompts"]) == sum(
        one.within.value is not None for one in made.pointwise.leans
    )
    assert [m["label"] for m in figures["reward_history"]][::2] == [
        "models 1, pairs 1 (own)", "models 1, pairs 2 (next)", "models 2, pairs 1 (past)", "models 2, pairs 2 (own)",
    ]  # fmt: skip
    assert "generation 1&#39;s models cannot be read by this version" in html
    assert "1 of 2 criteria met, so it is not used" in html
    assert "Best of 4 is the reviewers’" in html
    assert "A perfectly calibrated model would show" in html
    assert "Equal as read" in html
    assert "<img" not in html  # a character's name is text


def test_differences_are_told_with_their_direction() -> None:
    below = summary()
    over = below.pointwise.model_copy(update={"over_longer": fixture.about(-0.08, 0.1, 50)})
    bias = below.pairwise.model_copy(update={"first_bias": fixture.about(0.03, 0.01, 50)})
    told = comparison_sentence(below.model_copy(update={"pointwise": over, "pairwise": bias}))
    assert "8.0 points (−2.0 to 18.0) below that of preferring the longer reply" in told
    assert "favours the reply it reads first by 3.0 points (2.0 to 4.0)" in told


@pytest.mark.parametrize(("accuracy", "told", "alarms"), [
    (fixture.about(0.641, 0.1, 98), "is right on 64% (54% to 74%) of the same pairs", 1),
    (fixture.about(0.52, 0.1, 98), "The gold model itself is not shown to know better than chance (52% [42%, 62%], "
     "n = 98): what it says of over-optimisation counts as not measured.", 0),
])  # fmt: skip
def test_the_gold_models_own_accuracy_is_told_and_decides_what_it_may_say(
    accuracy: Estimate, told: str, alarms: int, tmp_path: Path
) -> None:
    row, made = fixture.row(), summary()
    row = row.model_copy(update={"reward": row.reward.model_copy(update={"gold_accuracy": accuracy})})
    fixture.write_workspace(tmp_path, row)
    gold = made.pointwise.model_copy(update={"accuracy": accuracy})
    folder = tmp_path / "artifacts" / row.stages["reward"]
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(made.model_copy(update={"gold": gold}).model_dump_json())
    html = write_report(tmp_path, tmp_path / "numbers.json").read_text()
    assert told in html
    assert "expected calibration error is" in html
    figures = json.loads((tmp_path / "numbers.json").read_text())["figures"]
    assert next(m["value"] for m in figures["reward_accuracy"] if m["label"] == "Gold model") == accuracy.value
    (panel,) = re.findall(r"<figcaption>Best of n: proxy.*?</figure>", html, re.DOTALL)
    assert panel.count('class="alarm"') == alarms
    assert ("which may be a guess" in html) is not bool(alarms)


@pytest.mark.parametrize("content", [None, '{"pairs_trained": 3, "pointwise": {"by_source": {}}}'])
def test_what_an_older_version_did_not_measure_is_said(content: str | None, tmp_path: Path) -> None:
    row = fixture.row()
    fixture.write_workspace(tmp_path, row)
    if content is not None:
        folder = tmp_path / "artifacts" / row.stages["reward"]
        folder.mkdir(parents=True)
        (folder / "evaluation.json").write_text(content)
    html = write_report(tmp_path).read_text()
    parse(html)
    assert ("so only its totals are shown" if content is None else "An older version judged") in html
    assert "Pointwise model" in html


def test_it_fits_a_phone_with_everything_open(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(write_report(workspace(tmp_path)).as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    for width in (390, 768, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") == width
    page.close()
