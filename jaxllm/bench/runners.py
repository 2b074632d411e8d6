"""The libraries a load can be run through: jaxllm, and others beside it on the same prompts and threads."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from jaxllm.bench.load import Load
from jaxllm.config import EngineConfig
from jaxllm.settings import ConfigError, unknown_name_message

if TYPE_CHECKING:
    from jaxllm.llm import LLM


@dataclass(slots=True)
class Run:
    """One load, measured. Seconds; `ttft` and `tpot` are means over the requests, None where not measured."""

    seconds: float
    tokens: list[list[int]]
    ttft: float | None = None
    tpot: float | None = None


class Runner(Protocol):
    """Something that can run a load."""

    name: str
    note: str
    start_seconds: dict[str, float]

    def run(self, load: Load) -> Run: ...


def num_threads() -> int:
    """CPU threads that every library gets: the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class JaxllmRunner:
    """All requests of the load are submitted at once."""

    name = "jaxllm"

    def __init__(self, config: EngineConfig) -> None:
        from jaxllm.llm import LLM

        if config.load_format == "dummy" and config.tokenizer is None:  # often a config.json and nothing else
            config = config.model_copy(update={"skip_tokenizer_init": True})
        started = time.perf_counter()
        self.llm: LLM = LLM.from_config(config)
        self.start_seconds = dict(self.llm.start_report) | {"total": time.perf_counter() - started}
        self.vocab_size: int = self.llm._engine.model_config.vocab_size
        import jax

        self.note = f"{config.tensor_parallel_size} x {jax.devices()[0].device_kind}, dtype {config.dtype}"

    def run(self, load: Load) -> Run:
        from jaxllm.sampling_params import SamplingParams

        params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in load.output_lens]
        started = time.perf_counter()
        outputs = self.llm.generate(load.prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        for output, length in zip(outputs, load.output_lens, strict=True):
            if output.error is not None:
                raise output.error
            if output.outputs[0].length != length:
                raise RuntimeError(f"a request got {output.outputs[0].length} tokens, {length} were asked for")
        tpots = [output.timing.tpot for output in outputs if output.timing.tokens > 1]
        return Run(
            seconds,
            [output.outputs[0].token_ids for output in outputs],
            ttft=statistics.fmean(output.timing.ttft for output in outputs),
            tpot=statistics.fmean(tpots) if tpots else None,
        )

    def close(self) -> None:
        self.llm.shutdown()


class TransformersRunner:
    """transformers + torch in float32: prompts in padded batches in order of arrival, greedy."""

    name = "transformers"

    def __init__(self, model: str, batch_size: int) -> None:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise ConfigError(f"--compare transformers needs {error.name}: pip install torch transformers") from None
        from jaxllm.weights.resolve import resolve_model

        started = time.perf_counter()
        files = resolve_model(model)
        source: dict[str, Any] = {"pretrained_model_name_or_path": str(files.root)}
        if files.kind == "gguf":
            source |= {"pretrained_model_name_or_path": str(files.files[0].parent), "gguf_file": files.files[0].name}
        torch.set_num_threads(num_threads())
        bars_were_on = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()
        try:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
        finally:
            if bars_were_on:
                transformers.utils.logging.enable_progress_bar()
        self.model.generation_config.eos_token_id = None
        self.batch_size = batch_size
        self.start_seconds = {"total": time.perf_counter() - started}
        self.note = f"torch {torch.__version__}, float32, padded batches of {batch_size}"

    def run(self, load: Load) -> Run:
        tokens: list[list[int]] = []
        started = time.perf_counter()
        for first in range(0, len(load.prompts), self.batch_size):
            part = slice(first, first + self.batch_size)
            tokens += self._batch(load.prompts[part], load.output_lens[part])
        return Run(time.perf_counter() - started, tokens)

    def _batch(self, prompts: list[list[int]], output_lens: list[int]) -> list[list[int]]:
        import torch

        width, steps = max(map(len, prompts)), max(output_lens)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, use_cache=True, pad_token_id=0
            )
        return [row[width : width + length].tolist() for row, length in zip(out, output_lens, strict=True)]


class LlamaCppRunner:
    """llama.cpp through llama-cpp-python, one request after the other, on the weights as the GGUF file has them."""

    name = "llama.cpp"

    def __init__(self, model: str, context: int) -> None:
        try:
            import llama_cpp
        except ImportError:
            raise ConfigError("--compare llama.cpp needs llama_cpp: pip install llama-cpp-python") from None
        from jaxllm.weights.resolve import resolve_model

        started = time.perf_counter()
        files = resolve_model(model)
        if files.kind != "gguf":
            raise ConfigError(f"--compare llama.cpp needs a .gguf file, and {model!r} is none; leave llama.cpp out")
        threads = num_threads()
        self.llama = llama_cpp.Llama(
            str(files.files[0]), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self.start_seconds = {"total": time.perf_counter() - started}
        self.note = f"llama-cpp-python {llama_cpp.__version__}, weights of the file (quantised), one request at a time"

    def run(self, load: Load) -> Run:
        tokens: list[list[int]] = []
        started = time.perf_counter()
        for prompt, length in zip(load.prompts, load.output_lens, strict=True):
            self.llama.reset()
            stream = self.llama.generate(prompt, temp=0.0, repeat_penalty=1.0)
            tokens.append([next(stream) for _ in range(length)])
        return Run(time.perf_counter() - started, tokens)


COMPARABLE = ("transformers", "llama.cpp")


def check_names(names: list[str]) -> None:
    """Raise ConfigError for a library that there is no runner for."""
    for name in names:
        if name not in COMPARABLE:
            raise ConfigError(unknown_name_message(name, COMPARABLE, "library in --compare"))


def make_peers(names: list[str], model: str, *, batch_size: int, context: int) -> list[Runner]:
    """Runners for the libraries named. Raises ConfigError when one is unknown or not installed."""
    check_names(names)
    peers: list[Runner] = []
    for name in names:
        peers.append(
            TransformersRunner(model, batch_size) if name == "transformers" else LlamaCppRunner(model, context)
        )
    return peers
