#!/usr/bin/env python
"""Mixtures of experts with random weights on one H200 (or two): every row with its target, in one run.

    python scripts/bench_moe.py                                # Qwen3-30B-A3B on one GPU
    python scripts/bench_moe.py --model Mixtral-8x7B --tp 2    # Mixtral-8x7B over two, experts split by columns
    python scripts/bench_moe.py --model Mixtral-8x7B --tp 2 --ep 2    # the same, each rank with half of the experts
    python scripts/bench_moe.py --model DeepSeek-V3 --layers 4 --rows mla    # the share of attention over latents

Weights are bfloat16, whatever the model's checkpoints have. Greedy, prefix cache off, through the public engine; decode
rows also time the bare step. A target of Qwen3-30B-A3B is 70 % of the bandwidth that even routing would need (decode:
attention, embedding and the experts that somebody chose, at 4.56 TB/s), or 50 % of the speed of matrix products
(prefill: 787 TF/s).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from jaxllm.bench.suite import Result, Row, Suite, choose, scaled

MODEL = "Qwen3-30B-A3B"
ROWS = [
    Row("moe-decode-1", "decode", "short", 1, 128, 128, must=1.91),
    Row("moe-decode-16", "decode", "short", 16, 128, 128, must=12.4),
    Row("moe-decode-64", "decode", "short", 64, 128, 128, must=19.1),
    Row("moe-decode-256", "decode", "short", 256, 128, 128, must=20.9),
    Row("moe-prefill-8x2048", "prefill", "short", 8, 2048, 1, must=62_000),
]
LATENT_ROWS = [Row("mla-decode-64x4096", "decode", "long", 64, 4096, 128, repeat=1)]
"""Of models with latent attention: what the step takes, to which its kernel is then compared."""
ENGINE: dict[str, Any] = {"max_seq_len": 2304, "token_buckets": [8192]}
LONG: dict[str, Any] = {"max_seq_len": 4352, "token_buckets": [8192]}
TINY = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64} | {
    "vocab_size": 512,
}
"""What `--scale` shrinks a model to, besides the loads."""


def print_latent_share(config: dict[str, Any], ranks: int, result: Result) -> None:
    """How much of a row's bare step the kernel of attention over latents takes, by itself and with the same shapes."""
    from kernel_rows.mla import speed

    from jaxllm.kernels.cuda import call

    try:
        call.require("")
    except NotImplementedError as reason:
        print(f"{result.row.name}: the kernel by itself is not measured: {reason}")
        return
    row, layers = result.row, config["num_hidden_layers"]
    heads = config["num_attention_heads"] // ranks
    kernel = speed(row.batch, row.input_len + row.output_len // 2, heads, False)
    share = 1e-3 * layers * kernel["us"] / result.bare if result.bare else 0.0
    floors = f"{kernel['memory_floor_us']:.1f} us of memory, {kernel['product_floor_us']:.1f} us of products"
    step = f"{100 * share:.0f} % of a bare step of {result.bare:.2f} ms with {layers} layers"
    print(f"{row.name}: attention over latents {kernel['us']:.1f} us a layer (floors: {floors}), {step}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="one that `jaxllm plan` knows (default: %(default)s)")
    parser.add_argument("--tp", type=int, default=1, help="GPUs (default: %(default)s)")
    parser.add_argument("--ep", type=int, default=1, help="of them, ranks of experts (default: %(default)s)")
    parser.add_argument("--rows", default="", help="names, or their beginnings, separated by commas (default: all)")
    parser.add_argument("--json", type=Path, default=Path("bench_moe.json"), help="results (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the JSON file has figures for")
    parser.add_argument("--repeat", type=int, default=2, help="after the warm-up (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=400, help="start nothing new after (default: %(default)s)")
    parser.add_argument("--settings", default="{}", help="JSON of engine settings that win over the rows' own")
    parser.add_argument("--layers", type=int, help="only so many of the model's layers, to try the script out")
    parser.add_argument("--scale", type=int, default=1, help="divide all lengths and batches, to try the script out")
    args = parser.parse_args()

    shipped = files("jaxllm.plan") / "models" / f"{args.model}.json"
    if not shipped.is_file():
        parser.error(f"--model {args.model}: jaxllm has no such config; see `jaxllm plan --help`")
    config: dict[str, Any] = json.loads(shipped.read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    latent = "kv_lora_rank" in config
    rows = choose([*ROWS, *(LATENT_ROWS if latent else [])], args.rows)
    if args.model != MODEL or args.tp > 1 or args.layers:
        rows = [Row(r.name, r.kind, r.engine, r.batch, r.input_len, r.output_len, repeat=r.repeat) for r in rows]
    if args.layers:
        config["num_hidden_layers"] = args.layers
    if args.scale > 1:
        config |= {key: value for key, value in TINY.items() if key in config}
        rows = [scaled(row, args.scale) for row in rows]
    # Every size of a step is a program to compile: only those that the rows need.
    engines: dict[str, dict[str, Any]] = {}
    for name, sizes in (("short", ENGINE), ("long", LONG)):
        batches = sorted({row.batch for row in rows if row.engine == name})
        if batches:
            engines[name] = sizes | {"max_batch_size": batches[-1], "batch_buckets": batches}
    with tempfile.TemporaryDirectory(prefix="jaxllm-model-") as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        settings: dict[str, Any] = {"model": directory, "load_format": "dummy", "skip_tokenizer_init": True}
        settings |= {"progress": False, "kv_cache_config": {"enable_block_reuse": False}}
        settings |= {"tensor_parallel_size": args.tp // args.ep}
        settings |= {"moe_expert_parallel_size": args.ep} if args.ep > 1 else {}
        suite = Suite(
            {name: settings | engine | json.loads(args.settings) for name, engine in engines.items()},
            rows,
            path=args.json,
            repeat=args.repeat,
            seconds=args.seconds,
        )
        if args.resume:
            suite.resume()
        failed = suite.run()
        print(suite.table())
    if latent:
        gc.collect()  # the engine's memory
        for result in suite.results:
            if result.row.engine == "long" and result.bare is not None:
                print_latent_share(config, args.tp // args.ep, result)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
