"""Prometheus metrics under the names that dashboards for other servers use, with the prefix jaxllm_.

What happens to requests is counted in the frontends; with several of them prometheus_client adds their figures up from
files in PROMETHEUS_MULTIPROC_DIR. What the engine counts comes with its status, and is the same from every frontend.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from jaxllm.serve.client import EngineClient

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.2, 0.5, 1, 2.5)
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


disable_created_metrics()  # a second series for each, which nobody draws


class Metrics:
    """Counters and histograms of the requests of this frontend, and the engine's figures as a collector."""

    def __init__(self, client: EngineClient, model: str) -> None:
        self._registry = CollectorRegistry()
        self._client, self._model = client, model

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(f"jaxllm_{name}", text, ["model_name"], buckets=buckets, registry=self._registry)
            return metric.labels(model)

        self._ttft = histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", _SECONDS)
        self._itl = histogram("inter_token_latency_seconds", "Between two tokens of a sequence.", _TOKEN_SECONDS)
        self._tpot = histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first, by sequence.", _TOKEN_SECONDS
        )
        self._e2e = histogram("e2e_request_latency_seconds", "From a request's arrival to its last token.", _SECONDS)
        self._prompt = histogram("request_prompt_tokens", "Tokens of the prompts.", _COUNTS)
        self._generation = histogram("request_generation_tokens", "Tokens generated, by sequence.", _COUNTS)
        self._success = Counter(
            "jaxllm_request_success",
            "Sequences that ended, by reason; cancelled, timeout and error count requests.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._http = Counter(
            "jaxllm_http_requests", "Answers by route and status.", ["handler", "status"], registry=self._registry
        )

    def first_token(self, seconds: float, prompt_tokens: int) -> None:
        self._ttft.observe(seconds)
        self._prompt.observe(prompt_tokens)

    def more_tokens(self, seconds: float, tokens: int) -> None:
        """Tokens that arrived together, so long after the last ones."""
        self._itl.observe(seconds / tokens)

    def finished(self, e2e: float, decode: float, tokens: int) -> None:
        self._e2e.observe(e2e)
        self._generation.observe(tokens)
        if tokens > 1:
            self._tpot.observe(decode / (tokens - 1))

    def ended(self, reason: str) -> None:
        self._success.labels(self._model, reason).inc()

    def answered(self, handler: str, status: int) -> None:
        self._http.labels(handler, str(status)).inc()

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        engine = CollectorRegistry()
        engine.register(_EngineCollector(self._client, self._model))
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self._registry) + generate_latest(engine)
        everybody = CollectorRegistry()
        MultiProcessCollector(everybody)  # type: ignore[no-untyped-call]
        return generate_latest(everybody) + generate_latest(engine)


class _EngineCollector(Collector):
    def __init__(self, client: EngineClient, model: str) -> None:
        self._client, self._model = client, model

    def collect(self) -> Iterator[Metric]:
        client, stats = self._client, self._client.stats
        page = (client.hello or {}).get("page_size", 0)
        up = client.hello is not None and client.death is None
        yield self._one(GaugeMetricFamily, "engine_up", "1 while the engine runs.", int(up))
        yield self._one(
            GaugeMetricFamily, "engine_seconds_silent", "Since its step loop passed.", client.seconds_silent
        )
        if not stats:
            return
        used = stats["pages"] - stats["pages_free"]
        gauges: dict[str, tuple[str, float]] = {
            "num_requests_running": ("Sequences in the batch.", stats["running"]),
            "num_requests_waiting": ("Sequences in the queue.", stats["waiting"]),
            "kv_cache_usage_perc": ("Share of the pages that are held, 1 = all.", used / max(stats["pages"], 1)),
        }
        counters = {
            "num_preemptions": ("Sequences preempted for want of pages.", stats["preemptions"]),
            "prompt_tokens": ("Prompt tokens of the requests that began.", stats["prompt_tokens"]),
            "generation_tokens": ("Tokens generated.", stats["output_tokens"]),
            "prefix_cache_queries": ("Prompt tokens looked up.", (stats["cache_hits"] + stats["cache_misses"]) * page),
            "prefix_cache_hits": ("Prompt tokens found.", stats["cache_hits"] * page),
            "iterations": ("Steps of the device.", stats["steps"]),
            "iteration_seconds": ("Time of these steps.", stats["step_seconds"]),
        }
        for name, (text, value) in gauges.items():
            yield self._one(GaugeMetricFamily, name, text, value)
        for name, (text, value) in counters.items():
            yield self._one(CounterMetricFamily, name, text, value)

    def _one(self, kind: Any, name: str, text: str, value: float) -> Metric:
        family: Metric = kind(f"jaxllm_{name}", text, labels=["model_name"])
        family.add_metric([self._model], value)  # type: ignore[attr-defined]
        return family
