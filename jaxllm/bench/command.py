"""The options of `jaxllm bench` and what they run. Imports neither jax nor a model before a load is started."""

from __future__ import annotations

import argparse
from typing import Any

from jaxllm.options import MODEL_HELP, Parser, add_engine_options, engine_config, positive

_LATENCY_EXAMPLES = """\
One fixed batch at a time: every request starts together, has --input-len random tokens and gets --output-len.
Reports time to first token (TTFT), time per output token (TPOT) and output tokens per second; median of the
repetitions. Starting and compiling are reported apart.

examples:
  jaxllm bench latency smollm2-135m
  jaxllm bench latency smollm2-135m --batch-size 16 --compare transformers --json out.json
"""
_THROUGHPUT_EXAMPLES = """\
Many requests submitted at once; lengths are one number, LOW:HIGH (drawn evenly, seeded), or sharegpt (log-normal, as
long as its conversations). A padded-batch library decodes each batch of --compare-batch until its longest request is
done; only the tokens asked for are counted.

examples:
  jaxllm bench throughput smollm2-135m --num-requests 64 --input-len 64 --output-len 8:256
  jaxllm bench throughput smollm2-135m --compare transformers,llama.cpp
  jaxllm bench throughput smollm2-135m --input-len sharegpt --output-len sharegpt
  jaxllm bench throughput smollm2-135m --prefix-len 1000 --input-len 20 --output-len 16
"""
_HOST_EXAMPLES = """\
What the host spends on one decode step outside XLA: schedule, pack, dispatch and update, in milliseconds.

examples:
  jaxllm bench host smollm2-135m --batch-size 64
"""

_PIPELINE_EXAMPLES = """\
Idle share of the stages of a pipeline (--pp), for decodes of a full batch and for one prompt that has --input-len
tokens for each micro-batch in flight; beside it what the stages' own times and the textbook formula say.

examples:
  jaxllm bench pipeline smollm2-135m --pp 2 --batch-size 16 --micro-batches 1,2,4
"""
_LAYOUTS_EXAMPLES = """\
The same model on several layouts, one after the other: largest and mean difference of the log probabilities of a
prompt's tokens from those of the first layout; TPOT by batch size, TTFT by prompt length. Layouts are 1, tp2, pp2, dp2
(attention data parallelism), cp2:RING, or several joined by +.

examples:
  jaxllm bench layouts smollm2-135m --layouts 1,tp2,cp2:RING,tp2+pp2 --prompt-lens 512
  jaxllm bench layouts DIR_WITH_CONFIG_JSON --load_format dummy --layouts 1,tp2,pp2,dp2 --batch-sizes 1,64
"""
_COMM_EXAMPLES = """\
Collectives over the axes of a layout's mesh, in bfloat16: microseconds of one, and bandwidth on the bus as nccl-tests
counts it. Sizes are bytes on each rank, of the larger of what goes in and comes out. Needs no model.

examples:
  jaxllm bench comm --tp 8
  jaxllm bench comm --tp 2 --ep 4 --sizes 8K,1M,256M --collectives all_reduce,all_to_all --json comm.json
  JAX_NUM_CPU_DEVICES=4 jaxllm bench comm --tp 2 --cp 2 --sizes 64K
"""
_SERVE_EXAMPLES = """\
Streams requests from any OpenAI server and reports TTFT, TPOT, ITL and goodput. Prompts are random token ids
(/v1/completions), random words (chat), or the lines of --dataset-path: {"prompt": "...", "output_len": 100}.

examples:
  jaxllm bench serve --base-url http://127.0.0.1:8000 --num-prompts 200 --input-len 1000 --output-len 1000
  jaxllm bench serve --request-rate 10 --goodput ttft:200 --goodput tpot:20 --json out.json
"""


def _add_bench_options(parser: Parser, *, input_len: str, output_len: str, compare: bool) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", default="smollm2-135m", help=MODEL_HELP)
    parser.add_argument(
        "--input-len", "--isl", default=input_len, metavar="N[:M]", help="prompt tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--output-len", "--osl", default=output_len, metavar="N[:M]", help="output tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--repeat", type=positive, default=3, metavar="N", help="repetitions after the warm-up (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts and lengths")
    parser.add_argument("--json", metavar="PATH", help="also write the report as JSON (- = stdout, instead of a table)")
    if compare:
        parser.add_argument(
            "--compare-repeat", type=positive, metavar="N", help="repetitions of those (default: as --repeat)"
        )
        parser.add_argument(
            "--prefix-len", type=int, default=0, metavar="N", help="further tokens in front that all prompts share"
        )
        parser.add_argument(
            "--profile", metavar="DIR", help="trace one more repetition into DIR and print the kernels by time"
        )
        parser.add_argument(
            "--compare", default="", metavar="LIST",
            help="run the same prompts through these libraries too: transformers, llama.cpp",
        )  # fmt: skip
    add_engine_options(parser)


