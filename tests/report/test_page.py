"""The page renders for every outcome, escapes what people wrote, loads nothing, and fits a phone."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import herding_fixture
import pytest
import report_fixture as fixture

from characterflywheel.errors import FlywheelError
from characterflywheel.ledger import LedgerRow
from characterflywheel.records import Estimate
from characterflywheel.report import write_report

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
HISTORIES = {
    "promoted": [fixture.row()],
    "held back": [fixture.row(verdict="held")],
    "unknown": [fixture.row(verdict="keep", breadth=0.004)],
    "four": [fixture.row(1), fixture.row(2, "keep", 0.01), fixture.row(3, "held"), fixture.row(4, "roll_back", -0.06)],
}


def workspace(folder: Path, history: str) -> Path:
    """A workspace of that history; of the promoted model there are the files of its training too."""
    fixture.write_workspace(folder, *HISTORIES[history])
    if history == "promoted":
        herding_fixture.write_runs(folder, HISTORIES[history][-1])
    return folder


class Tags(HTMLParser):
    """Every tag with its attributes, every id, and unclosed elements."""

    void = frozenset({"meta", "link", "br", "img", "rect", "line", "circle", "polygon", "polyline", "path"})

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def parse(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    return tags


@pytest.mark.parametrize("history", list(HISTORIES))
def test_page_is_well_formed_and_every_anchor_leads_somewhere(history: str, tmp_path: Path) -> None:
    html = write_report(workspace(tmp_path, history)).read_text()
    tags = parse(html)
    ids = [attributes["id"] for _, attributes in tags.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    links = [attributes["href"] or "" for tag, attributes in tags.tags if tag == "a"]
    assert links
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert len(html) < 200_000


def test_what_people_wrote_is_text_and_nothing_is_loaded(tmp_path: Path) -> None:
    row = fixture.row().model_copy(update={"verdict": "keep", "verdict_reason": fixture.HOSTILE, "model": "<b>V1</b>"})
    html = write_report(fixture.write_workspace(tmp_path, row)).read_text()
    tags = parse(html)
    assert "&lt;script&gt;document.title" in html
    assert "<b>V1</b>" not in html
    assert [tag for tag, _ in tags.tags].count("script") == 1
    assert "img" not in [tag for tag, _ in tags.tags]
    for _, attributes in tags.tags:
        for name in ("src", "href", "action", "srcset", "data"):
            assert not re.match(r"\s*(https?:)?//", attributes.get(name) or ""), attributes
        assert not [name for name in attributes if name.startswith("on")], attributes
    assert "url(" not in html
    assert "@import" not in html


def test_same_ledger_same_bytes(tmp_path: Path) -> None:
    path = write_report(fixture.write_workspace(tmp_path))
    first = path.read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_numbers_of_the_figures_are_the_ledgers(tmp_path: Path) -> None:
    row = fixture.row()
    write_report(fixture.write_workspace(tmp_path, row), tmp_path / "numbers.json")
    figures = json.loads((tmp_path / "numbers.json").read_text())["figures"]
    assert row.experiment is not None
    breadth = figures["lifts"][0]
    assert (breadth["value"], breadth["low"], breadth["n"]) == (
        row.experiment.breadth_lift.value,
        row.experiment.breadth_lift.low,
        row.experiment.breadth_lift.n,
    )
    assert [m["value"] for m in figures["win_rate"]] == [0.604, 0.573, 0.556, 0.531]
    signal = next(m for m in figures["reward_signals"] if m["label"] == "p(thumb up)")
    assert signal["value"] is None
    assert "20 are needed" in signal["reason"]
    assert len(figures["daily_active"]) == 14


def test_a_win_rate_above_the_alarm_is_drawn_as_a_warning(tmp_path: Path) -> None:
    row = fixture.row()
    judged = row.win_rate.user.model_copy(update={"pointwise": fixture.about(0.707, 0.06, 400)})
    alarming = row.model_copy(update={"win_rate": row.win_rate.model_copy(update={"user": judged})})
    html = write_report(fixture.write_workspace(tmp_path, alarming)).read_text()
    assert 'class="dot bad" cx="84.50%"' in html


def test_nothing_measured_still_makes_a_page_that_says_so(tmp_path: Path) -> None:
    nothing = Estimate(value=None, n=0, reason="nobody came")
    full = fixture.row().model_dump()
    full["production"], full["style"], full["kept"], full["seconds"], full["training"] = {}, (), (), {}, {}
    full["gate"]["criteria"], full["samples"], full["truth"] = (), None, None
    full["experiment"] |= {"breadth_lift": nothing, "depth_lift": nothing, "secondary": {}, "daily": (), "srm_p": None}
    for source in ("user", "internal"):
        full["win_rate"][source] = {"pointwise": nothing, "pairwise": nothing}
    row = LedgerRow.model_validate(full | {"verdict": "keep", "verdict_reason": "too few people"})
    html = write_report(fixture.write_workspace(tmp_path, row)).read_text()
    parse(html)
    assert "nobody came" in html
    assert "No conversations" in html
    assert "is not known" in html


def test_an_empty_ledger_and_a_lost_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match="no generation yet"):
        write_report(tmp_path)
    fixture.write_workspace(tmp_path)
    (tmp_path / "artifacts" / "offline-0000" / "samples.jsonl").unlink()
    with pytest.raises(FlywheelError, match="jsonl is missing"):
        write_report(tmp_path)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is missing; install the Debian package chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.mark.parametrize("history", list(HISTORIES))
def test_in_a_browser(history: str, browser: Any, tmp_path: Path) -> None:
    path = write_report(workspace(tmp_path, history))
    page = browser.new_page(viewport={"width": 390, "height": 844})
    troubles: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    assert page.title().endswith("CharacterFlywheel")
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    for width in (390, 768, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") == width
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.close()
    assert troubles == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
