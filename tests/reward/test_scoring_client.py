"""The scoring client where servers are busy, away, others than wanted, or wrong."""

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_fixture import asks
from scoring_fixture import PROMPTS, REPLIES, listening
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from characterflywheel.errors import FlywheelError
from characterflywheel.records import Scored
from characterflywheel.reward.remote import Connection, RemoteRewards, _batches, connect
from characterflywheel.reward.wire import Card, Limits, PreferAnswer, PreferRequest, ScoreAnswer, ScoreRequest

CARD = Card(
    artifact="reward-0123456789ab", content="c0ffee", generation=1, mean=0.0, deviation=1.0, signals=("love",),
    weights={"love": 0.1}, gold=True, precision="float32", limits=Limits(max_replies=4),
)  # fmt: skip


class Server:
    """A server whose score is a reply's length. `spoilt` answers come first; `spoil` changes every proper one."""

    def __init__(self, *spoilt: Response) -> None:
        self.card, self.spoilt, self.asked = CARD, list(spoilt), list[ScoreRequest | PreferRequest]()

    def spoil(self, answer: ScoreAnswer | PreferAnswer) -> ScoreAnswer | PreferAnswer:
        return answer

    async def model(self, request: Request) -> Response:
        return Response(self.card.model_dump_json(), media_type="application/json")

    async def score(self, request: Request) -> Response:
        asked = ScoreRequest.model_validate_json(await request.body())
        self.asked.append(asked)
        if self.spoilt:
            return self.spoilt.pop(0)
        scores = [[float(len(text)) for text in several] for several in asked.replies]
        parts = [[Scored(score=s, preference=s, signals={"love": 1.0}) for s in several] for several in scores]
        answer = ScoreAnswer(model=self.card.id, scores=scores, parts=parts if asked.by == "composite" else None)
        return Response(self.spoil(answer).model_dump_json(), media_type="application/json")

    async def prefer(self, request: Request) -> Response:
        asked = PreferRequest.model_validate_json(await request.body())
        self.asked.append(asked)
        won = [1.0 if len(a) > len(b) else 0.0 for a, b in zip(asked.firsts, asked.seconds, strict=True)]
        orders = (won, [1 - p for p in won]) if asked.by == "pairwise" else None
        answer = PreferAnswer(model=self.card.id, probabilities=won, orders=orders)
        return Response(self.spoil(answer).model_dump_json(), media_type="application/json")

    @contextmanager
    def running(self) -> Iterator[str]:
        Listening.now = self
        yield Listening.address


class Listening:
    """One listener for all tests of this file; the server that is `now` answers."""

    now: Server
    address: str


@pytest.fixture(scope="module", autouse=True)
def listener() -> Iterator[None]:
    async def model(request: Request) -> Response:
        return await Listening.now.model(request)

    async def score(request: Request) -> Response:
        return await Listening.now.score(request)

    async def prefer(request: Request) -> Response:
        return await Listening.now.prefer(request)

    posts = [Route("/v1/score", score, methods=["POST"]), Route("/v1/prefer", prefer, methods=["POST"])]
    with listening(Starlette(routes=[Route("/v1/model", model), *posts])) as Listening.address:
        yield


@contextmanager
def connected(server: Server, patience_s: float = 5.0) -> Iterator[RemoteRewards]:
    with server.running() as address:
        rewards = connect(address, CARD.artifact, CARD.content, patience_s=patience_s)
        yield rewards
        rewards.close()


def refusal(status: int, code: str, **headers: str) -> Response:
    body = f'{{"error": {{"message": "not now", "type": "x", "code": "{code}", "param": null}}}}'
    return Response(body, status, headers={name.replace("_", "-"): value for name, value in headers.items()})


def lengths(replies: Sequence[Sequence[str]]) -> list[list[float]]:
    return [[float(len(text)) for text in several] for several in replies]