def fill_parser(parser: Parser) -> None:
    parser.usage = "%(prog)s LOAD [MODEL] [options]"
    commands = parser.add_subparsers(dest="load", metavar="LOAD", required=True, parser_class=Parser, prog=parser.prog)
    latency = commands.add_parser("latency", help="one fixed batch at a time", description=_LATENCY_EXAMPLES)
    latency.usage = "%(prog)s [MODEL] [options]"
    latency.add_argument("-b", "--batch-size", type=positive, default=1, metavar="N", help="(default: %(default)s)")
    _add_bench_options(latency, input_len="64", output_len="128", compare=True)
    latency.add_argument("--host-profile", action="store_true", help="also report the host's cost per step")
    latency.set_defaults(run=_run_bench_latency)

    throughput = commands.add_parser("throughput", help="many requests at once", description=_THROUGHPUT_EXAMPLES)
    throughput.usage = "%(prog)s [MODEL] [options]"
    throughput.add_argument("--num-requests", type=positive, default=64, metavar="N", help="(default: %(default)s)")
    _add_bench_options(throughput, input_len="64", output_len="8:256", compare=True)
    throughput.add_argument(
        "--compare-batch", type=positive, default=16, metavar="N",
        help="batch of the libraries that pad (default: %(default)s)",
    )  # fmt: skip
    throughput.set_defaults(run=_run_bench_throughput)

    host = commands.add_parser("host", help="the host's cost per decode step", description=_HOST_EXAMPLES)
    host.usage = "%(prog)s [MODEL] [options]"
    host.add_argument("-b", "--batch-size", type=positive, default=64, metavar="N", help="(default: %(default)s)")
    _add_bench_options(host, input_len="16", output_len="128", compare=False)
    host.set_defaults(run=_run_bench_host)

    pipeline = commands.add_parser("pipeline", help="idle time of pipeline stages", description=_PIPELINE_EXAMPLES)
    pipeline.usage = "%(prog)s [MODEL] [options]"
    pipeline.add_argument("-b", "--batch-size", type=positive, default=16, metavar="N", help="(default: %(default)s)")
    pipeline.add_argument(
        "--micro-batches", default="1,2,4", metavar="LIST", help="in flight for each stage (default: %(default)s)"
    )
    _add_bench_options(pipeline, input_len="64", output_len="64", compare=False)
    pipeline.set_defaults(run=_run_bench_pipeline)

    layouts = commands.add_parser("layouts", help="several layouts of one model", description=_LAYOUTS_EXAMPLES)
    layouts.usage = "%(prog)s [MODEL] --layouts LIST [options]"
    layouts.add_argument("model", metavar="MODEL", nargs="?", default="smollm2-135m", help=MODEL_HELP)
    layouts.add_argument("--layouts", required=True, metavar="LIST", help="the first is what others are compared with")
    layouts.add_argument("--batch-sizes", default="1,64", metavar="LIST", help="(default: %(default)s)")
    layouts.add_argument("--prompt-lens", default="2048", metavar="LIST", help="(default: %(default)s)")
    layouts.add_argument("--repeat", type=positive, default=3, metavar="N", help="(default: %(default)s)")
    layouts.add_argument(
        "--json", metavar="PATH", help="also write the report as JSON (- = stdout, instead of a table)"
    )
    add_engine_options(layouts)
    layouts.set_defaults(run=_run_bench_layouts)

    comm = commands.add_parser("comm", help="collectives of a layout", description=_COMM_EXAMPLES)
    comm.usage = "%(prog)s --tp N [options]"
    for axis, what in (("tp", "tensor"), ("ep", "expert"), ("cp", "context"), ("pp", "pipeline")):
        comm.add_argument(f"--{axis}", type=positive, metavar="N", help=f"devices of {what} parallelism")
    comm.add_argument("--sizes", default="8K,64K,1M,16M,256M", metavar="LIST", help="(default: %(default)s)")
    comm.add_argument(
        "--collectives", default="all_reduce,all_gather,reduce_scatter,all_to_all,ppermute", metavar="LIST",
        help="(default: %(default)s)",
    )  # fmt: skip
    comm.add_argument("--repeat", type=positive, default=3, metavar="N", help="(default: %(default)s)")
    comm.add_argument("--json", metavar="PATH", help="also write the figures as JSON (- = stdout, instead of a table)")
    comm.add_argument("--debug", action="store_true", help="show the traceback of an error")
    comm.set_defaults(run=_run_bench_comm)

    serve = commands.add_parser("serve", help="any OpenAI server, over HTTP", description=_SERVE_EXAMPLES)
    serve.usage = "%(prog)s [--base-url URL] [options]"
    serve.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="(default: %(default)s)")
    serve.add_argument("--endpoint", default="/v1/completions", metavar="PATH", help="(default: %(default)s)")
    serve.add_argument("--model", metavar="NAME", help="(default: the server's first)")
    serve.add_argument("--api-key", metavar="KEY")
    serve.add_argument("--num-prompts", type=positive, default=200, metavar="N", help="(default: %(default)s)")
    serve.add_argument(
        "--input-len", "--isl", default="1024", metavar="N[:M]", help="prompt tokens (default: %(default)s)"
    )
    serve.add_argument(
        "--output-len", "--osl", default="128", metavar="N[:M]", help="output tokens (default: %(default)s)"
    )
    serve.add_argument("--vocab-size", type=positive, default=30_000, metavar="N", help="random ids are below it")
    serve.add_argument("--dataset-path", metavar="JSONL", help="prompts of a file instead of random ones")
    serve.add_argument("--request-rate", type=float, default=float("inf"), metavar="R", help="a second (default: inf)")
    serve.add_argument("--burstiness", type=float, default=1.0, metavar="B", help="1 = Poisson, less = burstier")
    serve.add_argument("--max-concurrency", type=positive, metavar="N", help="requests on their way at once")
    serve.add_argument("--num-warmups", type=int, default=1, metavar="N", help="not counted (default: %(default)s)")
    serve.add_argument("--no-ignore-eos", action="store_true", help="let requests end at the model's end token")
    serve.add_argument("--extra-body", default="{}", metavar="JSON", help="further fields of every request")
    serve.add_argument(
        "--goodput",
        action="append",
        default=[],
        metavar="NAME:MS",
        help="limit for ttft, tpot or e2el; may be repeated",
    )
    serve.add_argument("--metric-percentiles", default="99", metavar="LIST", help="(default: %(default)s)")
    serve.add_argument(
        "--ready-check-timeout-sec", type=float, default=600.0, metavar="S", help="(default: %(default)s)"
    )
    serve.add_argument("--seed", type=int, default=0)
    serve.add_argument("--json", metavar="PATH", help="also write the figures as JSON (- = stdout, instead of a table)")
    serve.add_argument("--debug", action="store_true", help="show the traceback of an error")
    serve.set_defaults(run=_run_bench_serve)


