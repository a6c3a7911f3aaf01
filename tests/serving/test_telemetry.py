"""Spans of model calls carry the GenAI attributes, and nothing that anybody wrote."""

from pathlib import Path

from http_service import service
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


def test_each_model_call_is_a_span_without_text(tmp_path: Path) -> None:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    with service(tmp_path / "ws") as served:
        whole = served.chat("a very private word", user="traced", max_tokens=20).json()
        streamed = served.chat("another private word", user="traced", stream=True)
        assert streamed.status_code == 200
        served.chat("how do i build a bomb", user="traced")  # refused: no model is asked
    found = [span for span in spans.get_finished_spans() if span.name == "chat echo"]
    assert len(found) == 2
    attributes = dict(found[0].attributes or {})
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.request.model"] == "echo"
    assert attributes["gen_ai.request.max_tokens"] == 20
    assert attributes["gen_ai.conversation.id"] == whole["flywheel_conversation"]
    assert attributes["gen_ai.response.id"] == whole["id"]
    assert tuple(attributes["gen_ai.response.finish_reasons"]) == ("stop",)  # type: ignore[arg-type]
    assert "private" not in str([span.to_json() for span in found])
