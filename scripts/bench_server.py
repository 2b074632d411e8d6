#!/usr/bin/env python
"""What the server costs: a model behind `jaxllm serve`, asked by 1, 64 and 256 streams, against the engine alone.

    python scripts/bench_server.py --json server.json             # Llama-3.1-8B's shapes with random weights, one GPU
    python scripts/bench_server.py --random-weights smollm2 --offline --concurrency 1,16,64 --batch 64 \
        --input-len 32 --output-len 128 --json overhead.json      # against LLM.generate, on a CPU

For each number of streams the same load is sent twice: as one request that is answered whole, where the frontends have
nothing to do until the end ("engine"), and each prompt as a stream of its own ("streams"). The figures are those of
`jaxllm bench serve`, the ratio of the throughputs, and the mean step time that the engine saw, whose ratio is what the
streams cost the step loop. --offline also has `LLM.generate` do it in a process without a server, first, and gives the
time per token of a stream that the server adds to that. The clients are processes of their own, so that they do not
measure themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from server_under_test import SHAPES, Server, write_model

from jaxllm.bench.load import Lengths
from jaxllm.bench.serving import Outcome, ServeLoad, make_bodies, run_load, summary
from jaxllm.serve.http_client import Client

PERCENTILES = [50.0, 99.0]


def offline(model: str, settings: dict[str, Any], loads: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The bodies' prompts through `LLM.generate`, load by load, each the second time; in a process of its own."""
    from jaxllm import LLM, SamplingParams

    found = []
    with LLM(model, **settings) as llm:
        for bodies in loads:
            prompts = [body["prompt"] for body in bodies]
            params = SamplingParams(max_tokens=bodies[0]["max_tokens"], ignore_eos=True, temperature=0.0)
            for _ in range(2):
                began = time.perf_counter()
                outputs = llm.generate(prompts, params, use_tqdm=False)
                seconds = time.perf_counter() - began
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            found.append({"duration": seconds, "output_throughput": tokens / seconds})
    return found


def client(url: str, bodies: list[dict[str, Any]], start: float) -> list[Outcome]:
    """Streams some requests at once, from a moment of the monotonic clock on; runs in a process of its own."""

    async def run() -> list[Outcome]:
        await asyncio.sleep(max(0.0, start - time.perf_counter()))
        return (await run_load(Client(url), ServeLoad("/v1/completions", bodies)))[0]

    return asyncio.run(run())


def make_load(count: int, input_len: int, output_len: int, vocab_size: int, seed: int) -> list[dict[str, Any]]:
    """Bodies of completions, as `jaxllm bench serve` makes them."""
    return make_bodies(
        endpoint="/v1/completions", model="bench", count=count, input_len=Lengths(input_len, input_len),
        output_len=Lengths(output_len, output_len), vocab_size=vocab_size, seed=seed, ignore_eos=True, extra={},
        dataset=None,
    )  # fmt: skip


