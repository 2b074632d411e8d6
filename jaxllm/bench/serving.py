"""`jaxllm bench serve`: a load of streamed requests against any OpenAI server, and the figures that vLLM's users know.

Time to first token (TTFT), time per output token after it (TPOT), the gaps between events (ITL), the whole request
(E2EL), and goodput: the requests per second that kept all the limits they were given.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jaxllm.bench.load import Lengths, random_load
from jaxllm.serve.http_client import Client
from jaxllm.settings import ConfigError

_FIGURES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
_READY_SECONDS = 1.0


@dataclass(frozen=True)
class ServeLoad:
    """What to send.

    Attributes:
        bodies: the JSON of each request. rate: requests a second, drawn from a gamma distribution with this
        burstiness (1 = Poisson); inf = all at once. concurrency: on their way at most. warmups: sent before, not
        counted. goodput: limits in ms by figure.
    """

    endpoint: str
    bodies: list[dict[str, Any]]
    rate: float = float("inf")
    burstiness: float = 1.0
    concurrency: int | None = None
    warmups: int = 0
    goodput: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    timeout: float = 3600.0


@dataclass
class Outcome:
    """One request: clock readings in seconds, token counts, or an error."""

    sent: float = 0.0
    events: list[float] = field(default_factory=list)
    ended: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def ms(self) -> dict[str, float]:
        """TTFT, TPOT and the whole, in milliseconds."""
        first, last = self.events[0], self.events[-1]
        tpot = (last - first) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0
        return {"ttft": 1e3 * (first - self.sent), "tpot": 1e3 * tpot, "e2el": 1e3 * (self.ended - self.sent)}


def make_bodies(
    *,
    endpoint: str,
    model: str,
    count: int,
    input_len: Lengths,
    output_len: Lengths,
    vocab_size: int,
    seed: int,
    ignore_eos: bool,
    extra: Mapping[str, Any],
    dataset: str | None,
) -> list[dict[str, Any]]:
    """Request bodies: random prompts (token ids for completions, words for chats), or those of a JSONL dataset.

    A line of a dataset has "prompt", and may have "output_len". Raises ConfigError when it cannot be used.
    """
    load = random_load(count, input_len, output_len, vocab_size, seed, 0)
    prompts: list[Any] = list(load.prompts)
    lengths = load.output_lens
    chat = "chat" in endpoint
    if dataset is not None:
        rows = _read_dataset(dataset)
        chosen = [rows[index % len(rows)] for index in range(count)]
        prompts = [row["prompt"] for row in chosen]
        lengths = [int(row.get("output_len", length)) for row, length in zip(chosen, lengths, strict=True)]
    elif chat:
        prompts = [" ".join(f"w{token}" for token in prompt) for prompt in prompts]
    common: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    common |= {"temperature": 0, **({"ignore_eos": True} if ignore_eos else {}), **extra}
    bodies = []
    for prompt, length in zip(prompts, lengths, strict=True):
        said = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        bodies.append({**common, **said, "max_tokens": length})
    return bodies


def _read_dataset(path: str) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the dataset {path!r}: {error}") from None
    if not rows or not all(isinstance(row, dict) and isinstance(row.get("prompt"), str | list) for row in rows):
        raise ConfigError(f'{path!r} must hold lines like {{"prompt": "...", "output_len": 100}}')
    return rows


async def run_load(client: Client, load: ServeLoad) -> tuple[list[Outcome], float]:
    """Sends everything; (outcomes in the order of the bodies, seconds that it took)."""
    for warmup in range(load.warmups):
        outcome = await _one(client, load, load.bodies[warmup % len(load.bodies)])
        if outcome.error:
            raise ConfigError(f"the first request failed: {outcome.error}")
    gate = asyncio.Semaphore(load.concurrency or len(load.bodies))
    gaps = random.Random(load.seed)
    began = time.perf_counter()

    async def gated(body: dict[str, Any]) -> Outcome:
        async with gate:
            return await _one(client, load, body)

    tasks, due = [], began
    for body in load.bodies:
        tasks.append(asyncio.create_task(gated(body)))
        if load.rate != float("inf"):
            due += gaps.gammavariate(load.burstiness, 1 / (load.rate * load.burstiness))
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
    outcomes = list(await asyncio.gather(*tasks))
    return outcomes, time.perf_counter() - began


async def _one(client: Client, load: ServeLoad, body: dict[str, Any]) -> Outcome:
    outcome = Outcome(sent=time.perf_counter())
    answer = None
    try:
        async with asyncio.timeout(load.timeout):
            answer = await client.request("POST", load.endpoint, body)
            if answer.status != 200:
                text = (await answer.read()).decode("utf-8", "replace")
                outcome.error = f"{answer.status} {text[:200]}"
                return outcome
            async for event in answer.events():
                if event != "[DONE]":
                    _take(outcome, json.loads(event))
        if not outcome.error and not outcome.events:
            outcome.error = "the stream held no tokens"
    except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError) as error:
        outcome.error = str(error) or type(error).__name__
    finally:
        outcome.ended = time.perf_counter()
        if answer is not None:
            client.done(answer)
    return outcome


def _take(outcome: Outcome, event: dict[str, Any]) -> None:
    if "error" in event:
        outcome.error = str(event["error"].get("message"))
    usage = event.get("usage")
    if usage:
        outcome.input_tokens, outcome.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    choices = event.get("choices")
    # The first event of a chat says only who is speaking.
    if choices and (choices[0].get("delta") or {}).get("role") is None:
        outcome.events.append(time.perf_counter())


def summary(
    load: ServeLoad, outcomes: Sequence[Outcome], seconds: float, percentiles: Sequence[float]
) -> dict[str, Any]:
    """The figures under the names of vLLM's JSON; times in ms, rates per second."""
    good = [outcome for outcome in outcomes if not outcome.error]
    values: dict[str, list[float]] = {name: [] for name in _FIGURES}
    kept = 0
    for outcome in good:
        ms = outcome.ms
        values["ttft"].append(ms["ttft"])
        values["e2el"].append(ms["e2el"])
        if outcome.output_tokens > 1:
            values["tpot"].append(ms["tpot"])
        gaps = zip(outcome.events, outcome.events[1:], strict=False)
        values["itl"] += [1e3 * (later - earlier) for earlier, later in gaps]
        kept += all(ms[name] <= limit for name, limit in load.goodput.items())
    tokens_in, tokens_out = sum(one.input_tokens for one in good), sum(one.output_tokens for one in good)
    found: dict[str, Any] = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat" if "chat" in load.endpoint else "openai",
        "num_prompts": len(load.bodies),
        "request_rate": "inf" if load.rate == float("inf") else load.rate,
        "burstiness": load.burstiness,
        "max_concurrency": load.concurrency,
        "duration": seconds,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(good) / seconds,
        "request_goodput": kept / seconds if load.goodput else None,
        "output_throughput": tokens_out / seconds,
        "total_token_throughput": (tokens_in + tokens_out) / seconds,
        "max_output_tokens_per_s": _peak(good),
        "max_concurrent_requests": _most_at_once(good),
        "errors": dict(Counter(outcome.error for outcome in outcomes if outcome.error).most_common(5)),
    }
    for name, numbers in values.items():
        found[f"mean_{name}_ms"] = statistics.fmean(numbers) if numbers else 0.0
        found[f"median_{name}_ms"] = statistics.median(numbers) if numbers else 0.0
        found[f"std_{name}_ms"] = statistics.pstdev(numbers) if numbers else 0.0
        for percentile in percentiles:
            found[f"p{percentile:g}_{name}_ms"] = _percentile(numbers, percentile)
    return found


