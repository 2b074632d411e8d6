"""`jaxllm serve` and `jaxllm run-batch` on the command line. Imports neither jax nor an HTTP server."""

from __future__ import annotations

import argparse
import os
import sys

from jaxllm.options import MODEL_HELP, Parser, positive
from jaxllm.serve.options import add_server_options, check_packages, serve_settings
from jaxllm.settings import ConfigError

EXAMPLES = """\
Serves the OpenAI API: /v1/chat/completions, /v1/completions, /v1/responses, /v1/models; beside it /tokenize,
/detokenize, /health, /health_generate, /version, /metrics (Prometheus), /iteration_stats; at / a page to chat and to
watch the engine. Needs an extra: pip install "jaxllm[serve]".
--config may hold these settings beside those of the engine; options win over it.

examples:
  jaxllm serve smollm2-135m
  jaxllm serve ./Llama-3.1-8B-Instruct --tp_size 4 --max_batch_size 128 --port 8080 --api_key "$KEY" --host 0.0.0.0
  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
    -d '{"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hi"}]}'
"""
BATCH_EXAMPLES = """\
A line of the input is {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}. The output
has {"id": ..., "custom_id": "1", "response": {"status_code": 200, "request_id": ..., "body": {...}}, "error": null} for
each, in the order in which they end. Run it again after an interruption and it goes on where it stopped.

examples:
  jaxllm run-batch -i in.jsonl -o out.jsonl --model smollm2-135m
  jaxllm run-batch -i in.jsonl -o out.jsonl --base-url http://127.0.0.1:8000      # a server that runs already
"""


def fill_parser(parser: Parser) -> None:
    parser.usage = "%(prog)s MODEL [options]"
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--print-config", action="store_true", help="print the resulting settings as YAML and exit")
    add_server_options(parser)
    parser.set_defaults(run=run_serve)


def fill_batch_parser(parser: Parser) -> None:
    parser.usage = "%(prog)s -i IN -o OUT (--model MODEL | --base-url URL) [options]"
    parser.add_argument("-i", "--input-file", required=True, metavar="JSONL")
    parser.add_argument("-o", "--output-file", required=True, metavar="JSONL")
    parser.add_argument("--model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--base-url", metavar="URL", help="use this server instead of starting one")
    parser.add_argument("--max-concurrency", type=positive, default=512, metavar="N", help="(default: %(default)s)")
    add_server_options(parser)
    parser.set_defaults(run=_run_batch)


def _run_batch(args: argparse.Namespace) -> int:
    from jaxllm.serve.batch import run

    return run(args)


def run_serve(args: argparse.Namespace) -> int:
    if args.model == "disaggregated" and not os.path.exists(args.model):
        raise ConfigError("disaggregated serving is not supported yet; jaxllm serve MODEL does both phases")
    engine, settings = serve_settings(args)
    if args.print_config:
        import yaml  # type: ignore[import-untyped]

        shown = settings.model_dump(mode="json") | {"api_key": "(hidden)" if settings.api_key else None}
        yaml.safe_dump({**shown, **engine.model_dump(mode="json")}, sys.stdout, sort_keys=False)
        return 0
    check_packages()
    from jaxllm.serve.supervisor import Supervisor

    return Supervisor(engine, settings, args.debug).run()
