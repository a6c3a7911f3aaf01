"""`DIR/report/index.html`: one page, no network, no chart library, every text escaped by the template engine."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..pipeline import write_atomically
from . import data as report_data
from . import herding, rewards, story, words
from .data import ReportData
from .figures import Figure

HERE = Path(__file__).parent


def write_report(workspace: Path, numbers: Path | None = None) -> Path:
    """Write the page about the workspace's last generation; returns its path.

    `numbers` is a file for the figures' numbers as JSON (`flywheel report DIR --json FILE`). Same ledger and
    samples, same bytes. Raises FlywheelError when there is no generation yet or a file the ledger names is gone.
    """
    data = report_data.load(workspace)
    figures = report_data.all_figures(data)
    path = workspace / "report" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(data, figures))
    if numbers is not None:
        report_data.write_numbers(numbers, data, figures)
    return path


def render(data: ReportData, figures: dict[str, Figure]) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    return environment.get_template("template.html").render(
        row=data.row,
        history=data.history,
        samples=data.samples,
        judged=data.judged,
        rewards=rewards,
        herded=data.herded,
        herding=herding,
        figures=figures,
        style_names=[c.name for c in data.row.gate.criteria if c.name.startswith("style")],
        headline=story.headline(data.row),
        truth=story.truth_sentence(data.row),
        story=story,
        words=words,
        style=style,
    )
