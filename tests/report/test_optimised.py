"""Over-optimisation drawn: a point lies where its numbers say, the fitted form passes through what it was fitted to."""

import re

import pytest
import report_fixture as fixture

from characterflywheel.ledger import OptimisationCurve
from characterflywheel.records import Estimate
from characterflywheel.report import optimised


def dots(html: str, tone: str) -> list[tuple[float, float]]:
    found = re.findall(rf'<circle class="dot {tone}" cx="([\d.]+)%" cy="([\d.]+)"', html)
    return [(float(x), float(y)) for x, y in found]


def test_both_ways_are_drawn_on_one_scale() -> None:
    best, policy = optimised.figures(fixture.optimised())
    assert (best.name, policy.name) == ("optimised_best_of_n", "optimised_rl")
    for figure, count in ((best, 4), (policy, 4)):
        assert len(dots(str(figure.html), "old")) == len(dots(str(figure.html), "new")) == count
        assert str(figure.html).count('class="curve fitted') == 2
        assert str(figure.html).count('class="ribbon') == 2
    assert 'class="alarm"' in str(best.html), "gold turns"
    assert 'class="alarm"' not in str(policy.html)
    zero = {re.search(r'<line class="zero"[^>]*y1="([\d.]+)"', str(f.html))[1] for f in (best, policy)}  # type: ignore[index]
    assert len(zero) == 1


def test_points_lie_at_their_distance_and_the_fit_on_its_points() -> None:
    (best, _) = fixture.optimised()
    (figure,) = optimised.figures([best])
    proxy, gold = dots(str(figure.html), "old"), dots(str(figure.html), "new")
    assert [x for x, _ in gold] == sorted(x for x, _ in gold)
    assert proxy[0] == gold[0], "both begin at zero"
    assert proxy[-1][1] < gold[-1][1], "higher is further up"
    line = re.search(r'<polyline class="curve fitted new" points="([^"]+)"', str(figure.html))
    assert line is not None
    end = [float(v) for v in line[1].split()[-1].split(",")]
    assert end == pytest.approx(gold[-1], abs=0.11)


def test_the_table_has_every_point_and_the_fits() -> None:
    (figure, policy) = optimised.figures(fixture.optimised())
    labels = [(m.series, m.label) for m in figure.marks]
    assert ("gold", "best of 8") in labels
    assert ("gold, fitted", "turn, distance") in labels
    assert ("proxy", "step 4") in [(m.series, m.label) for m in policy.marks]
    unseen = next(m for m in policy.marks if m.label == "turn, distance")
    assert (unseen.value, unseen.reason) == (None, "no turn seen up to d = 0.40")


def test_a_gold_model_that_may_guess_is_drawn_and_named_so_and_turns_nowhere() -> None:
    best, policy = optimised.figures(fixture.optimised(), trusted=False)
    for figure in (best, policy):
        assert len(dots(str(figure.html), "new")) == 4
        assert "gold (blue), which may be a guess" in str(figure.html)
        assert 'class="alarm"' not in str(figure.html)
    assert "guess" not in str(optimised.figures(fixture.optimised())[0].html)


def test_without_gold_or_points_nothing_is_invented() -> None:
    best, policy = fixture.optimised()
    absent = Estimate(value=None, n=40, reason="there is no gold model")
    points = tuple(p.model_copy(update={"gold": absent, "gap": absent}) for p in best.points)
    fit = best.gold.model_copy(update={"alpha": absent, "beta": absent, "turn": absent})
    alone = best.model_copy(update={"points": points, "gold": fit})
    empty = policy.model_copy(update={"points": ()})
    (figure,) = optimised.figures([OptimisationCurve.model_validate(alone.model_dump()), empty])
    assert dots(str(figure.html), "new") == []
    assert len(dots(str(figure.html), "old")) == 4
    assert str(figure.html).count('class="curve fitted') == 1
    assert optimised.figures([]) == []