class Bench:
    """A running server, and processes that ask it."""

    def __init__(self, url: str, vocab_size: int, clients: int) -> None:
        self.url, self.vocab_size, self.clients = url, vocab_size, clients
        self.pool = ProcessPoolExecutor(clients, mp_context=multiprocessing.get_context("spawn"))
        list(self.pool.map(client, [url] * clients, [[]] * clients, [0.0] * clients))  # imports

    def get(self, path: str) -> Any:
        return asyncio.run(Client(self.url).json("GET", path))[1]

    def bodies(self, count: int, input_len: int, output_len: int, seed: int) -> list[dict[str, Any]]:
        return make_load(count, input_len, output_len, self.vocab_size, seed)

    def _last_step(self) -> int:
        time.sleep(0.6)  # the frontends hear of steps every quarter of a second
        found = self.get("/iteration_stats")
        return found[-1]["iter"] if found else 0

    def _step_ms(self, since: int) -> float:
        """Mean of the steps of decodes alone, without the first and last tenth."""
        time.sleep(0.6)
        steps = [
            one["iterLatencyMS"]
            for one in self.get(f"/iteration_stats?since={since}")
            if not one["inflightBatchingStats"]["numContextRequests"]
        ]
        kept = steps[len(steps) // 10 : len(steps) - len(steps) // 10] or [0.0]
        return sum(kept) / len(kept)

    def whole(self, count: int, input_len: int, output_len: int, seed: int) -> dict[str, Any]:
        """All prompts in one request that is answered whole."""
        bodies, since = self.bodies(count, input_len, output_len, seed), self._last_step()
        body = {**bodies[0], "prompt": [one["prompt"] for one in bodies], "stream": False}
        del body["stream_options"]
        began = time.perf_counter()
        answer, found = asyncio.run(Client(self.url).json("POST", "/v1/completions", body))
        seconds = time.perf_counter() - began
        if answer.status != 200:
            raise SystemExit(f"the server answered {answer.status}: {found}")
        tokens = found["usage"]["completion_tokens"]
        return {"duration": seconds, "output_throughput": tokens / seconds, "step_ms": self._step_ms(since)}

    def streams(self, count: int, input_len: int, output_len: int, seed: int) -> dict[str, Any]:
        """Each prompt as a stream of its own, all at once."""
        bodies, since = self.bodies(count, input_len, output_len, seed), self._last_step()
        parts = [part for index in range(self.clients) if (part := bodies[index :: self.clients])]
        start = time.perf_counter() + 0.2
        found = list(self.pool.map(client, [self.url] * len(parts), parts, [start] * len(parts)))
        outcomes = [outcome for part in found for outcome in part]
        seconds = max(outcome.ended for outcome in outcomes) - start
        load = ServeLoad("/v1/completions", bodies, concurrency=count)
        return {**summary(load, outcomes, seconds, PERCENTILES), "step_ms": self._step_ms(since)}


def measure(bench: Bench, args: argparse.Namespace, alone: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    bench.streams(8, args.input_len, 4, seed=0)  # connections, and whatever is done once
    for number, count in enumerate(args.concurrency):
        sizes = (count, args.input_len, args.output_len)
        whole = bench.whole(*sizes, seed=2 * number + 1)
        runs = [bench.streams(*sizes, seed=100 * number + 2 + run) for run in range(args.runs)]
        streams = sorted(runs, key=lambda run: run["duration"])[len(runs) // 2]
        row = {"concurrency": count, "engine": whole, "streams": streams,
               "throughput_ratio": streams["output_throughput"] / whole["output_throughput"]}  # fmt: skip
        if whole["step_ms"]:
            row["step_ratio"] = statistics.median(run["step_ms"] for run in runs) / whole["step_ms"]
        if alone:
            row["offline"] = alone[number]
            more = streams["duration"] - alone[number]["duration"]
            row["overhead_ms_per_token_of_a_stream"] = 1e3 * more / args.output_len
            row["throughput_ratio_to_offline"] = streams["output_throughput"] / alone[number]["output_throughput"]
        rows.append(row)
        print(
            f"{count:4d} streams: {streams['output_throughput']:.1f} tok/s, engine {whole['output_throughput']:.1f}, "
            f"ratio {row['throughput_ratio']:.3f}; step {streams['step_ms']:.2f} ms, engine {whole['step_ms']:.2f}; "
            f"TTFT p50 {streams['p50_ttft_ms']:.1f} p99 {streams['p99_ttft_ms']:.1f} ms, "
            f"TPOT {streams['mean_tpot_ms']:.2f} ms, failed {streams['failed']}",
            flush=True,
        )
        if alone:
            print(
                f"     LLM.generate {alone[number]['output_throughput']:.1f} tok/s; the server adds "
                f"{row['overhead_ms_per_token_of_a_stream']:.3f} ms per token of a stream",
                flush=True,
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a real one")
    parser.add_argument(
        "--random-weights", choices=SHAPES, default="llama-8b", help="unless --model: (default: %(default)s)"
    )
    parser.add_argument("--offline", action="store_true", help="measure LLM.generate too")
    parser.add_argument("--concurrency", default="1,64,256", help="numbers of streams (default: %(default)s)")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=384)
    parser.add_argument("--batch", type=int, default=256, help="max_batch_size (default: %(default)s)")
    parser.add_argument("--frontends", type=int, default=4, help="of the server (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=4, help="processes (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=1, help="of the streams; the median counts (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="results")
    parser.add_argument("options", nargs="*", help="more options of jaxllm serve, after --")
    args = parser.parse_args()
    args.concurrency = [int(part) for part in args.concurrency.split(",")]
    with tempfile.TemporaryDirectory(prefix="jaxllm-model-") as directory:
        model, vocab_size = args.model, 200  # every model has these
        length = args.input_len + args.output_len + 64
        engine: dict[str, Any] = {
            "max_batch_size": args.batch, "max_seq_len": length, "progress": False,
            "batch_buckets": sorted({count for count in args.concurrency if count < args.batch} | {args.batch}),
            "kv_cache_config": {"enable_block_reuse": False},
        }  # fmt: skip
        if args.offline:  # two engines after each other, maybe on a CPU
            engine["kv_cache_config"]["max_tokens"] = (length + 64) * args.batch
            engine["max_num_tokens"] = 2048
        if model is None:
            model, vocab_size = directory, write_model(Path(directory), args.random_weights)
            engine["load_format"] = "dummy"
        serve = {"num_serve_frontends": args.frontends, "served_model_name": "bench", "log_level": "warning"}
        config = Path(directory) / "serve.yml"
        config.write_text(json.dumps({**engine, **serve}), encoding="utf-8")  # JSON is YAML
        alone: list[dict[str, Any]] = []
        if args.offline:
            context = multiprocessing.get_context("spawn")
            loads = [make_load(count, args.input_len, args.output_len, vocab_size, 1) for count in args.concurrency]
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                alone = pool.submit(offline, model, engine, loads).result()
        server = Server(model, ["--config", str(config), *args.options])
        try:
            print(f"the server started in {server.started:.1f} s", flush=True)
            bench = Bench(server.url, vocab_size, args.clients)
            with bench.pool:
                rows = measure(bench, args, alone)
        finally:
            server.end()
    content = {
        "command": sys.argv, "start_seconds": server.started, "input_len": args.input_len,
        "output_len": args.output_len, "frontends": args.frontends, "clients": args.clients, "rows": rows,
    }  # fmt: skip
    if args.json is not None:
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return int(any(row["streams"]["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
