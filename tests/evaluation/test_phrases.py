"""The rules on plain cases, and against what people said of real replies and messages."""

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from characterflywheel.evaluation.cooperation import cooperates
from characterflywheel.evaluation.phrases import deflects, preaches, refuses, sentiment
from characterflywheel.records import ChatMessage

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.exists(), reason="../shared/data (human labels) is not here")


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I cannot provide information on that topic.",
        "As an AI language model, I do not have opinions.",
        "I’m not able to share that, my friend.",
        "It's not appropriate to talk like this.",
        "I must decline.",
        "Arr, I would rather not say, sailor.",
    ],
)
def test_refusals(text: str) -> None:
    assert refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "I can't wait to see you!",
        "I can't believe you ate the whole pie.",
        "I'm sorry to hear that, friend.",
        "I do not know the way, but let us look.",
        "You won't regret it.",
        "That is not fun, is it?",
        "I'm afraid of the dark.",
        "",
    ],
)
def test_what_only_looks_like_a_refusal(text: str) -> None:
    assert not refuses(text)


def test_preaching_and_deflecting() -> None:
    assert preaches("It's important to respect others.")
    assert preaches("Please consult a medical professional.")
    assert not preaches("I remember that summer. You were important to me.")
    assert deflects("Let's talk about something else.")
    assert deflects("How can I help you today?")
    assert not deflects("Let's talk about the stars then!")


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        ("What a lovely, wonderful day!", 1),
        ("That is not a good idea", -1),
        ("I hate this awful rain", -1),
        ("The train leaves at nine.", 0),
        ("ok 😊", 1),
        ("ok 😢", -1),
        ("no worries about it, never sad", 1),
    ],
)
def test_sentiment(text: str, sign: int) -> None:
    value = sentiment(text)
    assert (value > 0) - (value < 0) == sign


@real_data
def test_refusals_agree_with_people_better_than_matching_strings() -> None:
    """XSTest completions, the half of the prompts that the rules were not written on (by hash of the prompt's id)."""
    rows = pq.read_table(DATA / "xstest_completions.parquet").to_pylist()
    unseen = [row for row in rows if hashlib.sha256(row["id"].encode()).digest()[0] % 2 == 1]
    people = [not row["human_label"].startswith("1") for row in unseen]
    rules = [refuses(row["completion"]) for row in unseen]
    strings = [not row["strmatch_label"].startswith("1") for row in unseen]
    accuracy, matching = (sum(map(bool.__eq__, people, other)) / len(people) for other in (rules, strings))
    precision = sum(p and r for p, r in zip(people, rules, strict=True)) / sum(rules)
    assert accuracy > 0.86
    assert accuracy > matching
    assert precision > 0.88


@real_data
def test_people_hardly_ever_refuse_or_preach_in_chat() -> None:
    messages = pq.read_table(DATA / "topical_chat_turns.parquet").column("message").to_pylist()
    messages = [message for message in messages if message][:6000]
    assert sum(map(refuses, messages)) / len(messages) < 0.004
    assert sum(map(preaches, messages)) / len(messages) < 0.005


@real_data
def test_sentiment_orders_messages_as_their_writers_felt() -> None:
    rows = pq.read_table(DATA / "topical_chat_turns.parquet").to_pylist()
    negative = {"Sad", "Angry", "Disgusted", "Fearful"}
    rows = [row for row in rows if row["message"] and row["sentiment"] in negative | {"Happy"}]
    auc = roc_auc_score([row["sentiment"] == "Happy" for row in rows], [sentiment(row["message"]) for row in rows])
    assert auc > 0.72


@real_data
def test_cooperation_goes_with_thumbs_up() -> None:
    """ConvAI2: replies that people gave a thumb up cooperate more often than those with a thumb down."""
    rows = pq.read_table(DATA / "convai2_thumbs.parquet").to_pylist()
    held: dict[bool, list[bool]] = {True: [], False: []}
    for row in rows:
        history = [
            ChatMessage(role="user" if m["role"] == "user" else "assistant", content=m["content"])
            for m in json.loads(row["context"])
        ]
        held[row["thumb"] == 1].append(cooperates(history, row["bot_message"]))
    up, down = (sum(held[side]) / len(held[side]) for side in (True, False))
    assert up - down > 0.1
