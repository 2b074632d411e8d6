#!/usr/bin/env python
"""What the server costs: a model behind `jaxllm serve`, asked by 1, 64 and 256 streams, against the engine alone.

    python scripts/bench_server.py --json server.json             # Llama-3.1-8B's shapes with random weights, one GPU
    python scripts/bench_server.py --model smollm2-135m --concurrency 1,16 --output-len 32 --batch 16     # on a CPU

For each number of streams the same prompts are sent twice: as one request that is answered whole, where the frontends
have nothing to do until the end ("engine"), and each as a stream of its own ("streams"). The figures are those of
`jaxllm bench serve`, and the ratio of the throughputs; beside them the mean step time that the engine saw. The clients
are processes of their own, so that they do not measure themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

from jaxllm.bench.load import Lengths
from jaxllm.bench.serving import Outcome, ServeLoad, make_bodies, run_load, summary
from jaxllm.serve.http_client import Client

READY = re.compile(r"serving \S+ at (\S+) ")
PERCENTILES = [50.0, 99.0]


def write_model(directory: Path) -> int:
    """Llama-3.1-8B's config.json, and a byte-level tokenizer of as many tokens; returns their number."""
    from jaxllm.engine.tokenizer_gguf import byte_alphabet

    config = json.loads((files("jaxllm.plan") / "models" / "Llama-3.1-8B.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    letters = list(byte_alphabet().values())
    words = [*letters, *(a + b for a in letters for b in letters)]
    plain = [chr(code) for code in range(97, 123)]
    words += [a + b + c + d for a in plain for b in plain for c in plain for d in plain]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words[: config["vocab_size"]]))}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {"version": "1.0", "model": model, "pre_tokenizer": levels, "decoder": levels, "added_tokens": []}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return len(vocab)


def client(url: str, bodies: list[dict[str, Any]], start: float) -> list[Outcome]:
    """Streams some requests at once, from a moment of the monotonic clock on; runs in a process of its own."""

    async def run() -> list[Outcome]:
        await asyncio.sleep(max(0.0, start - time.perf_counter()))
        return (await run_load(Client(url), ServeLoad("/v1/completions", bodies)))[0]

    return asyncio.run(run())


class Bench:
    """A running server, and processes that ask it."""

    def __init__(self, url: str, vocab_size: int, clients: int) -> None:
        self.url, self.vocab_size, self.clients = url, vocab_size, clients
        self.pool = ProcessPoolExecutor(clients, mp_context=multiprocessing.get_context("spawn"))
        list(self.pool.map(client, [url] * clients, [[]] * clients, [0.0] * clients))  # imports

    def get(self, path: str) -> Any:
        return asyncio.run(Client(self.url).json("GET", path))[1]

    def bodies(self, count: int, input_len: int, output_len: int, seed: int) -> list[dict[str, Any]]:
        return make_bodies(
            endpoint="/v1/completions", model="bench", count=count, input_len=Lengths(input_len, input_len),
            output_len=Lengths(output_len, output_len), vocab_size=self.vocab_size, seed=seed, ignore_eos=True,
            extra={}, dataset=None,
        )  # fmt: skip

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


def measure(bench: Bench, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    bench.streams(8, args.input_len, 4, seed=0)  # connections, and whatever is done once
    for number, count in enumerate(args.concurrency):
        sizes = (count, args.input_len, args.output_len)
        whole = bench.whole(*sizes, seed=2 * number + 1)
        streams = bench.streams(*sizes, seed=2 * number + 2)
        ratio = streams["output_throughput"] / whole["output_throughput"]
        rows.append({"concurrency": count, "engine": whole, "streams": streams, "throughput_ratio": ratio})
        print(
            f"{count:4d} streams: {streams['output_throughput']:.1f} tok/s, engine {whole['output_throughput']:.1f}, "
            f"ratio {ratio:.3f}; step {streams['step_ms']:.2f} ms, engine {whole['step_ms']:.2f}; "
            f"TTFT p50 {streams['p50_ttft_ms']:.1f} p99 {streams['p99_ttft_ms']:.1f} ms, "
            f"TPOT {streams['mean_tpot_ms']:.2f} ms, failed {streams['failed']}",
            flush=True,
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a real one (default: Llama-3.1-8B's shapes with random weights)")
    parser.add_argument("--concurrency", default="1,64,256", help="numbers of streams (default: %(default)s)")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=384)
    parser.add_argument("--batch", type=int, default=256, help="max_batch_size (default: %(default)s)")
    parser.add_argument("--frontends", type=int, default=4, help="of the server (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=4, help="processes (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="results")
    parser.add_argument("options", nargs="*", help="more options of jaxllm serve, after --")
    args = parser.parse_args()
    args.concurrency = [int(part) for part in args.concurrency.split(",")]
    with tempfile.TemporaryDirectory(prefix="jaxllm-model-") as directory:
        model, vocab_size = args.model, 200  # every model has these
        if model is None:
            model, vocab_size = directory, write_model(Path(directory))
        config = Path(directory) / "serve.yml"
        config.write_text(
            f"max_batch_size: {args.batch}\nmax_seq_len: {args.input_len + args.output_len + 64}\n"
            f"num_serve_frontends: {args.frontends}\nserved_model_name: bench\nport: 0\nlog_level: warning\n"
            f"batch_buckets: {sorted({count for count in args.concurrency if count < args.batch} | {args.batch})}\n"
            "progress: false\nkv_cache_config: {enable_block_reuse: false}\n"
            + ("load_format: dummy\n" if args.model is None else "")
        )
        command = [sys.executable, "-m", "jaxllm.cli", "serve", model, "--config", str(config), *args.options]
        began = time.perf_counter()
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert server.stderr is not None
            for line in server.stderr:
                print(line, end="", file=sys.stderr, flush=True)
                if found := READY.search(line):
                    break
            else:
                return 1
            threading.Thread(target=server.stderr.read, daemon=True).start()  # a full pipe would stop the server
            started = time.perf_counter() - began
            print(f"the server started in {started:.1f} s", flush=True)
            bench = Bench(found[1], vocab_size, args.clients)
            with bench.pool:
                rows = measure(bench, args)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    content = {
        "command": sys.argv, "start_seconds": started, "input_len": args.input_len, "output_len": args.output_len,
        "frontends": args.frontends, "clients": args.clients, "rows": rows,
    }  # fmt: skip
    if args.json is not None:
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return int(any(row["streams"]["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
