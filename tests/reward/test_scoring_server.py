"""The scoring server, really started: equal scores, joined requests, limits, keys, and an end in good order."""

import random
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reward_fixture import asks
from scoring_fixture import PROMPTS, REPLIES, card, loaded, outputs, served, shared_artifact

from characterflywheel.config import RejectionConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.llm.base import Completion, Sampling
from characterflywheel.pipeline import Work
from characterflywheel.records import ChatMessage, Prompt, Scored
from characterflywheel.reward.composite import RewardModels
from characterflywheel.reward.joining import Closing, Full, Worker, join
from characterflywheel.reward.remote import RemoteRewards, connect
from characterflywheel.reward.server import card_of, serve
from characterflywheel.reward.wire import Limits, ScoreRequest, content_of
from characterflywheel.safety.policy import SafetyPolicy
from characterflywheel.training.rejection_sampling import reject

TOLERANCE = 1e-6  # float32
ROUNDING = 0.02  # bfloat16 has 8 bits
SAFETY = SafetyPolicy(classifiers=(lambda text, context: ("harm",) if "rain" in text else (),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_artifact(tmp_path_factory)


@pytest.fixture(scope="module")
def models(folder: Path) -> RewardModels:
    return loaded(folder, torch.float32)


@pytest.fixture(scope="module")
def address(models: RewardModels, folder: Path) -> Iterator[str]:
    with served(models, folder) as address:
        yield address


@pytest.fixture(scope="module")
def remote(address: str, folder: Path) -> Iterator[RemoteRewards]:
    rewards = connect(address, folder.name, content_of(outputs(folder)))
    yield rewards
    rewards.close()


def post(address: str, path: str, **body: object) -> httpx2.Response:
    return httpx2.post(f"{address}{path}", json=body)


def said(prompt: Sequence[ChatMessage]) -> list[dict[str, str]]:
    return [m.model_dump() for m in prompt]


def test_scores_over_http_are_those_of_the_models(remote: RemoteRewards, models: RewardModels):
    """Alone, a request is the same call of the models, so the numbers are the same to the last bit."""
    assert remote.composite(PROMPTS, REPLIES) == models.composite(PROMPTS, REPLIES)
    assert remote.parts(PROMPTS, REPLIES) == models.parts(PROMPTS, REPLIES)
    assert remote.judge(PROMPTS, REPLIES, SAFETY) == models.judge(PROMPTS, REPLIES, SAFETY)
    assert [one.vetoed for one in remote.judge(PROMPTS, REPLIES, SAFETY)[0]] == [None, None, "harm"]
    assert remote.pointwise.score(PROMPTS, REPLIES) == models.pointwise.score(PROMPTS, REPLIES)
    assert remote.gold is not None
    assert models.gold is not None
    assert remote.gold.score(PROMPTS, REPLIES) == models.gold.score(PROMPTS, REPLIES)
    firsts, seconds = ["Yes.", "tea", "Because."], ["No!", "rain", "Why not?"]
    assert remote.pairwise.prefers(PROMPTS, firsts, seconds) == models.pairwise.prefers(PROMPTS, firsts, seconds)
    assert remote.pairwise.both_orders(PROMPTS, firsts, seconds) == models.pairwise.both_orders(
        PROMPTS, firsts, seconds
    )
    assert remote.pointwise.prefers(PROMPTS, firsts, seconds) == models.pointwise.prefers(PROMPTS, firsts, seconds)


def test_equal_replies_are_equal(remote: RemoteRewards):
    assert remote.pairwise.prefers(PROMPTS, ["tea", "no", "sea"], ["tea", "yes", "sea"])[::2] == [0.5, 0.5]


def test_nothing_to_score_is_nothing(remote: RemoteRewards, models: RewardModels):
    assert remote.composite([], []) == models.composite([], []) == []
    assert remote.pointwise.score([asks("Hi"), asks("Ho")], [[], ["a"]])[0] == []
    assert remote.pairwise.prefers([], [], []) == []


class Writer:
    """A policy that writes seeded words."""

    name = "writer"

    def complete(
        self, conversations: Sequence[Sequence[ChatMessage]], *, n: int = 1, sampling: Sampling = Sampling(),
        seeds: Sequence[int],
    ) -> list[list[Completion]]:  # fmt: skip
        words = ("tea", "rain", "sea", "Do you?", "stars", "ünï 🌊")
        texts = [[" ".join(random.Random(seed + i).choices(words, k=4)) for i in range(n)] for seed in seeds]
        return [[Completion(text, (1,), (-1.0,), "stop") for text in several] for several in texts]


def test_selection_in_one_request_leaves_the_same_bytes(remote: RemoteRewards, models: RewardModels, tmp_path: Path):
    """Several requests cut batches at other places than one call here does, which may change a score's last bits."""
    prompts = [
        Prompt(
            id=f"p{i}", conversation_id=f"c{i}", user_id=f"u{i}", source="user", character_id="mo", split="train",
            messages=asks(f"{i}?"), cluster=0, turn=1, created_at=datetime(2026, 1, 5, tzinfo=UTC),
        )
        for i in range(6)
    ]  # fmt: skip
    summaries = [
        reject(Work(tmp_path / name, 1), RejectionConfig(candidates=6), prompts, {"writer": Writer()}, judge, SAFETY)
        for name, judge in (("here", models), ("there", remote))
    ]
    here, there = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.parquet")} for name in ("here", "there")
    )
    assert summaries[0] == summaries[1]
    assert summaries[0].accepted > 0
    assert summaries[0].reasons["unsafe"] > 0
    assert here == there
    assert "scores.parquet" in here


def test_an_empty_request_has_an_empty_answer(address: str):
    for by in ("composite", "pointwise", "gold"):
        answer = post(address, "/v1/score", prompts=[], replies=[], by=by)
        assert (answer.status_code, answer.json()["scores"]) == (200, [])
    for by in ("pairwise", "pointwise"):
        answer = post(address, "/v1/prefer", prompts=[], firsts=[], seconds=[], by=by)
        assert (answer.status_code, answer.json()["probabilities"]) == (200, [])


def test_the_model_says_what_it_is(address: str, folder: Path, models: RewardModels):
    told = card(address)
    assert (told.artifact, told.generation, told.gold) == (folder.name, 3, True)
    assert (told.mean, told.deviation) == models.pointwise.scale
    assert (told.signals, told.weights) == (("thumb_up",), {"thumb_up": 0.25})
    assert (told.content, told.precision) == (content_of(outputs(folder)), "float32")
    assert httpx2.get(f"{address}/healthz").json() == httpx2.get(f"{address}/readyz").json() == {"status": "ok"}


def test_content_is_the_weights_and_not_the_rows_beside_them(folder: Path):
    files = outputs(folder)
    assert content_of(files | {"dropped.parquet": "1"}) == content_of(files | {"dropped.parquet": "2"})
    assert content_of(files) != content_of(files | {"pairwise.safetensors": "0"})


def test_files_that_were_changed_are_not_served(models: RewardModels, folder: Path, tmp_path: Path):
    other = shutil.copytree(folder, tmp_path / folder.name)
    with (other / "reward.json").open("a") as file:
        file.write(" ")
    with pytest.raises(FlywheelError, match="files have changed since the reward stage wrote them"):
        card_of(models, other, 1)
    (other / "artifact.json").unlink()
    with pytest.raises(FlywheelError, match="holds no complete artifact: run the reward stage"):
        card_of(models, other, 1)


class Slow:
    """Models that wait to be let on and count their calls."""

    def __init__(self, models: RewardModels) -> None:
        self.models, self.go, self.calls = models, threading.Event(), list[tuple[int, int]]()
        self.gold, self.pairwise, self.pointwise = models.gold, models.pairwise, self
        self.signals, self.weights = models.signals, models.weights
        self.scale, self.net = models.pointwise.scale, models.pointwise.net

    def score(self, prompts, replies):  # type: ignore[no-untyped-def]
        self.go.wait(10)
        self.calls.append((len(prompts), sum(map(len, replies))))
        return self.models.pointwise.score(prompts, replies)

    def prefers(self, prompts, firsts, seconds):  # type: ignore[no-untyped-def]
        return self.models.pointwise.prefers(prompts, firsts, seconds)

    def parts(self, prompts, replies) -> list[list[Scored]]:  # type: ignore[no-untyped-def]
        return self.models.parts(prompts, replies)


def requests() -> list[ScoreRequest]:
    """Six requests for two prompts; replies recur."""
    return [
        ScoreRequest(prompts=(PROMPTS[i % 2],), replies=(("tea", f"number {i // 2}", "tea"),), by="pointwise")
        for i in range(6)
    ]


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, TOLERANCE), (torch.bfloat16, ROUNDING)])
def test_requests_that_wait_are_joined_and_score_the_same(folder: Path, precision: torch.dtype, tolerance: float):
    """What is computed together may be added up in another order; the scores differ by less than the tolerance."""
    models = loaded(folder, precision)
    slow = Slow(models)
    worker = Worker(slow, "m", Limits())
    first = worker.put(requests()[0])
    while worker._jobs:
        time.sleep(0.001)
    answers = [worker.put(request) for request in requests()]
    slow.go.set()
    told = [answer.result(10).scores for answer in answers]  # type: ignore[union-attr]
    worker.stop()
    assert first.result().model == "m"
    assert slow.calls == [(1, 2), (2, 8)], "each prompt once, with each of its replies once"
    for request, scores in zip(requests(), told, strict=True):
        alone = models.pointwise.score(request.prompts, request.replies)
        assert np.abs(np.array(scores) - np.array(alone)).max() < tolerance


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.sampled_from("xyz"), max_size=4)), max_size=3),
        min_size=1, max_size=4,
    )
)  # fmt: skip
def test_joined_requests_lead_back_to_what_was_asked(drawn: list[list[tuple[str, list[str]]]]):
    asked = [
        ScoreRequest(prompts=tuple(asks(p) for p, _ in one), replies=tuple(tuple(r) for _, r in one)) for one in drawn
    ]
    joined = join(asked)
    assert len(set(joined.prompts)) == len(joined.prompts)
    assert all(len(set(several)) == len(several) for several in joined.replies)
    for request, places in zip(asked, joined.places, strict=True):
        back = tuple(tuple(joined.replies[p][k] for p, k in mine) for mine in places)
        assert back == request.replies
        for prompt, mine in zip(request.prompts, places, strict=True):
            assert {joined.prompts[p] for p, _ in mine} <= {prompt}


