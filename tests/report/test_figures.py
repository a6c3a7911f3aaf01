"""Axes hold their values, ticks are round, and a figure's drawing says nothing its numbers do not."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from characterflywheel.ledger import Compared
from characterflywheel.records import Estimate
from characterflywheel.report import words
from characterflywheel.report.data import tone_of
from characterflywheel.report.figures import Axis, Bar, Row, Series, bars, curves, dot_plot, nice_axis, share_axis

VALUES = st.lists(st.floats(-1000, 1000), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(values=VALUES, zero=st.booleans())
def test_nice_axis_holds_every_value_with_few_ticks(values: list[float], zero: bool) -> None:
    axis = nice_axis([*values, None], words.number, zero=zero)
    assert axis.low <= min(values) + 1e-6
    assert axis.high >= max(values) - 1e-6
    assert 2 <= len(axis.ticks) <= 8
    assert not zero or axis.low <= 0 <= axis.high
    assert all(0 <= axis.at(tick) <= 100 for tick in axis.ticks)


def test_a_log_axis_puts_one_in_the_middle_and_holds_what_lies_beyond() -> None:
    axis = Axis(0.25, 4, (0.25, 1, 4), words.times, log=True)
    assert axis.at(1) == pytest.approx(50)
    assert axis.at(2) == pytest.approx(75)
    assert axis.at(100) == 100
    assert axis.at(0) == 0


def test_dot_plot_places_dots_whiskers_and_band() -> None:
    estimate = Estimate(value=0.6, low=0.5, high=0.7, n=48)
    figure = dot_plot("x", [Row("A <b>", estimate, before=Estimate(value=0.4, n=48))], share_axis(), band=(0.5, 0.65))
    html = str(figure.html)
    assert 'class="dot new" cx="60.00%"' in html
    assert 'class="dot old" cx="40.00%"' in html
    assert 'x1="50.00%" x2="70.00%"' in html
    assert 'class="band" x="50.00%" width="15.00%"' in html
    assert "A &lt;b&gt;" in html
    assert [(m.series, m.value) for m in figure.marks] == [("old", 0.4), ("new", 0.6)]


def test_a_missing_value_draws_no_dot_and_says_why() -> None:
    figure = dot_plot("x", [Row("A", Estimate(value=None, n=3, reason="too few"))], share_axis())
    assert "<circle" not in figure.html
    assert "not known" in figure.html
    assert "too few" in figure.html


def test_a_curve_breaks_where_nothing_was_measured() -> None:
    known, gap = Estimate(value=0.5, low=0.4, high=0.6, n=9), Estimate(value=None, n=0, reason="no experiment")
    figure = curves("x", "t", list("abcde"), [Series("s", "new", (known, known, gap, known, known))], share_axis())
    assert len(re.findall("<polyline", figure.html)) == 2
    assert len(re.findall("<circle", figure.html)) == 4
    dots = curves("x", "t", list("ab"), [Series("s", "new", (known, known))], share_axis(), joined=False)
    assert "<polyline" not in dots.html


def test_bars_are_proportional_and_none_is_fine() -> None:
    html = str(bars("x", [Bar("a", 10, "10"), Bar("b", 5, "5")]).html)
    assert 'width="100.00%"' in html
    assert 'width="50.00%"' in html
    assert bars("x", []).marks == ()


@pytest.mark.parametrize(
    ("new", "worse", "tone"),
    [
        (0.9, "down", "good"),
        (0.9, "up", "bad"),
        (0.1, "up", "good"),
        (0.1, "down", "bad"),
        (0.55, "up", "new"),
        (0.9, None, "new"),
    ],
)
def test_colour_only_where_intervals_do_not_touch(new: float, worse: str | None, tone: str) -> None:
    before = Estimate(value=0.5, low=0.4, high=0.6, n=50)
    measured = Compared.model_validate(
        {"value": new, "low": new - 0.1, "high": new + 0.1, "n": 50, "before": before, "worse": worse}
    )
    assert tone_of(measured) == tone
