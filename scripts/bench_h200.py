#!/usr/bin/env python
"""Llama-3.1-8B shapes with random weights on one H200 (or two): every row with its target, in one run.

    python scripts/bench_h200.py                          # all rows of one GPU, under 9 minutes
    python scripts/bench_h200.py --rows decode,prefill    # rows whose names start so
    python scripts/bench_h200.py --rows correct           # golden models, SmolLM2's text, kernels against references
    python scripts/bench_h200.py --resume                 # only what the JSON file has no figures for

Greedy, prefix cache off, through the public engine; decode rows also time the bare step. The peer column is vLLM 0.26.0
on the same kind of GPU. `--model`, `--settings` run the same rows on something smaller, to try the script out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import gpu_checks

from jaxllm.bench.suite import Row, Suite, choose, scaled

TWO_GPUS = {"decode-1": (2.9, 2.3), "decode-64": (3.6, 3.0)}
"""What rows should and may reach on two GPUs; the others are measured for their own sake."""
BATCHES = (1, 8, 32, 64, 128, 256)
ROWS = [
    Row("decode-1", "decode", "short", 1, 128, 256, must=4.1, aim=3.8, peer=4.90),
    Row("decode-8", "decode", "short", 8, 128, 256, must=4.3, aim=4.0, peer=5.02),
    Row("decode-32", "decode", "short", 32, 128, 256, must=4.7, aim=4.3, peer=5.41),
    Row("decode-64", "decode", "short", 64, 128, 256, must=5.2, aim=4.7, peer=5.96),
    Row("decode-128", "decode", "short", 128, 128, 256, must=6.3, aim=5.7, peer=7.05),
    Row("decode-256", "decode", "short", 256, 128, 256, must=9.3, aim=8.0, peer=10.59),
    Row("prefill-8x2048", "prefill", "short", 8, 2048, 1, must=43_000, aim=47_000, peer=42_497),
    Row("throughput-512", "throughput", "short", 512, 1000, 1000, must=10_400, aim=12_000, peer=9_417, repeat=1),
    Row("prefill-1x8000", "prefill", "prompt", 1, 8000, 1, must=40_000, aim=45_000, peer=38_475),
    Row("fp8-decode-1", "decode", "fp8", 1, 128, 256, must=2.9, aim=2.4, peer=3.46),
    Row("fp8-decode-64", "decode", "fp8", 64, 128, 256, must=3.9, aim=3.2, peer=4.45),
    Row("fp8-decode-256", "decode", "fp8", 256, 128, 256, must=7.4, aim=6.0, peer=8.57),
    Row("fp8-prefill-8x2048", "prefill", "fp8", 8, 2048, 1, must=67_000, aim=75_000, peer=66_978),
    Row("fp8-throughput-512", "throughput", "fp8", 512, 1000, 1000, must=13_500, aim=17_744, peer=11_837, repeat=1),
    Row("long-8x32768", "decode", "long", 8, 32_768, 128),
    Row("long-1x131072", "decode", "longest", 1, 131_072 - 128, 128, repeat=1),
]
ENGINES: dict[str, dict[str, Any]] = {
    "short": {"max_batch_size": 256, "max_seq_len": 2304, "batch_buckets": list(BATCHES), "token_buckets": [8192]},
    "fp8": {
        "max_batch_size": 256,
        "max_seq_len": 2304,
        "batch_buckets": [1, 64, 256],
        "token_buckets": [8192],
        "quantization": "fp8",
        "kv_cache_config": {"enable_block_reuse": False, "dtype": "fp8"},
    },
    # A step of exactly the row's tokens: every one that it is filled up with costs as much as a real one.
    "prompt": {"max_batch_size": 1, "max_seq_len": 8192, "batch_buckets": [1], "token_buckets": [8000]},
    "long": {"max_batch_size": 8, "max_seq_len": 32_768 + 128, "batch_buckets": [8], "token_buckets": [8192]},
    "longest": {"max_batch_size": 1, "max_seq_len": 131_072, "batch_buckets": [1], "token_buckets": [8192]},
}
STARTS = {"start-cold": (75.0, 45.0), "start-warm": (25.0, 12.0)}

_FIRST_TOKEN = """
import json, sys
from jaxllm import LLM, SamplingParams
with LLM(**json.loads(sys.argv[1])) as llm:
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1), use_tqdm=False)
    print(json.dumps(llm.start_report))
