"""OpenTelemetry: a span for every request that asks for work, sent to a collector, where the packages are installed.

It is on with --otlp_traces_endpoint or OpenTelemetry's own OTEL_EXPORTER_OTLP_ENDPOINT; a `traceparent` header of the
client becomes the parent. Attributes follow OpenTelemetry's conventions for HTTP and for generative AI.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from jaxllm.settings import ConfigError

_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_NOTED = {
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "finish_reason": "gen_ai.response.finish_reasons",
    "outcome": "jaxllm.outcome",
    "error": "jaxllm.error",
}


class Tracer:
    """Makes spans; `exporter` replaces the one that sends them (for tests)."""

    def __init__(self, endpoint: str | None, model: str, exporter: Any = None) -> None:
        try:
            from opentelemetry.propagate import extract
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter(endpoint=endpoint)
        except ImportError:
            raise ConfigError(
                "traces need OpenTelemetry: pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
            ) from None
        self._extract, self._model = extract, model
        self._provider = TracerProvider(resource=Resource.create({"service.name": "jaxllm"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("jaxllm")

    @classmethod
    def make(cls, endpoint: str | None, model: str) -> Tracer | None:
        """A tracer where one is asked for. Raises ConfigError when its packages are missing."""
        wanted = endpoint is not None or any(os.environ.get(name) for name in _VARIABLES)
        return cls(endpoint, model) if wanted else None

    def start(self, method: str, path: str, headers: Mapping[bytes, bytes], request_id: str) -> Any:
        """The span of a request that has just come."""
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}
        attributes = {
            "http.request.method": method, "url.path": path, "jaxllm.request_id": request_id,
            "gen_ai.system": "jaxllm", "gen_ai.request.model": self._model,
        }  # fmt: skip
        return self._tracer.start_span(f"{method} {path}", self._extract(carrier), attributes=attributes)

    def end(self, span: Any, status: int, note: Mapping[str, Any]) -> None:
        """Ends a span with what became of its request."""
        span.set_attribute("http.response.status_code", status)
        for name, attribute in _NOTED.items():
            if name in note:
                span.set_attribute(attribute, note[name])
        span.end()

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()
