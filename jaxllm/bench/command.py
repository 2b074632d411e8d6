"""The options of `jaxllm bench` and what they run. Imports neither jax nor a model before a load is started."""

from __future__ import annotations

import argparse
from typing import Any

from jaxllm.bench.load import names_of
from jaxllm.bench.serving_command import SERVE_EXAMPLES, fill_serve_parser
from jaxllm.options import MODEL_HELP, Parser, add_engine_options, add_report_option, engine_config, positive

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
    add_report_option(parser)
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
    add_report_option(layouts)
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
    add_report_option(comm)
    comm.add_argument("--debug", action="store_true", help="show the traceback of an error")
    comm.set_defaults(run=_run_bench_comm)

    serve = commands.add_parser("serve", help="any OpenAI server, over HTTP", description=SERVE_EXAMPLES)
    fill_serve_parser(serve)


def _run_bench_comm(args: argparse.Namespace) -> int:
    from jaxllm.bench.comm import emit, parse_sizes, run_comm
    from jaxllm.config import EngineConfig

    names = {"tp": "tensor", "cp": "context", "pp": "pipeline", "ep": "moe_expert"}
    given = {f"{name}_parallel_size": getattr(args, axis) for axis, name in names.items() if getattr(args, axis)}
    rows = run_comm(
        EngineConfig(model="none", **given), parse_sizes(args.sizes), names_of(args.collectives), args.repeat
    )
    emit(rows, args.json)
    return 0


def _load(args: argparse.Namespace) -> dict[str, Any]:
    """What all loads of random prompts take."""
    return {name: getattr(args, name) for name in ("input_len", "output_len", "repeat", "seed")}


def _compared(args: argparse.Namespace) -> dict[str, Any]:
    """What loads take that other libraries can run beside."""
    compare = names_of(args.compare)
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
    rows = run_layouts(config, names_of(args.layouts), batch_sizes, prompt_lens, args.repeat, args.json)
    emit(config, rows, args.json)
    return int(any(row.error for row in rows))


def _numbers(text: str, option: str) -> list[int]:
    from jaxllm.settings import ConfigError

    names = names_of(text)
    if not names or not all(name.isdigit() and int(name) > 0 for name in names):
        raise ConfigError(f"{option} = {text!r} must be numbers above 0, for example 1,64")
    return [int(name) for name in names]
