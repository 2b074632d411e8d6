"""/iteration_stats: the last steps of the engine under the names of TensorRT-LLM's /metrics."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from jaxllm.engine.iterations import Iteration
from jaxllm.serve.server import Server

_FIELDS = [one.name for one in fields(Iteration)]


def iteration_stats_since(server: Server, since: int) -> list[dict[str, Any]]:
    """The kept iterations after number `since`, in the names of TensorRT-LLM's /metrics."""
    stats, hello = server.client.stats, server.client.hello or {}
    pages, found = stats.get("pages", 0), []
    for row in list(server.client.iterations):
        one = dict(zip(_FIELDS, row, strict=True))
        if one["number"] <= since:
            continue
        looked_up = one["hits"] + one["misses"]
        found.append({
            "iter": one["number"],
            "timestamp": one["ended"],
            "iterLatencyMS": round(1e3 * one["seconds"], 3),
            "numActiveRequests": one["running"] + one["waiting"],
            "numQueuedRequests": one["waiting"],
            "kvCacheStats": {
                "maxNumBlocks": pages,
                "usedNumBlocks": one["pages_used"],
                "freeNumBlocks": pages - one["pages_used"],
                "tokensPerBlock": hello.get("page_size"),
                "reusedBlocks": one["hits"],
                "missedBlocks": one["misses"],
                "evictedBlocks": one["evictions"],
                "cacheHitRate": one["hits"] / looked_up if looked_up else 0.0,
            },
            "inflightBatchingStats": {
                "numContextRequests": one["context"],
                "numGenRequests": one["generation"],
                "numScheduledRequests": one["context"] + one["generation"],
                "numScheduledTokens": one["tokens"],
            },
        })  # fmt: skip
    return found