def _percentile(numbers: list[float], percentile: float) -> float:
    """By linear interpolation, as numpy has it."""
    if not numbers:
        return 0.0
    ordered = sorted(numbers)
    at = (len(ordered) - 1) * percentile / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def _peak(outcomes: Sequence[Outcome]) -> float:
    """Most events in one second of the clock."""
    seconds = Counter(int(moment) for outcome in outcomes for moment in outcome.events)
    return float(max(seconds.values(), default=0))


def _most_at_once(outcomes: Sequence[Outcome]) -> int:
    changes = sorted([(one.sent, 1) for one in outcomes] + [(one.ended, -1) for one in outcomes])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def table(found: Mapping[str, Any], percentiles: Sequence[float]) -> str:
    """The summary as vLLM prints it."""

    def line(name: str, value: Any) -> str:
        shown = f"{value:.2f}" if isinstance(value, float) else str(value)
        return f"{name + ':':<40} {shown:<10}"

    lines = [f"{' Serving Benchmark Result ':=^50}"]
    lines += [line("Successful requests", found["completed"]), line("Failed requests", found["failed"])]
    if found["max_concurrency"] is not None:
        lines.append(line("Maximum request concurrency", found["max_concurrency"]))
    if found["request_rate"] != "inf":
        lines.append(line("Request rate configured (RPS)", found["request_rate"]))
    lines += [
        line("Benchmark duration (s)", found["duration"]),
        line("Total input tokens", found["total_input_tokens"]),
        line("Total generated tokens", found["total_output_tokens"]),
        line("Request throughput (req/s)", found["request_throughput"]),
    ]
    if found["request_goodput"] is not None:
        lines.append(line("Request goodput (req/s)", found["request_goodput"]))
    lines += [
        line("Output token throughput (tok/s)", found["output_throughput"]),
        line("Peak output token throughput (tok/s)", found["max_output_tokens_per_s"]),
        line("Peak concurrent requests", found["max_concurrent_requests"]),
        line("Total Token throughput (tok/s)", found["total_token_throughput"]),
    ]
    for name, title in _FIGURES.items():
        lines.append(f"{title:-^50}")
        lines += [line(f"Mean {name.upper()} (ms)", found[f"mean_{name}_ms"])]
        lines += [line(f"Median {name.upper()} (ms)", found[f"median_{name}_ms"])]
        lines += [line(f"P{one:g} {name.upper()} (ms)", found[f"p{one:g}_{name}_ms"]) for one in percentiles]
    lines.append("=" * 50)
    return "\n".join(lines)


