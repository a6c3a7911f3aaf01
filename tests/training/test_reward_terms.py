"""RL's reward: each term against a hand-worked number, the veto, what is logged, and how it fails."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_fixture import prompt

from characterflywheel.config import TermsConfig
from characterflywheel.errors import FlywheelError, RewardGone
from characterflywheel.records import ChatMessage
from characterflywheel.reward.remote import Connection, RemoteScorer
from characterflywheel.reward.wire import Card, Limits
from characterflywheel.safety.policy import SafetyPolicy
from characterflywheel.training.policy_gradient import Pair, advantages, best_against_worst
from characterflywheel.training.rl.rewards import Terms, length_term
from tiny_model import says

ANYTHING = SafetyPolicy(classifiers=())


class Fixed:
    """A scorer that knows its scores."""

    def __init__(self, *scores: Sequence[float]) -> None:
        self.scores = [list(mine) for mine in scores]

    def score(self, prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]]) -> list[list[float]]:
        return self.scores


def refuses(*words: str) -> SafetyPolicy:
    def harm(text: str, context: str) -> tuple[str, ...]:
        return ("harm",) if text in words else ()

    return SafetyPolicy(classifiers=(harm,))


STOP = [["stop"] * 3]


def test_the_reward_is_the_score_by_default() -> None:
    judged = Terms(Fixed([1.5, -2.0, 0.0]), ANYTHING, TermsConfig()).judge(
        [prompt(0)], [["one two three four", "no", "again and again and again and again"]], STOP
    )
    assert [one.reward for one in judged[0]] == [one.score for one in judged[0]] == [1.5, -2.0, 0.0]
    assert judged[0][1].length == -0.75, "told though it weighs nothing"


def test_terms_add_up_by_hand() -> None:
    """Band 4 to 8 words. `a b c a b c` has 6 words and runs abc bca cab abc: one of four said before, 1/4; the
    character has said `a b c a` before, one of the runs abca bcab cabc: 1/3. `hi` is 3 of 4 words short. Twelve words
    are 4 of 8 beyond."""
    said = prompt(0)
    said = said.model_copy(update={"messages": (*said.messages, says("assistant", "A b, c a!"), says("user", "so?"))})
    config = TermsConfig(
        length_weight=2.0, min_words=4, max_words=8, repetition_weight=3.0, style={"questions": -0.5},
        phrases={"tea": 0.25},
    )  # fmt: skip
    texts = ["a b c a b c", "hi", "One two three, four five six; seven eight nine, ten eleven tea? Tea?"]
    (judged,) = (terms := Terms(Fixed([1.0, 1.0, 1.0]), ANYTHING, config)).judge([said], [texts], STOP)
    assert [one.length for one in judged] == [0.0, -0.75, pytest.approx(-5 / 8)]
    assert judged[0].repetition == pytest.approx(-(1 / 4 + 1 / 3))
    assert [one.features for one in judged] == [(0.0, 0.0), (0.0, 0.0), (2.0, 1.0)]
    assert judged[2].style == -0.75
    assert [one.reward for one in judged] == pytest.approx([1 - 3 * 7 / 12, 1 - 1.5, 1 - 2 * 5 / 8 - 0.75])
    metrics = terms.metrics([judged])
    assert metrics["feature questions"] == pytest.approx(2 / 3)
    assert metrics["feature says: tea"] == pytest.approx(1 / 3)
    assert metrics["length_term"] == pytest.approx((-0.75 - 5 / 8) / 3)
    assert metrics["repetition_term"] == pytest.approx(-7 / 36)
    assert (metrics["score"], metrics["style_term"], metrics["cut_off_share"]) == (1.0, -0.25, 0.0)


def test_a_reply_that_was_cut_off_has_the_full_length_penalty() -> None:
    terms = Terms(Fixed([1.0, 1.0, 1.0]), ANYTHING, TermsConfig(length_weight=0.5))
    (judged,) = terms.judge([prompt(0)], [["one two three four five"] * 3], [["stop", "length", "stop"]])
    assert [one.reward for one in judged] == [1.0, 0.5, 1.0]
    assert [one.cut_off for one in judged] == [False, True, False]
    assert terms.metrics([judged])["cut_off_share"] == pytest.approx(1 / 3)


@given(words=st.integers(0, 300), low=st.integers(1, 40), wide=st.integers(0, 100))
def test_the_length_term_is_soft_and_bounded(words: int, low: int, wide: int) -> None:
    """Within [-1, 0], 0 just inside the band, and a word nearer to the band is never worse."""
    value = length_term("x " * words, False, low, low + wide)
    assert -1 <= value <= 0
    assert (value == 0) == (low <= words <= low + wide)
    nearer = words + 1 if words < low else max(words - 1, low)
    assert length_term("x " * nearer, False, low, low + wide) >= value


def test_a_refused_reply_lies_below_all_that_are_allowed() -> None:
    """Of rewards, terms included: 1 - 2 is the lowest allowed of the first group, 1 of the second; each less 0.5."""
    config = TermsConfig(style={"questions": -2.0}, veto_margin=0.5)
    terms = Terms(Fixed([5.0, 1.0, 2.0], [0.0, 1.0, 2.0]), refuses("bad"), config)
    judged = terms.judge([prompt(0), prompt(1)], [["bad", "well?", "good"], ["bad", "fine", "good"]], STOP * 2)
    assert [[one.reward for one in mine] for mine in judged] == [[-1.5, -1.0, 2.0], [0.5, 1.0, 2.0]]
    assert [[one.vetoed for one in mine] for mine in judged] == [["harm", None, None]] * 2
    assert judged[0][0].score == 5.0, "the score is told as it was"
    assert terms.metrics(judged)["vetoed_share"] == pytest.approx(1 / 3)


def test_what_the_reward_model_likes_is_unlearnt_where_safety_refuses_it() -> None:
    """Three refused replies that it likes, and one allowed that it does not: that one is the best, by GRPO and DPO."""
    terms = Terms(Fixed([-1.0, 3.0, 2.5, 2.0]), refuses("bad"), TermsConfig())
    (judged,) = terms.judge([prompt(0)], [["good", "bad", "bad", "bad"]], [["stop"] * 4])
    rewards = torch.tensor([[one.reward for one in judged]])
    assert rewards.tolist() == [[-1.0, -2.0, -2.0, -2.0]]
    assert advantages(rewards)[0].sign().tolist() == [1.0, -1.0, -1.0, -1.0]
    assert best_against_worst(rewards) == [Pair(best=0, worst=1)]


def test_a_group_that_is_refused_as_a_whole_teaches_nothing() -> None:
    terms = Terms(Fixed([5.0, 1.0, 2.0], [3.0, 3.0, 3.0]), refuses("bad"), TermsConfig())
    judged = terms.judge([prompt(0), prompt(1)], [["bad"] * 3, ["good"] * 3], STOP * 2)
    assert {one.reward for one in judged[0]} == {1.0}
    assert terms.metrics(judged)["vetoed_groups"] == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_names_its_prompt(bad: float) -> None:
    terms = Terms(Fixed([1.0, 2.0, 3.0], [1.0, bad, 3.0]), ANYTHING, TermsConfig())
    with pytest.raises(
        FlywheelError, match=r"a score that is not finite, -?(nan|inf), to reply 2 of 3 to prompt prompt-01"
    ):
        terms.judge([prompt(0), prompt(1)], [["a"] * 3] * 2, STOP * 2)


def test_scores_have_to_be_for_every_reply() -> None:
    with pytest.raises(FlywheelError, match="gave 2 scores for 3 replies"):
        Terms(Fixed([1.0, 2.0]), ANYTHING, TermsConfig()).judge([prompt(0)], [["a"] * 3], STOP)
    with pytest.raises(FlywheelError, match="no reply was judged"):
        Terms(Fixed(), ANYTHING, TermsConfig()).metrics([])


def test_a_reward_server_that_is_gone_is_told_apart() -> None:
    """Nobody listens at the address; the client asks again for its patience and says what to start."""
    card = Card(
        artifact="reward-0", content="0", generation=1, mean=0.0, deviation=1.0, signals=(), weights={}, gold=False,
        precision="float32", limits=Limits(),
    )  # fmt: skip
    connection = Connection("http://127.0.0.1:9", patience_s=0.3)
    scorer = RemoteScorer(connection, card, "pointwise", lambda done, total: None)
    with pytest.raises(RewardGone, match=r"did not answer in \d+ tries over 0 s .*start it with `flywheel score DIR`"):
        Terms(scorer, ANYTHING, TermsConfig()).judge([prompt(0)], [["a", "b"]], [["stop"] * 2])
    connection.close()


def test_settings_are_checked_where_they_are_read() -> None:
    with pytest.raises(ValueError, match=r"max_words == 3, must be >= min_words == 4"):
        TermsConfig(max_words=3)
    with pytest.raises(ValueError, match=r"style feature 'emoji' is unknown; did you mean 'emojis'\?"):
        TermsConfig(style={"emoji": -1.0})
    with pytest.raises(ValueError, match=r"phrases\.tea\n  Input should be a finite number"):
        TermsConfig(phrases={"tea": math.inf})
    with pytest.raises(FlywheelError, match=r"phrase ' ' is empty"):
        TermsConfig(phrases={" ": 1.0})
