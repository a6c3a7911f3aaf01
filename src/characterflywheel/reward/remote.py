"""Reward models on a scoring server, used as if they were here (`server`, `wire`); no torch is imported.

A stage names the models that it was planned with, and every answer names the models that gave it: another server
behind the address, or one that was restarted with other models, is an error and never a score. A server that is away
is asked again for `patience_s`, one that is busy for `busy_s`; what it refuses, or fails at twice, is an error.
"""

import itertools
import json
import math
import os
import random
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from ..addresses import refuse_password
from ..errors import FlywheelError, RewardGone
from ..progress import Advance
from ..records import Record, Scored
from ..safety.policy import SafetyPolicy
from .selection import Conversations, veto
from .wire import KEY_VARIABLE, Card, Limits, PreferAnswer, PreferRequest, ScoreAnswer, ScoreRequest, model_id

PATIENCE_S = 60.0
"""How long a server may be away, as when it is started again."""
BUSY_S = 3600.0
"""How long a server that is there may say that it has no time."""
TIMEOUT_S = 1800.0
"""How long it may compute one request, with what was in the queue before (`Limits.max_wait_s`)."""
_LOSSES = 3
_BUSY, _PROXY = (429, 503), (502, 504)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_FINAL = frozenset({"score_not_finite"})
A = TypeVar("A", bound=BaseModel)


class Connection:
    """One server: asks, asks again, and reads the answers. `model`: whose scores are wanted; any if None."""

    def __init__(
        self, address: str, model: str | None = None, *, key: str | None = None, patience_s: float = PATIENCE_S,
        busy_s: float = BUSY_S, timeout_s: float = TIMEOUT_S, start: str = "flywheel score DIR",
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        """`key` is taken from the environment where absent; `start` is the command that an error recommends.

        Raises:
            FlywheelError: `address` is no http address, or the key cannot be sent.
        """
        if not address.startswith(("http://", "https://")):
            raise FlywheelError(f"reward.server = {address!r} is no address such as http://HOST:8766.")
        refuse_password(address, "reward.server", KEY_VARIABLE)
        key = (os.environ.get(KEY_VARIABLE, "") if key is None else key).strip()
        if not (key.isascii() and key.isprintable()):
            raise FlywheelError(f"the key in {KEY_VARIABLE} has characters that cannot be sent: set it again.")
        self.address, self.model = address.rstrip("/"), model
        self._patience_s, self._busy_s, self._start = patience_s, busy_s, start
        self._clock, self._sleep = clock, sleep
        self._http = httpx2.Client(
            base_url=self.address, timeout=httpx2.Timeout(timeout_s, connect=5.0), follow_redirects=False,
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )  # fmt: skip

        self._end = weakref.finalize(self, self._http.close)

    def close(self) -> None:
        """Close the kept connections; done by itself when nobody holds this any more."""
        self._end()

    def ask(self, path: str, request: Record, answer: type[A]) -> A:
        """Send a request and read its answer.

        Raises:
            RewardGone: the server stays away longer than `patience_s` or busy longer than `busy_s`, or loses the
                request three times.
            FlywheelError: it refuses, fails at the request twice, or gives no proper answer.
        """
        return self._read(self._tried("POST", path, request.model_dump_json().encode()), answer)

    def get(self, path: str, answer: type[A]) -> A:
        """Read what is at an address."""
        return self._read(self._tried("GET", path, None), answer)

    def check(self, served: str) -> None:
        """Raises FlywheelError where other models answered than are wanted."""
        if self.model is not None and served != self.model:
            raise FlywheelError(
                f"{self.address} serves {served}, this stage was planned with {self.model}: serve that one with "
                "`flywheel score DIR --generation N`, or leave reward.server out."
            )

    def _tried(self, method: str, path: str, body: bytes | None) -> httpx2.Response:
        """Ask until there is an answer. Only the time in which nobody is there uses up `patience_s`: a server that
        computes or says that it is busy is alive."""
        began, lost, failed = self._clock(), 0, 0
        away: float | None = None  # since when nobody is there
        for attempt in itertools.count():
            pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt) * random.uniform(0.5, 1.0)
            asked = self._clock()
            try:
                response = self._http.request(method, path, content=body, headers={"Content-Type": "application/json"})
            except httpx2.TransportError as error:
                said = f"{type(error).__name__}: {error}"
                if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
                    away = asked if away is None else away
                else:  # it was there and had taken the request
                    lost, away = lost + 1, self._clock()
            else:
                if response.status_code == 200:
                    return response
                said = self._refusal(response, final=failed > 0)
                failed += response.status_code == 500
                pause = max(pause, _seconds(response))
                away = (asked if away is None else away) if response.status_code in _PROXY else None
            now = self._clock()
            if lost == _LOSSES:
                raise RewardGone(
                    f"the scoring server {self.address} took a request {lost} times and never answered ({said}): its "
                    "log says why."
                )
            if away is not None and now + pause - away > self._patience_s:
                raise RewardGone(
                    f"the scoring server {self.address} did not answer in {attempt + 1} tries over {now - away:.0f} s "
                    f"({said}): start it with `{self._start}`, or leave reward.server out."
                )
            if away is None and now + pause - began > self._busy_s:
                raise RewardGone(
                    f"the scoring server {self.address} has been busy for {now - began:.0f} s ({said}): wait until "
                    "others are done, or leave reward.server out."
                )
            self._sleep(pause)
        raise AssertionError("counting has no end")

    def _refusal(self, response: httpx2.Response, *, final: bool) -> str:
        """Why it was refused, where asking again may help; raises where it cannot, or where a second 500 is `final`."""
        try:
            error = response.json()["error"]
            code, said = str(error["code"]), f"{response.status_code}: {error['message']}"
        except (ValueError, KeyError, TypeError):
            code, said = "", f"{response.status_code}: {response.text[:200]!r}"
        passing = response.status_code in (*_BUSY, *_PROXY) or (response.status_code == 500 and not final)
        if code in _FINAL or not passing:
            raise FlywheelError(f"the scoring server {self.address} refuses: {said}")
        return said

    def _read(self, response: httpx2.Response, answer: type[A]) -> A:
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as error:
            first = error.errors()[0]
            raise FlywheelError(
                f"{self.address} does not answer like a scoring server ({'.'.join(map(str, first['loc']))}: "
                f"{first['msg']}): look at reward.server."
            ) from None


