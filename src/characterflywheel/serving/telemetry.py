"""OpenTelemetry spans with the GenAI attributes, where the extra `telemetry` is installed. No user's text is in them.

The application that runs the service configures where spans go (`opentelemetry-instrument`, or a provider of its own);
without a provider they cost a few microseconds and go nowhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ..llm.base import Sampling

try:
    from opentelemetry import trace

    _tracer: Any = trace.get_tracer("characterflywheel")
except ImportError:
    _tracer = None


class Answered(Protocol):
    """What a span says of a reply."""

    @property
    def id(self) -> str: ...

    @property
    def finish(self) -> str: ...

    @property
    def prompt_tokens(self) -> int | None: ...

    @property
    def completion_tokens(self) -> int | None: ...


class Span:
    """One model call; `answered` adds what is known once the reply is there."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def answered(self, reply: Answered) -> None:
        """Add the reply's id, how it ended, and its tokens."""
        if self._span is None:
            return
        self._span.set_attribute("gen_ai.response.id", reply.id)
        self._span.set_attribute("gen_ai.response.finish_reasons", [reply.finish])
        for name, count in (("input", reply.prompt_tokens), ("output", reply.completion_tokens)):
            if count is not None:
                self._span.set_attribute(f"gen_ai.usage.{name}_tokens", count)


@contextmanager
def chat_span(
    model: str, backend: str, character: str, conversation_id: str, sampling: Sampling, arm: str
) -> Iterator[Span]:
    """A span around one model call, named and attributed by the GenAI conventions. An error is recorded on it."""
    if _tracer is None:
        yield Span(None)
        return
    attributes = {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": f"flywheel.{backend}", "gen_ai.request.model": model,
        "gen_ai.response.model": model, "gen_ai.conversation.id": conversation_id, "gen_ai.agent.id": character,
        "gen_ai.request.temperature": sampling.temperature, "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.max_tokens": sampling.max_tokens, "flywheel.arm": arm,
    }  # fmt: skip
    # not the current span: a stream's generator may be closed from another context than it was begun in
    span = _tracer.start_span(f"chat {model}", kind=trace.SpanKind.CLIENT, attributes=attributes)
    try:
        yield Span(span)
    except Exception as error:
        span.set_attribute("error.type", getattr(error, "code", type(error).__name__))
        span.set_status(trace.StatusCode.ERROR)
        raise
    finally:
        span.end()
