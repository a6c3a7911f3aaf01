"""The scoring server's one worker thread: whatever waits is scored together (PAPER section 3; DESIGN section 6).

Requests for one model that wait while it computes are joined: equal prompts share their prefix, equal replies to them
are scored once. The queue is bounded; who finds it full is told when to come back.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

from ..errors import FlywheelError
from ..records import ChatMessage, Scored
from .calibration import preferred
from .selection import Conversations
from .wire import Limits, PreferAnswer, PreferRequest, Prompt, ScoreAnswer, ScoreRequest

_log = logging.getLogger(__name__)
Request = ScoreRequest | PreferRequest
Answer = ScoreAnswer | PreferAnswer


class Pointwise(Protocol):
    """Scores replies and compares two."""

    def score(self, prompts: Conversations, replies: Sequence[Sequence[str]]) -> list[list[float]]: ...

    def prefers(self, prompts: Conversations, firsts: Sequence[str], seconds: Sequence[str]) -> list[float]: ...


class Pairwise(Protocol):
    """Compares two replies, with either read first."""

    def both_orders(
        self, prompts: Conversations, firsts: Sequence[str], seconds: Sequence[str]
    ) -> tuple[list[float], list[float]]: ...


class Models(Protocol):
    """The reward models of one generation, as `composite.RewardModels`."""

    @property
    def pointwise(self) -> Pointwise: ...

    @property
    def gold(self) -> Pointwise | None: ...

    @property
    def pairwise(self) -> Pairwise: ...

    def parts(self, prompts: Conversations, replies: Sequence[Sequence[str]]) -> list[list[Scored]]: ...


class Full(Exception):  # noqa: N818 - what the queue is
    """As many requests wait as may; come back in `seconds`."""

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"{waiting} requests wait already")
        self.waiting, self.seconds = waiting, seconds


class Closing(Exception):  # noqa: N818
    """The worker has been told to stop."""


class NotFinite(Exception):  # noqa: N818
    """A model gave a number that is not finite."""


@dataclass(eq=False)
class _Job:
    request: Request
    answer: "Future[Answer]" = field(default_factory=Future)

    @property
    def kind(self) -> tuple[type[Request], str]:
        return type(self.request), self.request.by


class Joined(NamedTuple):
    """Several requests as one. `places[r][i][j]`: where the j-th reply of request r's i-th prompt is scored."""

    prompts: list[Prompt]
    replies: list[list[str]]
    places: list[list[list[tuple[int, int]]]]


def join(requests: Sequence[ScoreRequest]) -> Joined:
    """Every distinct prompt once, with the distinct replies that were asked of it, in the order they came."""
    found: dict[tuple[ChatMessage, ...], tuple[int, dict[str, int]]] = {}
    places: list[list[list[tuple[int, int]]]] = []
    for request in requests:
        mine = []
        for prompt, texts in zip(request.prompts, request.replies, strict=True):
            at, known = found.setdefault(prompt, (len(found), {}))
            mine.append([(at, known.setdefault(text, len(known))) for text in texts])
        places.append(mine)
    return Joined(list(found), [list(known) for _, known in found.values()], places)


