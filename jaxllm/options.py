"""What the commands share: an argument parser with one-line errors, and the options that become settings."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jaxllm.config import EngineConfig, KvCacheConfig, SchedulerConfig
from jaxllm.settings import choices, load_yaml, merge_settings

if TYPE_CHECKING:
    from jaxllm.sampling_params import SamplingParams

EXIT_USAGE = 2
MODEL_HELP = "directory with a checkpoint, .gguf file, hub id, or smollm2-135m"


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the nearest option, and help that keeps its examples' line breaks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _HelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")

    def unknown(self, arguments: Sequence[str]) -> NoReturn:
        """Refuse arguments that no option takes."""
        given = arguments[0].partition("=")[0]
        near = difflib.get_close_matches(given, self._option_string_actions, n=1)
        hint = f"did you mean {near[0]}?" if near else "quote a prompt that has spaces" if given[:1] != "-" else ""
        self.error(f"unknown argument {arguments[0]!r}" + (f"; {hint}" if hint else ""))


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=min(110, _terminal_width()))


def _terminal_width() -> int:
    return shutil.get_terminal_size().columns - 2


def positive(text: str) -> int:
    """argparse type: an integer above 0."""
    with contextlib.suppress(ValueError):
        if (value := int(text)) > 0:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} must be an integer above 0")


def _report_path(text: str) -> str:
    """argparse type: a file that can be written, asked before anything is measured for it; - is stdout."""
    path = Path(text)
    if text != "-" and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written; name a file in a directory that exists")
    return text


def add_report_option(parser: argparse.ArgumentParser) -> None:
    """--json, of the commands that measure."""
    parser.add_argument(
        "--json", type=_report_path, metavar="PATH",
        help="also write the report as JSON (- = stdout, instead of a table)",
    )  # fmt: skip


def _integers(text: str) -> list[int]:
    """argparse type: integers above 0 with commas between."""
    return [positive(part) for part in text.split(",")]


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Options for the settings of the engine that people change most; --config takes all of them."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "-c", "--config", "--extra-llm-api-options", metavar="YAML",
        help="file with settings of the engine; options below win over it",
    )  # fmt: skip
    group.add_argument("--backend", help=argparse.SUPPRESS)  # TensorRT-LLM's: "pytorch" is what there is
    group.add_argument(
        "--tensor-parallel-size", "--tp-size", "--tp", type=positive, metavar="N",
        help="devices to split the model over (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--pipeline-parallel-size", "--pp-size", "--pp", type=positive, metavar="N", help="stages of layers"
    )
    group.add_argument(
        "--pp-partition", type=_integers, metavar="N,N", help="layers of each stage (default: as even as possible)"
    )
    group.add_argument(
        "--context-parallel-size", "--cp-size", "--cp", type=positive, metavar="N",
        help="devices to split the tokens of a sequence over",
    )  # fmt: skip
    group.add_argument(
        "--cp-type", metavar="TYPE", help="ulysses (the default), ring, star or helix; --config sets the rest"
    )
    group.add_argument(
        "--moe-expert-parallel-size", "--ep-size", "--ep", type=positive, metavar="N",
        help="groups of devices to split the experts over: they multiply --tp where the devices are there, else "
        "they are a part of it",
    )  # fmt: skip
    group.add_argument(
        "--moe-tensor-parallel-size", type=positive, metavar="N", help="devices to split each expert over"
    )
    group.add_argument(
        "--enable-attention-dp", action="store_true",
        help="split requests, not heads, over the devices of --tp",
    )  # fmt: skip
    group.add_argument("--dtype", choices=choices(EngineConfig, "dtype"), help="of weights and activations")
    group.add_argument(
        "--quantization", choices=choices(EngineConfig, "quantization"),
        help="round the weights of a plain checkpoint to fewer bits",
    )  # fmt: skip
    group.add_argument(
        "--load-format", choices=choices(EngineConfig, "load_format"), help="dummy = random weights, for measuring"
    )
    group.add_argument("--tokenizer", metavar="PATH", help="another tokenizer than the model's own")
    group.add_argument("--max-batch-size", type=positive, metavar="N", help="sequences decoded in one step")
    group.add_argument("--max-num-tokens", type=positive, metavar="N", help="tokens computed in one step")
    group.add_argument("--max-seq-len", type=positive, metavar="N", help="prompt + output of one sequence, in tokens")
    group.add_argument(
        "--kv-cache-free-gpu-memory-fraction", "--free-gpu-memory-fraction", type=float, metavar="F",
        help="share of the free device memory to use for the KV cache (default: 0.9)",
    )  # fmt: skip
    group.add_argument(
        "--kv-cache-dtype",
        choices=choices(KvCacheConfig, "dtype"),
        help="of keys and values; fp8 takes half the memory",
    )
    group.add_argument("--kv-cache-max-tokens", type=positive, metavar="N", help="size of the KV cache in tokens")
    group.add_argument("--no-block-reuse", action="store_true", help="switch the prefix cache off")
    group.add_argument("--no-chunked-prefill", action="store_true", help="compute every prompt in one step")
    group.add_argument("--no-overlap", action="store_true", help="switch the overlap scheduler off")
    group.add_argument(
        "--capacity-policy",
        choices=choices(SchedulerConfig, "capacity_scheduler_policy"),
        help="who runs when the KV cache is short",
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def engine_config(args: argparse.Namespace, base: Mapping[str, Any] | None = None) -> EngineConfig:
    """The settings of the engine: `base` or else the --config file, and the options over it. Raises ConfigError."""
    settings: dict[str, Any] = {"model": args.model}
    for name in (
        "tensor_parallel_size", "pipeline_parallel_size", "pp_partition", "context_parallel_size",
        "moe_expert_parallel_size", "moe_tensor_parallel_size", "dtype", "quantization", "load_format", "tokenizer",
        "max_batch_size", "max_num_tokens", "max_seq_len", "backend",
    ):  # fmt: skip
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    if args.cp_type is not None:
        settings["cp_config"] = {"cp_type": args.cp_type}
    if args.enable_attention_dp:
        settings["enable_attention_dp"] = True
    kv: dict[str, Any] = {}
    if args.kv_cache_free_gpu_memory_fraction is not None:
        kv["free_gpu_memory_fraction"] = args.kv_cache_free_gpu_memory_fraction
    if args.kv_cache_dtype is not None:
        kv["dtype"] = args.kv_cache_dtype
    if args.kv_cache_max_tokens is not None:
        kv["max_tokens"] = args.kv_cache_max_tokens
    if args.no_block_reuse:
        kv["enable_block_reuse"] = False
    if kv:
        settings["kv_cache_config"] = kv
    if args.capacity_policy is not None:
        settings["scheduler_config"] = {"capacity_scheduler_policy": args.capacity_policy}
    if args.no_chunked_prefill:
        settings["enable_chunked_prefill"] = False
    if args.no_overlap:
        settings["disable_overlap_scheduler"] = True
    if base is None:
        base = load_yaml(args.config) if args.config else {}
    return EngineConfig(**merge_settings(base, settings))


def add_sampling_options(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """Options for SamplingParams."""
    group = parser.add_argument_group("sampling (greedy unless one of the first four is given)")
    group.add_argument("-t", "--temperature", type=float, metavar="T", help="0 = greedy, 1 = the model's distribution")
    group.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens that make up P")
    group.add_argument("--min-p", type=float, metavar="P", help="sample from tokens at least P times the likeliest")
    group.add_argument("--seed", type=int, help="the same seed gives the same text")
    group.add_argument(
        "-n", "--max-tokens", type=int, default=max_tokens, metavar="N",
        help="most tokens to generate (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; may be repeated")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1 discourages repeats")
    group.add_argument("--presence-penalty", type=float, metavar="X", help="of tokens that were generated already")
    group.add_argument("--frequency-penalty", type=float, metavar="X", help="the same, for each time")
    group.add_argument("--ignore-eos", action="store_true", help="go on past the model's end token")


def sampling_params_from(args: argparse.Namespace) -> SamplingParams:
    """The sampling options as SamplingParams. Raises ValueError."""
    from jaxllm.sampling_params import SamplingParams

    names = (
        "temperature", "top_k", "top_p", "min_p", "seed", "max_tokens", "stop", "repetition_penalty",
        "presence_penalty", "frequency_penalty", "ignore_eos",
    )  # fmt: skip
    return SamplingParams(**{name: getattr(args, name) for name in names})
