"""Spans of requests, where OpenTelemetry is installed."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from jaxllm.serve.tracing import Tracer
from jaxllm.settings import ConfigError


def test_a_span_tells_of_its_request() -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="no OpenTelemetry")
    exporter: Any = sdk.InMemorySpanExporter()
    tracer = Tracer(None, "m", exporter)
    parent = b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"
    span = tracer.start("POST", "/v1/completions", {b"traceparent": parent}, "abc")
    tracer.end(span, 200, {"prompt_tokens": 3, "completion_tokens": 5, "finish_reason": "stop"})
    tracer.close()
    (found,) = exporter.get_finished_spans()
    assert found.name == "POST /v1/completions" and f"{found.context.trace_id:032x}" == "a" * 32
    assert f"{found.parent.span_id:016x}" == "b" * 16
    assert found.attributes["gen_ai.usage.output_tokens"] == 5 and found.attributes["jaxllm.request_id"] == "abc"
    assert found.attributes["http.response.status_code"] == 200


def test_traces_are_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    assert Tracer.make(None, "m") is None
    monkeypatch.setitem(sys.modules, "opentelemetry.propagate", None)
    with pytest.raises(ConfigError, match="pip install opentelemetry"):
        Tracer.make("http://127.0.0.1:1", "m")
