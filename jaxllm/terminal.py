"""`jaxllm generate` and `jaxllm chat`: a model at a terminal, text in and text out."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from jaxllm.options import (
    EXIT_USAGE,
    MODEL_HELP,
    Parser,
    add_engine_options,
    add_sampling_options,
    engine_config,
    sampling_params_from,
)
from jaxllm.settings import ConfigError

if TYPE_CHECKING:
    from jaxllm.llm import LLM
    from jaxllm.outputs import RequestOutput
    from jaxllm.sampling_params import SamplingParams

# ---- generate -------------------------------------------------------------------------------------------------------

GENERATE_EXAMPLES = """\
examples:
  jaxllm generate smollm2-135m "The capital of France is"
  jaxllm generate smollm2-135m "Once upon a time" -n 200 --temperature 0.8 --top-p 0.95 --seed 1
  jaxllm generate ./Llama-3.1-8B-Instruct --chat "Why is the sky blue?" --tp 4
  jaxllm generate smollm2-135m --file prompts.txt --json > outputs.jsonl      # one prompt a line
  echo "def fib(n):" | jaxllm generate smollm2-135m -
"""


def fill_generate_parser(parser: Parser) -> None:
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
            note(
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

CHAT_EXAMPLES = """\
Inside the chat:  /reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer.

examples:
  jaxllm chat smollm2-135m
  jaxllm chat ./Qwen3-8B --system "Answer in one sentence." --temperature 0.7 --tp 2
"""
_CHAT_COMMANDS = ("/reset", "/exit", "/help")


def fill_chat_parser(parser: Parser) -> None:
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
                note(f"{timing.tokens} tokens, first after {timing.ttft * 1e3:.0f} ms{speed}")
    return 0


# ---- both -----------------------------------------------------------------------------------------------------------


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
            note(f"ready in {time.perf_counter() - started:.1f} s" + (f" ({phases})" if phases else ""))
        yield llm


def note(text: str) -> None:
    """Tells the user something that is no result: on stderr."""
    print(f"[{text}]", file=sys.stderr, flush=True)