def test_a_request_that_fails_fails_alone(models: RewardModels):
    slow = Slow(models)
    worker = Worker(slow, "m", Limits())
    held = worker.put(requests()[0])
    long = ChatMessage(role="system", content="word " * 200)
    bad = ScoreRequest(prompts=((long, asks("Hi")[1]),), replies=(("tea",),), by="pointwise")
    answers = [worker.put(request) for request in (requests()[1], bad, requests()[2])]
    slow.go.set()
    assert held.result(10) is not None
    assert answers[0].result(10) is not None
    assert answers[2].result(10) is not None
    with pytest.raises(FlywheelError, match="the limit for prompts is 64"):
        answers[1].result(10)
    assert worker.alive
    worker.stop()


def test_too_many_in_one_pass_are_not_joined(models: RewardModels):
    slow = Slow(models)
    worker = Worker(slow, "m", Limits(max_joined=6))
    answers = [worker.put(request) for request in requests()]
    slow.go.set()
    assert all(answer.result(10) for answer in answers)
    worker.stop()
    assert len(slow.calls) >= 3
    assert max(texts for _, texts in slow.calls) <= 6


def test_a_full_queue_says_when_to_come_back_and_a_stopped_one_says_so(models: RewardModels):
    slow = Slow(models)
    worker = Worker(slow, "m", Limits(max_waiting=2))
    worker.put(requests()[0])
    while worker._jobs:
        time.sleep(0.001)
    waiting = [worker.put(requests()[i]) for i in (1, 2)]
    with pytest.raises(Full) as full:
        worker.put(requests()[3])
    assert full.value.seconds >= 1
    threading.Timer(0.05, slow.go.set).start()
    worker.stop()
    for answer in waiting:
        with pytest.raises(Closing):
            answer.result(1)
    with pytest.raises(Closing):
        worker.put(requests()[0])
    assert not worker.alive