"""


def measure_starts(settings: dict[str, Any], wanted: list[str]) -> dict[str, dict[str, Any]]:
    """Seconds from the start of a process to its first token: with empty caches, then with what that left behind."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="jaxllm-start-") as cache:
        environment = os.environ | {"JAXLLM_CACHE": cache}
        for name in ("start-cold", "start-warm"):
            if not wanted:
                break
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", _FIRST_TOKEN, json.dumps(settings)],
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
            )
            seconds = time.perf_counter() - began
            must, aim = STARTS[name]
            found[name] = {"seconds": seconds, "must": must, "aim": aim}
            if done.returncode:
                found[name] = {"error": done.stderr[-300:]}
                break
            found[name]["phases"] = json.loads(done.stdout.splitlines()[-1])
    return {name: entry for name, entry in found.items() if name in wanted}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="names, or their beginnings, separated by commas (default: all)")
    parser.add_argument("--json", type=Path, default=Path("bench_h200.json"), help="results (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the JSON file has figures for")
    parser.add_argument("--repeat", type=int, default=3, help="after the warm-up (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=500, help="start nothing new after these (default: %(default)s)"
    )
    parser.add_argument("--tp", type=int, default=1, help="GPUs of tensor parallelism (default: %(default)s)")
    parser.add_argument("--model", help="another model (default: Llama-3.1-8B's shapes with random weights)")
    parser.add_argument("--settings", default="{}", help="JSON of engine settings that win over the rows' own")
    parser.add_argument("--scale", type=int, default=1, help="divide all lengths and batches, to try the script out")
    args = parser.parse_args()

    began = time.perf_counter()
    names = [name.strip() for name in args.rows.split(",") if name.strip()]
    starts = [name for name in STARTS if not names or any(name.startswith(wanted) for wanted in names)]
    checks = [name for name in gpu_checks.NAMES if any(name.startswith(wanted) for wanted in names)]
    others = [n for n in names if not any(s.startswith(n) for s in (*STARTS, *gpu_checks.NAMES))]
    rows = choose(ROWS, ",".join(others)) if others or not names else []
    with tempfile.TemporaryDirectory(prefix="jaxllm-model-") as directory:
        config = files("jaxllm.plan") / "models" / "Llama-3.1-8B.json"
        (Path(directory) / "config.json").write_text(config.read_text(encoding="utf-8"), encoding="utf-8")
        common: dict[str, Any] = {"model": args.model or directory, "skip_tokenizer_init": True, "progress": False}
        common |= {} if args.model else {"load_format": "dummy"}
        common |= {"tensor_parallel_size": args.tp, "kv_cache_config": {"enable_block_reuse": False}}
        settings = {name: common | engine | json.loads(args.settings) for name, engine in ENGINES.items()}
        if args.tp > 1:
            targets = TWO_GPUS if args.tp == 2 else {}
            pairs = [(row, targets.get(row.name, (None, None))) for row in rows]
            rows = [replace(row, must=must, aim=aim, peer=None) for row, (must, aim) in pairs]
        if args.scale > 1:
            rows = [scaled(row, args.scale) for row in rows]
        suite = Suite(settings, rows, path=args.json, repeat=args.repeat, seconds=args.seconds)
        if args.resume:
            suite.resume()
        failed = suite.run()
        print(suite.table())
        content = suite.to_json()
        if starts:
            small = common | {"max_batch_size": 8, "max_seq_len": 2304} | json.loads(args.settings)
            found = measure_starts(small, starts)
            content["starts"] = found
            for name, entry in found.items():
                print(f"  {name}: {entry.get('seconds', float('nan')):.1f} s {entry.get('error', '')}")
            failed += sum("error" in entry for entry in found.values())
        if checks:
            content["checks"] = {}
            for name in checks:
                entry = gpu_checks.check(name, args.seconds - (time.perf_counter() - began))
                content["checks"][name] = entry
                failed += entry["exit_status"] != 0
                print(f"[{name}: exit status {entry['exit_status']}]", file=sys.stderr, flush=True)
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