class RemoteScorer:
    """The pointwise (or the gold) model of a server: `Pointwise.score` and `Pointwise.prefers`."""

    def __init__(self, connection: Connection, card: Card, by: str, on_progress: Advance) -> None:
        self._connection, self._card, self._by, self._on_progress = connection, card, by, on_progress

    def score(self, prompts: Conversations, replies: Sequence[Sequence[str]]) -> list[list[float]]:
        """Standardised scores of the replies of each prompt."""
        return self.ask(prompts, replies)[0]

    def prefers(self, prompts: Conversations, firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
        """P(first is better than second) for each prompt."""
        if self._by == "gold":
            raise FlywheelError("a server compares by its pairwise or pointwise model: score with the gold model.")
        return _prefer(self._connection, self._card, prompts, firsts, seconds, self._by, self._on_progress)[0]

    def ask(
        self, prompts: Conversations, replies: Sequence[Sequence[str]]
    ) -> tuple[list[list[float]], list[list[Scored]]]:
        """Scores, and their parts where the composite is asked."""
        scores: list[list[float]] = [[] for _ in prompts]
        parts: list[list[Scored]] = [[] for _ in prompts]
        total, done = sum(map(len, replies)), 0
        for batch in _batches(prompts, replies, self._card.limits):
            request = ScoreRequest(
                prompts=tuple(tuple(prompts[one.prompt]) for one in batch),
                replies=tuple(tuple(replies[one.prompt][one.start : one.stop]) for one in batch), by=self._by,
            )  # fmt: skip
            answer = self._connection.ask("/v1/score", request, ScoreAnswer)
            self._connection.check(answer.model)
            shapes = [[len(texts) for texts in request.replies], [len(mine) for mine in answer.scores]]
            if self._by == "composite":
                shapes.append([len(mine) for mine in answer.parts or ()])
            if any(shape != shapes[0] for shape in shapes):
                raise FlywheelError(f"{self._connection.address} left out scores: {shapes[1]}, not {shapes[0]}.")
            if not all(math.isfinite(score) for mine in answer.scores for score in mine):
                raise _not_finite(self._connection.address)
            for i, one in enumerate(batch):
                scores[one.prompt] += answer.scores[i]
                parts[one.prompt] += answer.parts[i] if answer.parts else []
            done += request.texts
            self._on_progress(done, total)
        return scores, parts


class RemotePairwise:
    """The pairwise model of a server."""

    def __init__(self, connection: Connection, card: Card, on_progress: Advance) -> None:
        self._connection, self._card, self._on_progress = connection, card, on_progress

    def prefers(self, prompts: Conversations, firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
        """P(first is better than second) for each prompt."""
        return _prefer(self._connection, self._card, prompts, firsts, seconds, "pairwise", self._on_progress)[0]

    def both_orders(
        self, prompts: Conversations, firsts: Sequence[str], seconds: Sequence[str]
    ) -> tuple[list[float], list[float]]:
        """P(the reply read first is better): with `firsts` read first, and with `seconds` read first."""
        return _prefer(self._connection, self._card, prompts, firsts, seconds, "pairwise", self._on_progress)[1:]


class RemoteRewards:
    """One generation's reward models on a server: what selection, RL and offline evaluation use of `RewardModels`."""

    def __init__(self, connection: Connection, card: Card, on_progress: Advance = lambda done, total: None) -> None:
        self.connection, self.card = connection, card
        self._composite = RemoteScorer(connection, card, "composite", on_progress)
        self.pointwise = RemoteScorer(connection, card, "pointwise", on_progress)
        self.gold = RemoteScorer(connection, card, "gold", on_progress) if card.gold else None
        self.pairwise = RemotePairwise(connection, card, on_progress)

    def composite(self, prompts: Conversations, replies: Sequence[Sequence[str]]) -> list[list[float]]:
        """See `RewardModels.composite`."""
        return self._composite.score(prompts, replies)

    def parts(self, prompts: Conversations, replies: Sequence[Sequence[str]]) -> list[list[Scored]]:
        """See `RewardModels.parts`."""
        return self._composite.ask(prompts, replies)[1]

    def judge(
        self, prompts: Conversations, replies: Sequence[Sequence[str]], safety: SafetyPolicy
    ) -> list[list[Scored]]:
        """See `RewardModels.judge`; safety is asked here, not by the server."""
        return veto(self.parts(prompts, replies), prompts, replies, safety)

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


def connect(
    address: str, artifact: str | None = None, content: str | None = None, *, key: str | None = None,
    patience_s: float = PATIENCE_S, on_progress: Advance = lambda done, total: None,
) -> RemoteRewards:  # fmt: skip
    """The reward models that a server has. `artifact` and `content` (`wire.content_of`) say which are wanted.

    Raises:
        FlywheelError: the server cannot be reached, refuses the key, or has other models.
    """
    wanted = model_id(artifact, content) if artifact is not None and content is not None else None
    connection = Connection(address, wanted, key=key, patience_s=patience_s)
    try:
        card = connection.get("/v1/model", Card)
        connection.check(card.id)
    except FlywheelError:
        connection.close()
        raise
    connection.model = card.id  # from here on, whoever answers must be the same
    return RemoteRewards(connection, card, on_progress)


class _Span(NamedTuple):
    """Replies `start` to `stop` of one prompt; always in one request."""

    prompt: int
    start: int
    stop: int


def _batches(prompts: Conversations, replies: Sequence[Sequence[str]], limits: Limits) -> Iterator[list[_Span]]:
    """Spans in requests within the server's limits, in order.

    Raises:
        FlywheelError: a prompt is empty, or with its replies larger than a request may be.
    """
    room = limits.max_body_bytes - 1024
    batch: list[_Span] = []
    texts = size = 0
    for i, (prompt, several) in enumerate(zip(prompts, replies, strict=True)):
        if not prompt:
            raise FlywheelError(f"prompt {i} has no message: a reply is scored as the answer to one.")
        for start in range(0, len(several), limits.max_replies):
            one = _Span(i, start, min(start + limits.max_replies, len(several)))
            more = _size((*(m.content for m in prompt), *several[one.start : one.stop]))
            if more > room:
                raise FlywheelError(
                    f"a prompt with its replies has {more} bytes, the scoring server takes {room}: shorten it."
                )
            if batch and (texts + one.stop - one.start > limits.max_replies or size + more > room):
                yield batch
                batch, texts, size = [], 0, 0
            batch.append(one)
            texts, size = texts + one.stop - one.start, size + more
    if batch:
        yield batch


def _prefer(
    connection: Connection, card: Card, prompts: Conversations, firsts: Sequence[str], seconds: Sequence[str], by: str,
    on_progress: Advance,
) -> tuple[list[float], list[float], list[float]]:  # fmt: skip
    """Probabilities, and those with either reply read first (empty but for the pairwise model)."""
    won: list[float] = []
    orders: tuple[list[float], list[float]] = ([], [])
    for batch in _batches(prompts, list(zip(firsts, seconds, strict=True)), card.limits):
        at = [one.prompt for one in batch]
        request = PreferRequest(
            prompts=tuple(tuple(prompts[i]) for i in at), firsts=tuple(firsts[i] for i in at),
            seconds=tuple(seconds[i] for i in at), by=by,
        )  # fmt: skip
        answer = connection.ask("/v1/prefer", request, PreferAnswer)
        connection.check(answer.model)
        told = [answer.probabilities, *(answer.orders or ())]
        if any(len(values) != len(at) for values in told) or (by == "pairwise") != (answer.orders is not None):
            raise FlywheelError(f"{connection.address} left out probabilities of {len(at)} pairs.")
        if not all(math.isfinite(p) for values in told for p in values):
            raise _not_finite(connection.address)
        won += answer.probabilities
        for told_before, values in zip(orders, answer.orders or (), strict=False):
            told_before.extend(values)
        on_progress(len(won), len(prompts))
    return won, *orders


def _size(texts: Sequence[str]) -> int:
    """At least as many bytes as these texts have in a request, with the names around them."""
    return sum(len(json.dumps(text)) + 40 for text in texts) + 40


def _seconds(response: httpx2.Response) -> float:
    """Retry-After in seconds; 0 where it is absent or a date."""
    try:
        seconds = float(response.headers.get("Retry-After", ""))
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _not_finite(address: str) -> FlywheelError:
    return FlywheelError(f"{address} gave a score that is not finite: look at its models' training before going on.")