def test_who_would_wait_too_long_is_told_to_come_back(models: RewardModels):
    slow = Slow(models)
    worker = Worker(slow, "m", Limits(max_wait_s=0.015))
    worker.put(requests()[0])
    while worker._jobs:
        time.sleep(0.001)
    waiting = worker.put(requests()[1])
    assert requests()[1].texts * worker._pace > 0.015
    with pytest.raises(Full):
        worker.put(requests()[2])
    slow.go.set()
    assert waiting.result(10)
    worker.stop()


def test_busy_over_http_is_429_with_retry_after(models: RewardModels, folder: Path):
    slow = Slow(models)
    body = {"prompts": [said(PROMPTS[0])], "replies": [["tea"]], "by": "pointwise"}
    with served(slow, folder, limits=Limits(max_waiting=1)) as address, ThreadPoolExecutor(8) as pool:  # type: ignore[arg-type]
        several = [pool.submit(post, address, "/v1/score", **body) for _ in range(8)]
        while sum(one.done() for one in several) < 6:
            time.sleep(0.005)
        slow.go.set()
        answers = [one.result() for one in several]
    assert sorted(a.status_code for a in answers) == [200] * 2 + [429] * 6
    refused = next(a for a in answers if a.status_code == 429)
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert int(refused.headers["Retry-After"]) >= 1


