"""The options of `jaxllm serve` and `run-batch`, and the settings they make. Imports neither jax nor an HTTP server."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from jaxllm.config import EngineConfig
from jaxllm.options import Parser, add_engine_options, engine_config, positive
from jaxllm.serve.settings import ServeConfig, split_settings
from jaxllm.settings import ConfigError, choices, load_yaml, merge_settings

_PACKAGES = ("starlette", "uvicorn", "msgpack", "prometheus_client")


def add_server_options(parser: Parser) -> None:
    """Options for the settings of the server and of the engine."""
    group = parser.add_argument_group("server")
    group.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    group.add_argument("--port", type=int, metavar="N", help="0 = a free one (default: 8000)")
    group.add_argument("--served-model-name", metavar="NAME", help="name that clients use (default: MODEL)")
    group.add_argument(
        "--num-serve-frontends", type=positive, metavar="N", help="processes for HTTP and text (default: 1)"
    )
    group.add_argument(
        "--api-key", metavar="KEY", help="bearer token; every route but /, /health and /metrics asks for it"
    )
    group.add_argument(
        "--tool-parser", choices=choices(ServeConfig, "tool_parser"), help="form of tool calls (default: auto)"
    )
    group.add_argument(
        "--reasoning-parser", choices=choices(ServeConfig, "reasoning_parser"), help="form of reasoning (default: auto)"
    )
    group.add_argument("--ssl-certfile", metavar="PEM", help="certificate for https")
    group.add_argument("--ssl-keyfile", metavar="PEM", help="its key")
    group.add_argument("--max-queue-size", type=positive, metavar="N", help="requests that may wait (default: 2048)")
    group.add_argument(
        "--response-store-bytes", type=int, metavar="N", help="for kept answers of /v1/responses (default: 64 MiB)"
    )
    group.add_argument("--response-store-seconds", type=float, metavar="S", help="that they are kept (default: 3600)")
    group.add_argument("--max-body-bytes", type=positive, metavar="N", help="of a request (default: 32 MiB)")
    group.add_argument("--max-header-bytes", type=positive, metavar="N", help="of a request (default: 32 KiB)")
    group.add_argument("--header-timeout", type=float, metavar="S", help="for a request's head to arrive (default: 30)")
    group.add_argument("--body-timeout", type=float, metavar="S", help="for a request's body to arrive (default: 30)")
    group.add_argument("--send-timeout", type=float, metavar="S", help="for a client that does not read (default: 120)")
    group.add_argument("--request-timeout", type=float, metavar="S", help="cancel requests after (default: never)")
    group.add_argument("--drain-timeout", type=float, metavar="S", help="for running requests at SIGTERM (default: 30)")
    group.add_argument("--health-timeout", type=float, metavar="S", help="of a silent step loop (default: 8)")
    group.add_argument("--engine-start-timeout", type=float, metavar="S", help="(default: 3600)")
    group.add_argument(
        "--restart-engine", type=int, metavar="N",
        help="start a dead engine again, at most N times in ten minutes (default: 0 = exit with 1)",
    )  # fmt: skip
    group.add_argument("--otlp-traces-endpoint", metavar="URL", help="send OpenTelemetry traces there")
    group.add_argument("--log-level", choices=choices(ServeConfig, "log_level"))
    group.add_argument("--log-format", choices=choices(ServeConfig, "log_format"))
    add_engine_options(parser)


def serve_settings(args: argparse.Namespace) -> tuple[EngineConfig, ServeConfig]:
    """The settings of the --config file with the options over them. Raises ConfigError."""
    in_file, engine_in_file = split_settings(load_yaml(args.config) if args.config else {})
    options: dict[str, Any] = {
        name: value for name in ServeConfig.model_fields if (value := getattr(args, name, None)) is not None
    }
    engine = engine_config(args, engine_in_file)
    if engine.skip_tokenizer_init:
        raise ConfigError("skip_tokenizer_init = True cannot be served: the API is about text; leave it out")
    return engine, ServeConfig(**merge_settings(in_file, options))


def check_packages() -> None:
    """ConfigError when what the server needs is not installed."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'a server needs {", ".join(missing)}: pip install "jaxllm[serve]"')