async def wait_until_ready(client: Client, seconds: float) -> str:
    """Waits for the server; returns the name of its first model. Raises ConfigError when there is none."""
    end, told = time.monotonic() + seconds, ""
    while True:
        try:
            answer, found = await client.json("GET", "/v1/models")
            if answer.status == 200 and found and found.get("data") and _is_ready(found["data"][0]):
                return str(found["data"][0]["id"])
            reason = f"/v1/models answers {answer.status}"
            if answer.status in (401, 403):
                raise ConfigError(f"{client.url}: {reason}; give --api-key")
        except OSError as error:
            reason = str(error)
        if time.monotonic() > end:
            raise ConfigError(
                f"{client.url} is not ready: {reason}; start a server there (jaxllm serve MODEL), or name another by "
                "--base-url"
            )
        if reason != told:
            told = reason
            print(f"[waiting up to {seconds:g} s for {client.url}: {reason}]", file=sys.stderr, flush=True)
        await asyncio.sleep(_READY_SECONDS)


def _is_ready(card: Mapping[str, Any]) -> bool:
    # While our own engine starts, its length is not known yet; other servers answer when they are ready.
    return card.get("owned_by") != "jaxllm" or card.get("max_model_len") is not None


def parse_goodput(items: Sequence[str]) -> dict[str, float]:
    """`["ttft:200", "tpot:50"]` as limits in ms. Raises ConfigError."""
    limits = {}
    for item in items:
        name, _, value = item.partition(":")
        try:
            limits[{"ttft": "ttft", "tpot": "tpot", "e2el": "e2el"}[name]] = float(value)
        except (KeyError, ValueError):
            raise ConfigError(f"--goodput {item!r} must be ttft, tpot or e2el with ms, for example ttft:200") from None
    return limits


def emit(found: Mapping[str, Any], percentiles: Sequence[float], json_path: str | None) -> None:
    if json_path == "-":
        print(json.dumps(found, indent=2))
        return
    print(table(found, percentiles))
    for error, count in found["errors"].items():
        print(f"  {count} failed with: {error}", file=sys.stderr)
    if json_path is not None:
        Path(json_path).write_text(json.dumps(found, indent=2) + "\n")
