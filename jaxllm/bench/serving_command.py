"""`jaxllm bench serve` on the command line: a load for any OpenAI server; needs no engine of its own."""

from __future__ import annotations

import argparse

from jaxllm.bench.load import names_of
from jaxllm.options import Parser, add_report_option, positive

SERVE_EXAMPLES = """\
Streams requests from any OpenAI server and reports TTFT, TPOT, ITL and goodput. Prompts are random token ids
(/v1/completions), random words (chat), or the lines of --dataset-path: {"prompt": "...", "output_len": 100}.

examples:
  jaxllm bench serve --base-url http://127.0.0.1:8000 --num-prompts 200 --input-len 1000 --output-len 1000
  jaxllm bench serve --request-rate 10 --goodput ttft:200 --goodput tpot:20 --json out.json
"""


def fill_serve_parser(parser: Parser) -> None:
    """Options of `jaxllm bench serve`."""
    parser.usage = "%(prog)s [--base-url URL] [options]"
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="(default: %(default)s)")
    parser.add_argument("--endpoint", default="/v1/completions", metavar="PATH", help="(default: %(default)s)")
    parser.add_argument("--model", metavar="NAME", help="(default: the server's first)")
    parser.add_argument("--api-key", metavar="KEY")
    parser.add_argument("--num-prompts", type=positive, default=200, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--input-len", "--isl", default="1024", metavar="N[:M]", help="prompt tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--output-len", "--osl", default="128", metavar="N[:M]", help="output tokens (default: %(default)s)"
    )
    parser.add_argument("--vocab-size", type=positive, default=30_000, metavar="N", help="random ids are below it")
    parser.add_argument("--dataset-path", metavar="JSONL", help="prompts of a file instead of random ones")
    parser.add_argument("--request-rate", type=float, default=float("inf"), metavar="R", help="a second (default: inf)")
    parser.add_argument("--burstiness", type=float, default=1.0, metavar="B", help="1 = Poisson, less = burstier")
    parser.add_argument("--max-concurrency", type=positive, metavar="N", help="requests on their way at once")
    parser.add_argument("--num-warmups", type=int, default=1, metavar="N", help="not counted (default: %(default)s)")
    parser.add_argument("--no-ignore-eos", action="store_true", help="let requests end at the model's end token")
    parser.add_argument("--extra-body", default="{}", metavar="JSON", help="further fields of every request")
    parser.add_argument(
        "--goodput",
        action="append",
        default=[],
        metavar="NAME:MS",
        help="limit for ttft, tpot or e2el; may be repeated",
    )
    parser.add_argument("--metric-percentiles", default="99", metavar="LIST", help="(default: %(default)s)")
    parser.add_argument(
        "--ready-check-timeout-sec", type=float, default=600.0, metavar="S", help="(default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    add_report_option(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    import asyncio
    import json

    from jaxllm.bench import serving
    from jaxllm.bench.load import Lengths
    from jaxllm.serve.http_client import Client
    from jaxllm.settings import ConfigError

    try:
        extra = json.loads(args.extra_body)
        percentiles = [float(one) for one in names_of(args.metric_percentiles)]
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