def test_many_clients_get_their_own_scores(address: str, folder: Path, models: RewardModels):
    texts = [[f"reply {i} {j}" for j in range(3)] for i in range(8)]
    prompts = [asks(f"question {i % 3}") for i in range(8)]

    def client(i: int) -> list[list[float]]:
        rewards = connect(address, folder.name, content_of(outputs(folder)))
        told = [rewards.pointwise.score([prompts[i]], [texts[i]])[0] for _ in range(3)]
        rewards.close()
        return told

    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(client, range(8)))
    alone = [models.pointwise.score([p], [t])[0] for p, t in zip(prompts, texts, strict=True)]
    for several, expected in zip(told, alone, strict=True):
        for scores in several:
            assert scores == pytest.approx(expected, abs=TOLERANCE)


def test_what_cannot_be_scored_is_said_in_openais_shape(address: str):
    body = {"prompts": [said(PROMPTS[0])], "replies": [["tea"]]}
    cases = [
        ("/v1/score", {**body, "replies": []}, 422, "1 prompts, replies to 0: give a list for each"),
        ("/v1/score", {**body, "prompts": [[]]}, 422, "prompts.0: Tuple should have at least 1 item"),
        ("/v1/score", {**body, "by": "taste"}, 422, "by: Input should be"),
        ("/v1/score", {**body, "more": 1}, 422, "more: Extra inputs are not permitted"),
        ("/v1/score", {**body, "replies": [["x"] * 1025]}, 422, "1025 in one request, at most 1024: split it"),
        ("/v1/prefer", {"prompts": body["prompts"], "firsts": ["a"], "seconds": []}, 422, "give as many of each"),
        ("/v1/score", {**body, "prompts": [[{"role": "system", "content": "w " * 99}]]}, 400, "the limit for prompts"),
    ]
    for path, asked, status, message in cases:
        answer = post(address, path, **asked)
        assert (answer.status_code, set(answer.json()["error"])) == (status, {"message", "type", "code", "param"})
        assert message in answer.json()["error"]["message"]
    assert httpx2.get(f"{address}/v1/nothing").json()["error"]["code"] == "not_found"