def test_big_requests_are_split_and_come_back_in_order():
    told: list[tuple[int, int]] = []
    server = Server()
    with server.running() as address:
        rewards = connect(address, on_progress=lambda done, total: told.append((done, total)))
        replies = [["a"] * 3, ["bb", "ccc"], [], [f"{'d' * i}" for i in range(9)]]
        prompts = [asks(str(i)) for i in range(4)]
        assert rewards.composite(prompts, replies) == lengths(replies)
        assert [[one.score for one in several] for several in rewards.parts(prompts, replies)] == lengths(replies)
        sizes = [request.texts for request in server.asked]
        rewards.close()
    assert max(sizes) <= 4
    assert sizes == [3, 2, 4, 4, 1] * 2
    assert told[:5] == [(3, 14), (5, 14), (9, 14), (13, 14), (14, 14)]


def test_pairs_are_split_too():
    server = Server()
    with connected(server) as rewards:
        firsts, seconds = ["aa", "b", "cc", "d", "ee"], ["a", "bb", "c", "dd", "e"]
        prompts = [asks(str(i)) for i in range(5)]
        assert rewards.pairwise.prefers(prompts, firsts, seconds) == [1.0, 0.0, 1.0, 0.0, 1.0]
        assert rewards.pairwise.both_orders(prompts, firsts, seconds)[1] == [0.0, 1.0, 0.0, 1.0, 0.0]
        assert rewards.pointwise.prefers(prompts, firsts, seconds) == [1.0, 0.0, 1.0, 0.0, 1.0]
        assert [request.texts for request in server.asked] == [4, 4, 2] * 3


@given(st.lists(st.lists(st.text('ab\n"\\é🌊', max_size=60), max_size=7), max_size=6), st.integers(1500, 3000))
def test_every_reply_is_in_one_request_within_the_limits(replies: list[list[str]], room: int):
    prompts = [asks(f"{i}") for i in range(len(replies))]
    limits = Limits(max_replies=3, max_body_bytes=room)
    seen = []
    for batch in _batches(prompts, replies, limits):
        request = ScoreRequest(
            prompts=tuple(prompts[one.prompt] for one in batch),
            replies=tuple(tuple(replies[one.prompt][one.start : one.stop]) for one in batch),
        )
        assert request.texts <= 3
        assert len(request.model_dump_json().encode()) <= room
        seen += [(one.prompt, j) for one in batch for j in range(one.start, one.stop)]
    assert seen == [(i, j) for i, several in enumerate(replies) for j in range(len(several))]


def test_a_prompt_that_no_request_can_hold_is_said():
    with pytest.raises(FlywheelError, match=r"has \d+ bytes, the scoring server takes 976: shorten it"):
        list(_batches([asks("x" * 2000)], [["a"]], Limits(max_body_bytes=2000)))


def test_a_busy_server_is_asked_again_when_it_says():
    pauses: list[float] = []
    server = Server(refusal(429, "busy", Retry_After="2"), refusal(503, "closing"), refusal(502, "proxy"))
    with server.running() as address:
        connection = Connection(address, CARD.id, sleep=pauses.append)
        rewards = RemoteRewards(connection, CARD)
        assert rewards.pointwise.score(PROMPTS[:1], [["tea"]]) == [[3.0]]
        rewards.close()
    assert len(pauses) == 3
    assert pauses[0] == 2.0
    assert 0.1 <= pauses[1] <= 0.2
    assert 0.2 <= pauses[2] <= 0.4


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def ask_over(address: str, time: Time) -> list[list[float]]:
    connection = Connection(address, CARD.id, clock=time.clock, sleep=time.sleep)
    rewards = RemoteRewards(connection, CARD)
    try:
        return rewards.pointwise.score(PROMPTS[:1], [["tea"]])
    finally:
        rewards.close()


def test_a_busy_server_is_alive_and_uses_up_no_patience():
    server, time = Server(*[refusal(429, "busy", Retry_After="60")] * 20), Time()
    with server.running() as address:
        assert ask_over(address, time) == [[3.0]]
    assert time.now == 1200.0


