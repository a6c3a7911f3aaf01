"""The story never claims more than the intervals allow."""

import pytest
import report_fixture as fixture
from hypothesis import given, settings
from hypothesis import strategies as st

from characterflywheel.ledger import Truth
from characterflywheel.records import Estimate
from characterflywheel.report import story, words


@pytest.mark.parametrize(
    ("row", "tone", "says"),
    [
        (fixture.row(), "better", "V1 is better company than V0."),
        (fixture.row(verdict="roll_back", breadth=-0.06), "worse", "V1 is worse company than V0."),
        (fixture.row(verdict="keep", breadth=0.01), "unknown", "is not known"),
        (fixture.row(verdict="held"), "unknown", "held back before anyone met it"),
    ],
)
def test_headline(row: story.LedgerRow, tone: str, says: str) -> None:
    found = story.headline(row)
    assert found.tone == tone
    assert says in found.sentence


def test_a_promotion_against_the_gate_says_so() -> None:
    row = fixture.row()
    held = row.model_copy(update={"gate": row.gate.model_copy(update={"decision": "hold"})})
    assert not any("held" in detail for detail in story.headline(row).details)
    assert any("The gate held V1 back" in detail for detail in story.headline(held).details)


@settings(max_examples=60, deadline=None)
@given(value=st.floats(-0.5, 0.5), half=st.floats(0.001, 0.5), what=st.sampled_from(["breadth", "depth"]))
def test_a_lift_whose_interval_holds_zero_is_never_told_as_one(value: float, half: float, what: str) -> None:
    lift = Estimate(value=value, low=value - half, high=value + half, n=100)
    told = story.lift_sentence(what, lift, "V0", 0.95)  # type: ignore[arg-type]
    assert ("No difference" in told) == (value - half <= 0 <= value + half)
    assert ("more" in told) == (value - half > 0)
    assert ("fewer" in told) == (value + half < 0)


def test_a_missing_lift_gives_its_reason() -> None:
    lift = Estimate(value=None, n=12, reason="12 users an arm, at least 500 are needed")
    assert "is not known: 12 users" in story.lift_sentence("breadth", lift, "V0", 0.95)


def test_truth_is_said_to_be_inside_or_outside() -> None:
    row = fixture.row(breadth=0.062).model_copy(update={"truth": Truth(breadth_lift=0.2, depth_lift=0.02)})
    told = story.truth_sentence(row)
    assert told is not None
    assert "breadth lift is +20.0%, outside" in told
    assert "depth lift is +2.0%, inside" in told


def test_a_failed_sample_ratio_says_not_to_trust_the_rest() -> None:
    experiment = fixture.row().experiment
    assert experiment is not None
    assert "cannot be trusted" in story.srm_sentence(experiment.model_copy(update={"srm_p": 1e-7}))
    assert "fit their shares" in story.srm_sentence(experiment)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (words.share(0.624), "62%"), (words.share(0.031), "3.1%"), (words.share(0), "0%"), (words.share(1), "100%"),
        (words.share(0.995), "99.5%"), (words.signed_share(-0.0621), "−6.2%"), (words.signed_share(0.0004), "0.0%"),
        (words.number(-0.06), "−0.06"), (words.number(12345), "12,345"), (words.duration(8.44), "8.4 s"),
        (words.duration(59.9), "60 s"), (words.duration(125), "2 min 5 s"), (words.duration(7500), "2 h 5 min"),
        (words.score(-0.004), "0.00"), (words.score(0.4), "+0.40"), (words.name("false_refusal"), "False refusal"),
    ],
)  # fmt: skip
def test_words(found: str, expected: str) -> None:
    assert found == expected
