"""Features, training, judgement and storage of the signal models."""

from pathlib import Path

import numpy as np
import pytest
from reward_fixture import Letters, asks

from characterflywheel.errors import FlywheelError
from characterflywheel.records import ChatMessage
from characterflywheel.reward.signals import MEASURES, Reply, SignalModels, features, spreads


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


def test_features_read_nothing_after_the_reply_and_measures_are_named():
    turns = (
        ChatMessage(role="user", content="Where?"),
        ChatMessage(role="assistant", content="here"),
        *asks("And?"),
    )
    x = features([Reply("u", turns, "Here, in town! In town?")], Letters())
    measured = dict(zip(MEASURES, x[0, -len(MEASURES) :], strict=True))
    assert x.shape == (1, 4 * 26 + len(MEASURES))
    assert measured["log_turn"] == pytest.approx(np.log(4))
    assert (measured["ends_asking"], measured["answered_asks"], measured["exclaims"]) == (1.0, 1.0, 1.0)
    assert (measured["opening"], measured["log_user_run"]) == (0.0, np.log(2))
    assert measured["repeats_itself"] == pytest.approx(2 / 5)
    assert measured["repeated_words"] == pytest.approx(1 / 2)
    assert features([Reply("u", turns, "Here")], Letters(), without=("log_turn",)).shape[1] == x.shape[1] - 1
    with pytest.raises(FlywheelError, match="without names mood"):
        features([], Letters(), without=("mood",))


def test_only_recent_messages_and_no_system_prompt_are_read():
    def turns(first: str, system: str) -> tuple[ChatMessage, ...]:
        said = [ChatMessage(role="system", content=system), ChatMessage(role="user", content=first)]
        return (*said, *(ChatMessage(role=r, content=f"{r} {i}") for i in range(6) for r in ("assistant", "user")))

    one, two = (features([Reply("u", turns(*words), "ok")], Letters()) for words in (("axe", "be"), ("zoo", "it")))
    assert np.array_equal(one, two)


def test_candidates_of_one_prompt_are_read_as_replies_alone_are():
    history = asks("Do you like tea?")
    texts = ["I do.", "No!", "", "Tea, tea, tea?"]
    together = features([Reply("", history, text) for text in texts], Letters())
    alone = np.vstack([features([Reply("", tuple(history), text)], Letters()) for text in texts])
    assert together == pytest.approx(alone, abs=1e-6)
    assert np.isfinite(together).all()
    assert not together[2, :26].any()  # nothing was said


def test_many_replies_are_judged_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch):
    models = SignalModels.train(replies(200), ["continue", "thumb_up"], Letters(), min_auc=0.55, seed=0)
    prompts, texts = (
        [asks("hello"), asks("and?"), asks("no")],
        [["tea and you?", "rain."], [], ["boat", "tea", "I am."]],
    )
    whole = models.logits(prompts, texts)
    monkeypatch.setattr("characterflywheel.reward.signals.models.REPLIES_AT_ONCE", 2)
    parts = models.logits(prompts, texts)
    assert [len(part) for part in parts["continue"]] == [2, 0, 3]
    assert parts == {kind: [pytest.approx(row) for row in rows] for kind, rows in whole.items()}


def test_first_words_of_a_conversation_have_no_context():
    x = features([Reply("u", (), "hello")], Letters())
    measured = dict(zip(MEASURES, x[0, -len(MEASURES) :], strict=True))
    assert not x[0, 26:104].any()
    assert measured["opening"] == 1.0
    assert measured["relevance"] == measured["repetition"] == measured["like_user"] == 0.0


def test_an_embedding_weighs_the_same_whatever_its_width():
    for width in (26, 384):
        columns = 4 * width + len(MEASURES)
        variance = spreads(columns) ** 2
        assert variance[:width].sum() == pytest.approx(0.25)
        assert variance[-len(MEASURES) :].sum() == pytest.approx(1.0)
    assert len(spreads(4 * 26 + len(MEASURES) - 2, without=MEASURES[:2])) == 4 * 26 + len(MEASURES) - 2


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


def test_every_criterion_is_written_down(tmp_path: Path):
    models = SignalModels.train(replies(400), ("continue", "thumb_up"), Letters(), min_auc=0.55, seed=1)
    used, not_used = models.reports["continue"], models.reports["thumb_up"]
    assert len(used.criteria) == 6
    assert used.failed == ()
    assert set(not_used.failed) >= {"AUC on unseen users, lower end"}
    for criterion in used.criteria + not_used.criteria:
        above = criterion.value <= criterion.bound if criterion.at_most else criterion.value > criterion.bound
        assert criterion.passed == above
    assert set(used.biases) == {"position", "length", "character", "user"}
    assert used.gain.value == pytest.approx(used.auc.value - used.nuisance_auc.value)
    assert used.calibration_error.n == 400
    models.save(tmp_path)
    assert SignalModels.load(tmp_path, Letters()).reports == models.reports


def test_a_stricter_bound_leaves_a_signal_out():
    given = replies(400)
    strict = SignalModels.train(given, ("continue", "thumb_up"), Letters(), min_auc=0.9, seed=1)
    assert strict.usable == ()
    exact = SignalModels.train(
        given, ("continue", "thumb_up"), Letters(), min_auc=0.55, seed=1, max_calibration_error=-1.0
    )
    assert exact.reports["continue"].failed == ("calibration error, chance taken off",)


def test_unknown_labels_of_one_signal_do_not_touch_another():
    """Rows without a continue label are as if they were not there, whatever their thumbs say."""
    given = replies(300)
    more = [r._replace(labels=(None, r.labels[1])) for r in replies(200, seed=5)]
    alone = SignalModels.train([r._replace(labels=r.labels[:1]) for r in given], ("continue",), Letters(),
                               min_auc=0.55, seed=1)  # fmt: skip
    both = SignalModels.train([*given, *more], ("continue", "thumb_up"), Letters(), min_auc=0.55, seed=1)
    assert both.reports["continue"].auc.n == alone.reports["continue"].auc.n == 300
    assert both.reports["continue"].positive_share == alone.reports["continue"].positive_share
    assert both.reports["continue"].auc.value == pytest.approx(alone.reports["continue"].auc.value, abs=0.05)


def test_too_few_users_say_so():
    few = [r._replace(user_id=f"u{i % 4}", labels=r.labels[:1]) for i, r in enumerate(replies(80))]
    models = SignalModels.train(few, ("continue",), Letters(), min_auc=0.55, seed=1)
    assert models.usable == ()
    assert models.reports["continue"].auc.reason == "4 users: at least 5 are needed for each class"


def test_bad_replies_are_named():
    def train(*rows: Reply) -> None:
        SignalModels.train(rows, ("continue",), Letters(), min_auc=0.55, seed=1)

    with pytest.raises(FlywheelError, match="reply 0 has 2 labels, must be one for each of 1 kinds"):
        train(Reply("u", asks("hi"), "a", (1.0, 0.0)))
    with pytest.raises(FlywheelError, match=r"reply 1 \(user 'u'\) is empty"):
        train(Reply("u", asks("hi"), "a", (1.0,)), Reply("u", asks("hi"), " ", (0.0,)))
    with pytest.raises(FlywheelError, match="neither 0 nor 1, the first 3"):
        train(Reply("u", asks("hi"), "a", (3.0,)))
    with pytest.raises(FlywheelError, match="name one twice"):
        SignalModels.train([], ("continue", "continue"), Letters(), min_auc=0.55, seed=1)
    assert SignalModels.train([], ("continue",), Letters(), min_auc=0.55, seed=1).usable == ()