def test_a_body_that_is_too_large_is_413(models: RewardModels, folder: Path):
    with served(models, folder, limits=Limits(max_body_bytes=2048)) as address:
        answer = post(address, "/v1/score", prompts=[said(PROMPTS[0])], replies=[["x" * 4000]])
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_a_key_is_asked_for_before_anything_is_read(models: RewardModels, folder: Path):
    with served(models, folder, key="open-sesame") as address:
        refused = httpx2.post(f"{address}/v1/score", content=b"{" * 100)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx2.get(f"{address}/v1/model", headers={"Authorization": "Bearer no"}).status_code == 401
        assert httpx2.get(f"{address}/readyz").status_code == 200
        rewards = connect(address, key="open-sesame")
        assert rewards.composite(PROMPTS, REPLIES) == models.composite(PROMPTS, REPLIES)
        rewards.close()
        with pytest.raises(FlywheelError, match="refuses: 401: Send the key that the server has in FLYWHEEL_SCORE_KEY"):
            connect(address, key="wrong")


def test_a_score_that_is_not_finite_is_an_error_and_no_number(models: RewardModels, folder: Path):
    class Mad(Slow):
        def score(self, prompts, replies):  # type: ignore[no-untyped-def]
            return [[float("nan") for _ in several] for several in replies]

    mad = Mad(models)
    with served(mad, folder) as address:  # type: ignore[arg-type]
        answer = post(address, "/v1/score", prompts=[said(PROMPTS[0])], replies=[["tea"]], by="pointwise")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "score_not_finite")
        rewards = connect(address)
        with pytest.raises(FlywheelError, match="gave a score that is not finite: look at their training"):
            rewards.pointwise.score(PROMPTS, REPLIES)
        rewards.close()


def test_without_a_gold_model_nobody_can_ask_it(models: RewardModels, folder: Path):
    without = RewardModels(models.pointwise, models.pairwise, models.signals, models.signal_weights, models.scales)
    with served(without, folder) as address:
        rewards = connect(address)
        assert rewards.gold is None
        rewards.close()
        answer = post(address, "/v1/score", prompts=[said(PROMPTS[0])], replies=[["tea"]], by="gold")
        assert answer.status_code == 400
        assert "no gold model: train with reward.gold_share > 0" in answer.json()["error"]["message"]


def test_running_requests_are_answered_before_the_server_ends(models: RewardModels, folder: Path):
    slow = Slow(models)
    with ThreadPoolExecutor(1) as pool:
        with served(slow, folder) as address:  # type: ignore[arg-type]
            body = {"prompts": [said(PROMPTS[0])], "replies": [["tea"]], "by": "pointwise"}
            answer = pool.submit(post, address, "/v1/score", **body)
            time.sleep(0.2)
            threading.Timer(0.2, slow.go.set).start()
        assert answer.result().status_code == 200


def test_others_are_let_in_with_a_key_only(models: RewardModels, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FLYWHEEL_SCORE_KEY", raising=False)
    with pytest.raises(FlywheelError, match=r"0.0.0.0 can be reached by others: set a key in FLYWHEEL_SCORE_KEY"):
        serve(models, card_of(models, folder, 1), "0.0.0.0", 0)
    monkeypatch.setenv("FLYWHEEL_SCORE_KEY", "k")
    with pytest.raises(FlywheelError, match=r"cannot listen on 192.0.2.1:0"):
        serve(models, card_of(models, folder, 1), "192.0.2.1", 0)
