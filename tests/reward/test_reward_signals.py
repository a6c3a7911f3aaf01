from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reward_fixture import Letters, asks
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from characterflywheel.errors import FlywheelError
from characterflywheel.records import ChatMessage, Conversation, Message, Signal
from characterflywheel.reward.evaluate import area_under_curve
from characterflywheel.reward.signals import (
    MEASURES,
    Reply,
    SignalModels,
    collect,
    cross_fit,
    features,
    fit,
    folds,
    temperature,
)

NOW = datetime(2026, 1, 5, tzinfo=UTC)


def message(number: int, role: str, content: str) -> Message:
    return Message(id=f"m{number}", conversation_id="c", user_id="u", role=role, content=content, created_at=NOW)


def signal(number: int, kind: str, value: float = 1.0) -> Signal:
    return Signal(id=f"s{number}{kind}", message_id=f"m{number}", user_id="u", kind=kind, value=value, created_at=NOW)


def replies(n: int, seed: int = 0) -> list[Reply]:
    """Users go on after a question, mostly; thumbs say nothing."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        question = bool(rng.integers(2))
        text = ("tea", "rain", "boat")[rng.integers(3)] + (" and you?" if question else " it is.")
        goes_on = float(rng.random() < (0.85 if question else 0.35))
        out.append(Reply(f"u{i % 20}", asks("hello there")[1:], text, (goes_on, float(rng.random() < 0.3))))
    return out


def test_collect_labels_known_outcomes_only():
    lines = [("user", "hi"), ("assistant", "hello"), ("user", "ok"), ("assistant", "bye"), ("assistant", "cut short")]
    said = [message(i, role, content) for i, (role, content) in enumerate(lines)]
    conversation = Conversation(
        id="c", user_id="u", character_id="mo", character_version=1, source="user", created_at=NOW, messages=tuple(said)
    )
    acts = [signal(1, "continue"), signal(1, "thumb_up"), signal(3, "continue", 0.0)]
    found = collect([conversation], acts, ("continue", "thumb_up"))
    assert [(r.text, r.labels) for r in found] == [("hello", (1.0, 1.0)), ("bye", (0.0, 0.0))]
    assert [m.content for m in found[1].history] == ["hi", "hello", "ok"]


def test_thumb_without_known_outcome_is_left_out_as_its_absence_would_be():
    conversation = Conversation(
        id="c", user_id="u", character_id="mo", character_version=1, source="user", created_at=NOW,
        messages=(message(0, "user", "hi"), message(1, "assistant", "hello")),
    )  # fmt: skip
    assert collect([conversation], [signal(1, "thumb_up")], ("continue", "thumb_up")) == []


def test_features_read_nothing_after_the_reply_and_measures_are_named():
    turns = (
        ChatMessage(role="user", content="Where?"),
        ChatMessage(role="assistant", content="here"),
        *asks("And?")[1:],
    )
    x = features([Reply("u", turns, "Here, in town!")], Letters())
    measured = dict(zip(MEASURES, x[0, -len(MEASURES) :], strict=True))
    assert x.shape == (1, 52 + len(MEASURES))
    assert measured["log_turn"] == pytest.approx(np.log(4))
    assert (measured["asks"], measured["answered_asks"], measured["exclaims"]) == (0.0, 1.0, 1.0)
    assert features([Reply("u", turns, "Here")], Letters(), without=("log_turn",)).shape[1] == x.shape[1] - 1


def test_fit_equals_scikit_learn():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5))
    y = (rng.random(200) < expit(x @ [1, -2, 0, 0.5, 0] + 0.3)).astype(float)
    ours = fit(x, y[:, None], 2.0).logits(x)[:, 0]
    z = (x - x.mean(0)) / x.std(0)
    theirs = LogisticRegression(C=0.5, tol=1e-8, max_iter=1000).fit(z, y).decision_function(z)
    assert np.abs(ours - theirs).max() < 0.01


def test_missing_labels_count_for_nothing():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(120, 4))
    y = (rng.random((120, 2)) < 0.5).astype(float)
    whole = fit(x, y, 5.0)
    hidden = y.copy()
    hidden[60:, 1] = np.nan
    partly = fit(x, hidden, 5.0)
    assert partly.logits(x)[:, 0] == pytest.approx(whole.logits(x)[:, 0], abs=0.01)
    flipped = np.where(np.isnan(hidden), np.nan, y)
    assert np.array_equal(fit(x, flipped, 5.0).weight, partly.weight)
    assert not np.allclose(partly.weight[1], whole.weight[1])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=5, max_size=60), st.integers(0, 5))
def test_no_group_is_in_two_folds(members: list[int], seed: int):
    groups = [str(m) for m in members]
    fold = folds(groups, 3, seed)
    assert all(len({int(f) for f, g in zip(fold, groups, strict=True) if g == name}) == 1 for name in set(groups))
    assert np.array_equal(fold, folds(groups, 3, seed))


def test_cross_fit_cannot_know_what_only_identifies_a_user():
    """One feature a user, labels by user at random: knowing a user is worth everything within, nothing across."""
    rng = np.random.default_rng(3)
    users = np.repeat(np.arange(40), 5)
    y = np.repeat((rng.random(40) < 0.5).astype(float), 5)
    logits = cross_fit(np.eye(40)[users], y[:, None], [str(u) for u in users], seed=1).logits[:, 0]
    assert np.ptp(logits) < 1.5


def test_temperature_undoes_overconfidence():
    rng = np.random.default_rng(4)
    logits = rng.normal(size=4000)
    labels = (rng.random(4000) < expit(logits)).astype(float)
    assert temperature(3 * logits, labels) == pytest.approx(3.0, rel=0.15)


def test_a_signal_that_ranks_is_usable_and_one_that_does_not_is_not(tmp_path: Path):
    kinds = ("continue", "thumb_up")
    models = SignalModels.train(replies(400), kinds, Letters(), min_auc=0.55, seed=1)
    assert models.usable == ("continue",)
    assert models.reports["continue"].auc.low > 0.6
    assert models.reports["thumb_up"].auc.low < 0.55
    prompts, texts = [asks("hello there"), asks("hello there")], [["tea it is.", "tea and you?"], []]
    predicted = models.predict(prompts, texts)
    assert predicted["continue"][0][1] > predicted["continue"][0][0] + 0.2
    assert predicted["continue"][1] == []
    models.save(tmp_path)
    assert SignalModels.load(tmp_path, Letters()).predict(prompts, texts) == predicted


def test_calibrated_on_unseen_users():
    models = SignalModels.train(replies(600), ("continue", "thumb_up"), Letters(), min_auc=0.55, seed=1)
    fresh = replies(2000, seed=9)
    p = models.predict([r.history for r in fresh], [[r.text] for r in fresh])["continue"]
    asked = np.array(["?" in r.text for r in fresh])
    assert np.array(p)[asked].mean() == pytest.approx(0.85, abs=0.08)
    assert np.array(p)[~asked].mean() == pytest.approx(0.35, abs=0.08)


def test_unmeasurable_says_why():
    few = [r._replace(labels=(1.0, None)) for r in replies(30)]
    models = SignalModels.train(few, ("continue", "thumb_up"), Letters(), min_auc=0.55, seed=1)
    assert models.usable == ()
    assert models.reports["continue"].auc.reason == "30 positives among 30 labels: at least 10 of each class are needed"
    assert models.reports["thumb_up"].auc.n == 0
    assert models.predict([asks("a")], [["b"]]) == {}


def test_absent_models_are_one_clear_error(tmp_path: Path):
    with pytest.raises(FlywheelError, match="holds no signal models"):
        SignalModels.load(tmp_path, Letters())


def test_ranks_of_pure_noise_are_not_worse_than_chance():
    """With few negatives, the folds' offsets alone would rank unseen users the wrong way round (an AUC near 0.2)."""
    areas = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        users = [str(u) for u in np.repeat(np.arange(40), 3)]
        y = (rng.random(120) < 0.88).astype(float)
        held_out = cross_fit(rng.normal(size=(120, 20)), y[:, None], users, seed=seed)
        areas.append(area_under_curve(y, held_out.ranks[:, 0]))
    assert 0.42 < np.mean(areas) < 0.58
