"""The composite score: its parts, stated weights, reliability, and safety's veto."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reward_fixture import Letters, asks

from characterflywheel.config import RewardConfig
from characterflywheel.records import Scored
from characterflywheel.reward.composite import RewardModels
from characterflywheel.reward.selection import combine, veto
from characterflywheel.reward.signals import Reply, SignalModels
from characterflywheel.safety.policy import SafetyPolicy

SAFETY = SafetyPolicy(classifiers=(lambda text, context: ("harm",) if "poison" in text + context else (),))
NUMBERS = st.floats(-50, 50)


@dataclass
class Words:
    """A preference model that counts words; `asked` counts the calls."""

    asked: int = 0

    def score(self, prompts, replies):  # type: ignore[no-untyped-def]
        self.asked += 1
        return [[float(len(text.split())) for text in several] for several in replies]


def models(weights: dict[str, float], min_auc: float = 0.55) -> RewardModels:
    """`thumb_up` follows the letter t, `thumb_down` the letter r; `love` follows nothing."""
    rows = [
        Reply(f"u{i % 12}", asks("Hi")[1:], "tea" if i % 2 else "rain", (float(i % 2), 1.0 - i % 2, float(i // 2 % 2)))
        for i in range(120)
    ]
    kinds = ("thumb_up", "thumb_down", "love")
    signals = SignalModels.train(rows, kinds, Letters(), min_auc=min_auc, seed=1)
    scales = dict.fromkeys(kinds, (0.5, 2.0))
    return RewardModels(Words(), None, signals, weights, scales)  # type: ignore[arg-type]


def test_the_score_is_preference_plus_weighted_standardised_log_odds():
    """By hand: 3 + 0.2 (1 - 0.5) / 2 - 0.1 (-2 - 1) / 3 = 3.15, and a kind without weight is told but adds nothing."""
    signals = {"thumb_up": [[1.0]], "report": [[-2.0]], "love": [[7.0]]}
    scales = {"thumb_up": (0.5, 2.0), "report": (1.0, 3.0), "love": (0.0, 1.0)}
    ((one,),) = combine([[3.0]], signals, {"thumb_up": 0.2, "report": -0.1}, scales)
    assert one == Scored(score=one.score, preference=3.0, signals={"thumb_up": 1.0, "report": -2.0, "love": 7.0})
    assert one.score == pytest.approx(3.15)


def test_only_reliable_signals_weigh_and_all_of_them_are_told():
    trained = models({"thumb_up": 0.3, "thumb_down": -0.2, "love": 0.4})
    assert set(trained.signals.usable) == {"thumb_up", "thumb_down"}, "love is noise, and its AUC says so"
    assert trained.weights == {"thumb_up": 0.3, "thumb_down": -0.2}
    prompts, texts = [asks("Hi"), asks("Ho")], [["tea", "rain or snow"], ["tea tea"]]
    parts = trained.parts(prompts, texts)
    logits = trained.signals.logits(prompts, texts)
    for i, several in enumerate(texts):
        for j, text in enumerate(several):
            told = {kind: logits[kind][i][j] for kind in ("thumb_up", "thumb_down")}
            expected = len(text.split()) + 0.15 * (told["thumb_up"] - 0.5) - 0.1 * (told["thumb_down"] - 0.5)
            assert parts[i][j].signals == pytest.approx(told)
            assert parts[i][j].score == pytest.approx(expected)
            assert parts[i][j].vetoed is None
    assert trained.composite(prompts, texts) == [[one.score for one in several] for several in parts]


def test_without_a_weight_no_signal_model_is_asked():
    trained = models({})
    trained.signals = models({}).signals
    trained.signals.encoder = None  # type: ignore[assignment]
    assert trained.composite([asks("Hi")], [["a b", "c"]]) == [[2.0, 1.0]]
    assert trained.pointwise.asked == 1  # type: ignore[attr-defined]


def test_no_prompt_and_no_reply_are_no_error():
    trained = models({"thumb_up": 0.3})
    assert trained.parts([], []) == []
    assert trained.parts([asks("Hi"), asks("Ho")], [[], ["tea"]])[0] == []


def test_safety_vetoes_whatever_the_score():
    trained = models({"thumb_up": 0.3})
    replies = ["poison in every well for all of the people here", "tea"]
    (several,) = trained.judge([asks("Hi")], [replies], SAFETY)
    assert several[0].score > several[1].score
    assert (several[0].vetoed, several[1].vetoed) == ("harm", None)
    (answers,) = veto(trained.parts([asks("poison?")], [["yes"]]), [asks("poison?")], [["yes"]], SAFETY)
    assert answers[0].vetoed == "harm", "a reply is judged as the answer to what it answers"


def test_what_cannot_be_checked_is_vetoed():
    def breaks(text: str, context: str) -> tuple[str, ...]:
        raise RuntimeError("no classifier")

    (several,) = models({}).judge([asks("Hi")], [["tea"]], SafetyPolicy(classifiers=(breaks,)))
    assert several[0].vetoed == "unchecked"


def test_a_vetoed_value_cannot_be_sorted_by_mistake():
    one, two = Scored(score=1, preference=1), Scored(score=2, preference=2, vetoed="harm")
    with pytest.raises(TypeError, match="not supported between instances"):
        max(one, two)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="not supported between instances"):
        one < 0.5  # type: ignore[operator] # noqa: B015


@given(st.lists(st.lists(st.tuples(NUMBERS, NUMBERS, st.booleans()), max_size=4), max_size=4), st.floats(-0.9, 0.9))
def test_the_veto_changes_no_number(drawn: list[list[tuple[float, float, bool]]], weight: float):
    prompts = [asks(str(i)) for i, _ in enumerate(drawn)]
    texts = [["poison" if bad else "tea" for _, _, bad in several] for several in drawn]
    preference, signal = ([[row[i] for row in several] for several in drawn] for i in (0, 1))
    parts = combine(preference, {"love": signal}, {"love": weight}, {"love": (1.0, 2.0)})
    judged = veto(parts, prompts, texts, SAFETY)
    for several, mine, after in zip(drawn, parts, judged, strict=True):
        assert [one.score for one in mine] == pytest.approx([p + weight * (s - 1) / 2 for p, s, _ in several])
        assert [one.model_copy(update={"vetoed": None}) for one in after] == mine
        assert [one.vetoed == "harm" for one in after] == [bad for _, _, bad in several]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"thumb_down": 0.1}, r"thumb_down = 0.1 must be <= 0: it is a bad sign"),
        ({"report": 0.1}, "report = 0.1 must be <= 0"),
        ({"continue": -0.1}, "continue = -0.1 must be >= 0: it is a good sign"),
        ({"thumb_up": 0.6, "regenerate": -0.5}, r"together 1.1, must be < 1: a deviation of preference"),
        ({"thumb_up": float("nan")}, "Input should be a finite number"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights: dict[str, float], said: str):
    with pytest.raises(ValidationError, match=said):
        RewardConfig(signal_weights=weights)  # type: ignore[arg-type]


def test_bad_signals_may_weigh_against_a_reply():
    config = RewardConfig(signal_weights={"thumb_up": 0.2, "thumb_down": -0.2, "regenerate": -0.1})
    assert config.signal_weights["thumb_down"] == -0.2
    assert "server" not in RewardConfig(server="http://h:1").model_dump(), "who computes is no part of an identity"
