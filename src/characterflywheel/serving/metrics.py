"""What the chat service tells Prometheus about itself: `/metrics`. No label holds anything a user wrote."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .guard import Served

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters of one service; each instance has its own registry, so that two services in a process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "flywheel_requests", "HTTP requests by route and status", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "flywheel_request_seconds", "time to the whole answer", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self.first_chunk = Histogram(
            "flywheel_first_chunk_seconds", "time to a stream's first text", buckets=_SECONDS, registry=self.registry
        )
        self.model_seconds = Histogram(
            "flywheel_model_seconds", "time in the model, queue included, by outcome: ok or why there was no reply",
            ["model", "outcome"], buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.model_failures = Counter(
            "flywheel_model_failures", "requests that a model did not answer", ["model", "code"], registry=self.registry
        )
        self.model_waited = Histogram(
            "flywheel_model_waited_seconds", "time in a model's queue", ["model"], buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.replies = Counter(
            "flywheel_replies", "replies by model, arm and kind", ["model", "arm", "kind"], registry=self.registry
        )
        self.refused = Counter(
            "flywheel_refused", "texts that safety did not let pass", ["subject", "category"], registry=self.registry
        )
        self.signals = Counter("flywheel_signals", "signals by kind", ["kind"], registry=self.registry)
        self.limited = Counter("flywheel_limited", "requests told to come back later", ["why"], registry=self.registry)
        self.not_followed = Counter(
            "flywheel_releases_not_followed", "times that the model put in service could not answer",
            registry=self.registry,
        )  # fmt: skip
        self.open_streams = Gauge("flywheel_open_streams", "streams being written", registry=self.registry)

    def served(self, one: Served) -> None:
        """What a model did with a request; `Backends` tells it of each."""
        self.model_seconds.labels(one.model, one.outcome).observe(one.seconds)
        self.model_waited.labels(one.model).observe(one.waited_s)
        if one.outcome not in ("ok", "cancelled"):
            self.model_failures.labels(one.model, one.outcome).inc()

    def watch(self, name: str, what: str, read: Callable[[], float]) -> None:
        """Publish a value that another part keeps, such as the journal's queue: `read()` is called at each scrape."""
        Gauge(name, what, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """The page that Prometheus scrapes."""
        return generate_latest(self.registry)


class Observed:
    """ASGI middleware: counts requests by route and status, and times them to the last byte."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), "500"

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - begin)