def _run_bench_comm(args: argparse.Namespace) -> int:
    from jaxllm.bench.comm import emit, parse_sizes, run_comm
    from jaxllm.config import EngineConfig

    names = {"tp": "tensor", "cp": "context", "pp": "pipeline", "ep": "moe_expert"}
    given = {f"{name}_parallel_size": getattr(args, axis) for axis, name in names.items() if getattr(args, axis)}
    rows = run_comm(EngineConfig(model="none", **given), parse_sizes(args.sizes), _names(args.collectives), args.repeat)
    emit(rows, args.json)
    return 0


def _run_bench_serve(args: argparse.Namespace) -> int:
    import asyncio
    import json

    from jaxllm.bench import serving
    from jaxllm.bench.load import Lengths
    from jaxllm.serve.http_client import Client
    from jaxllm.settings import ConfigError

    try:
        extra = json.loads(args.extra_body)
        percentiles = [float(one) for one in _names(args.metric_percentiles)]
    except ValueError as error:
        raise ConfigError(f"--extra-body must be a JSON object and --metric-percentiles numbers: {error}") from None
    if not isinstance(extra, dict) or not all(0 <= one <= 100 for one in percentiles):
        raise ConfigError("--extra-body must be a JSON object and --metric-percentiles numbers up to 100")
    if not args.request_rate > 0 or not args.burstiness > 0:
        raise ConfigError("--request-rate and --burstiness must be above 0")
    goodput = serving.parse_goodput(args.goodput)
    input_len, output_len = Lengths.parse(args.input_len, "--input-len"), Lengths.parse(args.output_len, "--output-len")
    client = Client(args.base_url, {"authorization": f"Bearer {args.api_key}"} if args.api_key else {})

    async def measure() -> int:
        name = await serving.wait_until_ready(client, args.ready_check_timeout_sec)
        bodies = serving.make_bodies(
            endpoint=args.endpoint, model=args.model or name, count=args.num_prompts, input_len=input_len,
            output_len=output_len, vocab_size=args.vocab_size, seed=args.seed, ignore_eos=not args.no_ignore_eos,
            extra=extra, dataset=args.dataset_path,
        )  # fmt: skip
        load = serving.ServeLoad(
            args.endpoint, bodies, args.request_rate, args.burstiness, args.max_concurrency, args.num_warmups, goodput,
            args.seed,
        )  # fmt: skip
        outcomes, seconds = await serving.run_load(client, load)
        found = serving.summary(load, outcomes, seconds, percentiles)
        serving.emit({"model_id": args.model or name, **found}, percentiles, args.json)
        client.close()
        return 0 if found["completed"] else 1

    return asyncio.run(measure())