class Worker:
    """Scores in a thread of its own. `put` hands over, from any thread; what it returns holds the answer."""

    def __init__(self, models: Models, model: str, limits: Limits) -> None:
        self._models, self._model, self._limits = models, model, limits
        self._jobs: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._stopped = False
        self._pace = 0.01  # seconds a reply, a moving average
        self._thread = threading.Thread(target=self._run, name="flywheel-score", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopped

    def put(self, request: Request) -> "Future[Answer]":
        """Queue a request.

        Raises:
            Full: the queue is, or is too long to wait for.
            Closing: nothing is scored any more.
        """
        with self._wake:
            if self._stopped:
                raise Closing
            wait = sum(job.request.texts for job in self._jobs) * self._pace
            if len(self._jobs) >= self._limits.max_waiting or wait > self._limits.max_wait_s:
                raise Full(len(self._jobs), min(60, max(1, math.ceil(wait))))
            job = _Job(request)
            self._jobs.append(job)
            self._wake.notify()
        return job.answer

    def stop(self) -> None:
        """End the thread after what it computes; requests that still wait end with `Closing`."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join()
        for job in self._jobs:
            if job.answer.set_running_or_notify_cancel():
                job.answer.set_exception(Closing())
        self._jobs.clear()

    def _run(self) -> None:
        while jobs := self._next():
            began, texts = time.perf_counter(), sum(job.request.texts for job in jobs)
            if live := [job for job in jobs if job.answer.set_running_or_notify_cancel()]:
                self._answer(live)
            self._pace += 0.2 * ((time.perf_counter() - began) / max(1, texts) - self._pace)

    def _next(self) -> list[_Job]:
        """Wait for work: the oldest request and those for the same model that fit beside it. Empty at the end."""
        with self._wake:
            self._wake.wait_for(lambda: self._jobs or self._stopped)
            if self._stopped:
                return []
            taken, left, texts = [self._jobs[0]], [], self._jobs[0].request.texts
            for job in list(self._jobs)[1:]:
                if job.kind == taken[0].kind and texts + job.request.texts <= self._limits.max_joined:
                    taken.append(job)
                    texts += job.request.texts
                else:
                    left.append(job)
            self._jobs = deque(left)
        return taken

    def _answer(self, jobs: Sequence[_Job]) -> None:
        """A boundary: whatever a model raises ends the request that made it, not the thread and not its neighbours."""
        try:
            answers = self._compute([job.request for job in jobs])
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._answer([job])
                return
            if not isinstance(error, FlywheelError):
                _log.exception("the models failed")
            jobs[0].answer.set_exception(error)
            return
        for job, answer in zip(jobs, answers, strict=True):
            if _finite(answer):
                job.answer.set_result(answer)
            else:
                job.answer.set_exception(NotFinite())

    def _compute(self, requests: Sequence[Request]) -> list[Answer]:
        scoring = [request for request in requests if isinstance(request, ScoreRequest)]
        if scoring:
            return list(self._score(scoring))
        return list(self._prefer([request for request in requests if isinstance(request, PreferRequest)]))

    def _score(self, requests: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        joined, by = join(requests), requests[0].by
        if by == "composite":
            parts = self._models.parts(joined.prompts, joined.replies)
            spread = [[[parts[p][k] for p, k in places] for places in mine] for mine in joined.places]
            return [
                ScoreAnswer(model=self._model, scores=[[one.score for one in several] for several in mine], parts=mine)
                for mine in spread
            ]
        scorer = self._models.pointwise if by == "pointwise" else self._models.gold
        if scorer is None:
            raise FlywheelError("these reward models have no gold model: train with reward.gold_share > 0.")
        scores = scorer.score(joined.prompts, joined.replies)
        return [
            ScoreAnswer(model=self._model, scores=[[scores[p][k] for p, k in places] for places in mine])
            for mine in joined.places
        ]

    def _prefer(self, requests: Sequence[PreferRequest]) -> list[PreferAnswer]:
        prompts = [prompt for request in requests for prompt in request.prompts]
        firsts = [text for request in requests for text in request.firsts]
        seconds = [text for request in requests for text in request.seconds]
        ends = accumulate((len(request.prompts) for request in requests), initial=0)
        spans = [slice(a, b) for a, b in pairwise(ends)]
        if requests[0].by == "pointwise":
            won = self._models.pointwise.prefers(prompts, firsts, seconds)
            return [PreferAnswer(model=self._model, probabilities=won[span]) for span in spans]
        one, two = self._models.pairwise.both_orders(prompts, firsts, seconds)
        won = preferred((one, two), firsts, seconds)
        return [
            PreferAnswer(model=self._model, probabilities=won[span], orders=(one[span], two[span])) for span in spans
        ]


def _finite(answer: Answer) -> bool:
    if isinstance(answer, PreferAnswer):
        return all(map(math.isfinite, answer.probabilities))
    signals = (v for several in answer.parts or () for one in several for v in one.signals.values())
    return all(math.isfinite(s) for several in answer.scores for s in several) and all(map(math.isfinite, signals))