def test_a_server_that_stays_busy_for_an_hour_is_given_up():
    server, time = Server(*[refusal(429, "busy", Retry_After="60")] * 99), Time()
    with server.running() as address, pytest.raises(FlywheelError, match=r"busy for 3600 s \(429: not now\): wait"):
        ask_over(address, time)
    assert len(server.asked) == 61


def test_a_proxy_before_a_server_that_is_away_is_given_up():
    server, time = Server(*[refusal(502, "proxy")] * 99), Time()
    with (
        server.running() as address,
        pytest.raises(FlywheelError, match=r"did not answer in \d+ tries over \d\d s \(502: not now\): start it with"),
    ):
        ask_over(address, time)
    assert 50 < time.now < 60


@contextmanager
def losing(time: Time, times: int) -> Iterator[str]:
    """A server that computes for 61 s and goes, this often, and then answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    body = ScoreAnswer(model=CARD.id, scores=[[3.0]]).model_dump_json().encode()

    def answer() -> None:
        for i in range(times + 1):
            try:
                taken, _ = listener.accept()
            except OSError:
                return
            taken.recv(65536)
            time.now += 61.0
            if i == times:
                taken.sendall(
                    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body)
                )
            taken.close()

    thread = threading.Thread(target=answer)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def test_a_request_that_was_lost_while_it_was_computed_is_asked_again():
    time = Time()
    with losing(time, 2) as address:
        assert ask_over(address, time) == [[3.0]]
    assert time.now > 180


def test_a_request_that_takes_every_server_down_is_given_up():
    time = Time()
    with losing(time, 9) as address, pytest.raises(FlywheelError, match="took a request 3 times and never answered"):
        ask_over(address, time)


def test_what_a_server_failed_at_is_asked_once_more():
    server = Server(refusal(500, "internal_error"))
    with connected(server) as rewards:
        assert rewards.pointwise.score(PROMPTS[:1], [["tea"]]) == [[3.0]]
    server = Server(*[refusal(500, "internal_error")] * 9)
    with connected(server) as rewards, pytest.raises(FlywheelError, match="refuses: 500: not now"):
        rewards.pointwise.score(PROMPTS, REPLIES)
    assert len(server.asked) == 2


def test_an_empty_prompt_is_said():
    with connected(Server()) as rewards, pytest.raises(FlywheelError, match="prompt 1 has no message"):
        rewards.pointwise.score([PROMPTS[0], ()], [["tea"], ["tea"]])


def test_a_server_that_is_down_is_waited_for_and_then_given_up():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(FlywheelError, match=r"ConnectError.*start it with `flywheel score DIR`, or leave"):
        connect(address, patience_s=0.3)


def test_a_server_that_starts_late_is_found():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    late = socket.socket()
    late.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

    def answer() -> None:
        late.bind(("127.0.0.1", port))
        late.listen()
        taken, _ = late.accept()
        taken.recv(65536)
        body = CARD.model_dump_json().encode()
        taken.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body))
        taken.close()

    starter = threading.Timer(0.3, answer)
    starter.start()
    rewards = connect(f"http://127.0.0.1:{port}", patience_s=5)
    assert rewards.card == CARD
    rewards.close()
    starter.join()
    late.close()


def test_a_connection_that_breaks_in_the_middle_of_an_answer_is_tried_again():
    listener = socket.create_server(("127.0.0.1", 0))
    body = CARD.model_dump_json().encode()

    def answer() -> None:
        for part in (body[:40], body):
            taken, _ = listener.accept()
            taken.recv(65536)
            taken.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), part))
            taken.close()

    thread = threading.Thread(target=answer)
    thread.start()
    rewards = connect(f"http://127.0.0.1:{listener.getsockname()[1]}", patience_s=5)
    assert rewards.card == CARD
    rewards.close()
    thread.join()
    listener.close()


def test_another_model_than_planned_is_refused():
    with (
        Server().running() as address,
        pytest.raises(FlywheelError, match="serves reward-0123456789ab@c0ffee, this stage was planned with reward-fff"),
    ):
        connect(address, "reward-fff", "c0ffee")
    with Server().running() as address, pytest.raises(FlywheelError, match="planned with reward-0123456789ab@decaf"):
        connect(address, CARD.artifact, "decaf")


@pytest.mark.parametrize("by", ["composite", "pointwise", "pairwise"])
def test_a_server_that_changes_its_models_on_the_way_is_refused(by: str):
    server = Server()
    with connected(server) as rewards:
        assert rewards.composite(PROMPTS, REPLIES) == lengths(REPLIES)
        server.card = CARD.model_copy(update={"content": "other"})
        with pytest.raises(FlywheelError, match=r"serves reward-0123456789ab@other, this stage was planned with"):
            ask(rewards, by)


def ask(rewards: RemoteRewards, by: str) -> object:
    if by == "pairwise":
        return rewards.pairwise.prefers(PROMPTS, ["a"] * 3, ["b"] * 3)
    return rewards.composite(PROMPTS, REPLIES) if by == "composite" else rewards.pointwise.score(PROMPTS, REPLIES)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a.model_copy(update={"scores": a.scores[:1]}), r"left out scores: \[3\], not \[3, 1\]"),
        (lambda a: a.model_copy(update={"scores": [s[:1] for s in a.scores]}), r"left out scores: \[1, 1\], not \[3"),
        (lambda a: a.model_copy(update={"parts": None}), "left out scores"),
        (lambda a: a.model_copy(update={"scores": [[float("nan")] * 3, [0.0]]}), "does not answer like a scoring"),
    ],
)
def test_half_an_answer_is_none(change, said: str):  # type: ignore[no-untyped-def]
    server = Server()
    server.spoil = change  # type: ignore[method-assign]
    with connected(server) as rewards, pytest.raises(FlywheelError, match=said):
        rewards.composite(PROMPTS, REPLIES)


def test_numbers_that_json_does_not_have_are_refused():
    server = Server(Response(f'{{"model": "{CARD.id}", "scores": [[NaN]], "parts": null}}'))
    with connected(server) as rewards, pytest.raises(FlywheelError, match="gave a score that is not finite"):
        rewards.pointwise.score(PROMPTS[:1], [["tea"]])


def test_half_a_comparison_is_none():
    server = Server()
    server.spoil = lambda a: a.model_copy(update={"orders": None})  # type: ignore[method-assign]
    with connected(server) as rewards, pytest.raises(FlywheelError, match="left out probabilities of 2 pairs"):
        rewards.pairwise.prefers(PROMPTS, ["a"] * 3, ["b"] * 3)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Response("<html>hello</html>"), "does not answer like a scoring server"),
        (Response("nothing here", 404), "refuses: 404: 'nothing here'"),
        (refusal(401, "invalid_api_key"), "refuses: 401: not now"),
        (refusal(500, "score_not_finite"), "refuses: 500: not now"),
    ],
)
def test_what_asking_again_does_not_mend_is_not_asked_again(answer: Response, said: str):
    server = Server(answer)
    with connected(server) as rewards, pytest.raises(FlywheelError, match=said):
        rewards.pointwise.score(PROMPTS, REPLIES)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("address", "key", "said"),
    [
        ("localhost:8766", "", "reward.server = 'localhost:8766' is no address such as http://HOST:8766"),
        ("http://h", "schlüssel", "characters that cannot be sent"),
    ],
)
def test_what_cannot_be_asked_is_said_at_once(address: str, key: str, said: str):
    with pytest.raises(FlywheelError, match=said):
        Connection(address, key=key)


def test_the_gold_model_only_scores():
    with connected(Server()) as rewards:
        gold = rewards.gold
        assert gold is not None
        with pytest.raises(FlywheelError, match="score with the gold model"):
            gold.prefers(PROMPTS, ["a"] * 3, ["b"] * 3)