def _load(args: argparse.Namespace) -> dict[str, Any]:
    """What all loads of random prompts take."""
    return {name: getattr(args, name) for name in ("input_len", "output_len", "repeat", "seed")}


def _compared(args: argparse.Namespace) -> dict[str, Any]:
    """What loads take that other libraries can run beside."""
    compare = _names(args.compare)
    if args.prefix_len < 0:
        from jaxllm.settings import ConfigError

        raise ConfigError(f"--prefix-len = {args.prefix_len} must be 0 or more")
    return {
        "compare": compare,
        "compare_repeat": args.compare_repeat,
        "profile": args.profile,
        "prefix_len": args.prefix_len,
    }


def _run_bench_latency(args: argparse.Namespace) -> int:
    from jaxllm.bench.latency import run_latency

    report = run_latency(
        engine_config(args),
        batch_size=args.batch_size,
        **_load(args),
        **_compared(args),
        host_profile=args.host_profile,
    )
    report.emit(args.json)
    return 0


def _run_bench_throughput(args: argparse.Namespace) -> int:
    from jaxllm.bench.throughput import run_throughput

    report = run_throughput(
        engine_config(args),
        num_requests=args.num_requests,
        **_load(args),
        **_compared(args),
        compare_batch=args.compare_batch,
    )
    report.emit(args.json)
    return 0


def _run_bench_host(args: argparse.Namespace) -> int:
    from jaxllm.bench.latency import run_host

    report = run_host(
        engine_config(args),
        batch_size=args.batch_size,
        **_load(args),
    )
    report.emit(args.json)
    return 0


def _run_bench_pipeline(args: argparse.Namespace) -> int:
    from jaxllm.bench.load import Lengths
    from jaxllm.bench.pipeline import emit, run_pipeline

    config = engine_config(args)
    found = run_pipeline(
        config,
        batch_size=args.batch_size,
        chunk=Lengths.parse(args.input_len, "--input-len").high,
        output_len=Lengths.parse(args.output_len, "--output-len").high,
        micro_batches=_numbers(args.micro_batches, "--micro-batches"),
        repeat=args.repeat,
        seed=args.seed,
    )
    title = f"pipeline of {config.model}, {config.pipeline_parallel_size} stages, batch {args.batch_size}"
    emit(found, title, args.json)
    return 0


def _run_bench_layouts(args: argparse.Namespace) -> int:
    from jaxllm.bench.layouts import emit, run_layouts

    config = engine_config(args)
    batch_sizes, prompt_lens = _numbers(args.batch_sizes, "--batch-sizes"), _numbers(args.prompt_lens, "--prompt-lens")
    rows = run_layouts(config, _names(args.layouts), batch_sizes, prompt_lens, args.repeat, args.json)
    emit(config, rows, args.json)
    return int(any(row.error for row in rows))


def _numbers(text: str, option: str) -> list[int]:
    from jaxllm.settings import ConfigError

    names = _names(text)
    if not names or not all(name.isdigit() and int(name) > 0 for name in names):
        raise ConfigError(f"{option} = {text!r} must be numbers above 0, for example 1,64")
    return [int(name) for name in names]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
