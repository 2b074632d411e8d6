"""LLM: the Python API. Turns prompts into requests, hands them to the engine, and gives back RequestOutputs."""

from __future__ import annotations

import itertools
import logging
import os
import queue
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from jaxllm import interrupts
from jaxllm.config import EngineConfig
from jaxllm.engine.request import Request
from jaxllm.outputs import GenerationResult, RequestOutput
from jaxllm.prompts import NO_TOKENIZER, Message, Prompt, RequestError, as_batch, check_messages, one_each
from jaxllm.requests import make_request
from jaxllm.sampling_params import SamplingParams
from jaxllm.settings import ConfigError

if TYPE_CHECKING:
    from jaxllm.engine.engine import Engine
    from jaxllm.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class LLM:
    """A model ready to generate.

    Args:
        model: directory with a checkpoint, .gguf file, hub id, or "smollm2-135m".
        tokenizer: directory or hub id of another tokenizer than the model's own.
        tokenizer_mode: "auto" (the only one; fast tokenizers are always used where they exist).
        skip_tokenizer_init: load no tokenizer; prompts must be token ids, outputs have no text.
        trust_remote_code: must be False.
        tensor_parallel_size: devices to split the model over.
        dtype: "auto", "float32" or "bfloat16".
        revision, tokenizer_revision: must be None.
        **kwargs: every other field of `jaxllm.config.EngineConfig`.

    Raises:
        ConfigError: a setting is unknown, wrong or contradicts another (a ValueError, before anything is loaded).
        ValueError: the checkpoint or the tokenizer cannot be used.

    Use it as a context manager, or call `shutdown()`, to free the devices at a known time.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        tokenizer: str | os.PathLike[str] | None = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        if tokenizer_mode != "auto":
            raise ConfigError(f"tokenizer_mode = {tokenizer_mode!r} is not supported; leave it out")
        settings: dict[str, Any] = {
            "model": model,
            "tokenizer": tokenizer,
            "skip_tokenizer_init": skip_tokenizer_init,
            "trust_remote_code": trust_remote_code,
            "tensor_parallel_size": tensor_parallel_size,
            "dtype": dtype,
            "revision": revision,
            "tokenizer_revision": tokenizer_revision,
        }
        self._start(EngineConfig(**settings, **kwargs))

    @classmethod
    def from_config(cls, config: EngineConfig) -> LLM:
        """An LLM for settings made elsewhere, for example by `EngineConfig.from_yaml`."""
        llm = cls.__new__(cls)
        llm._start(config)
        return llm

    def _start(self, config: EngineConfig) -> None:
        self.config = config
        self._engine = _start_engine(config)
        self._request_ids = itertools.count()
        # Runs at exit too, so that a script that forgets shutdown() leaves no device memory or thread behind.
        self._finalizer = weakref.finalize(self, self._engine.shutdown)

    # ---- what it is ---------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ValueError when there is none (`skip_tokenizer_init=True`)."""
        if self._engine.tokenizer is None:
            raise RequestError(NO_TOKENIZER)
        return self._engine.tokenizer

    @property
    def start_report(self) -> dict[str, float]:
        """Seconds that each phase of the start took."""
        return self._engine.start_report

    def get_stats(self) -> dict[str, Any]:
        """Counters of the engine: steps, tokens, cache hits, host time per step, ..."""
        return self._engine.stats()

    def shutdown(self) -> None:
        """Stop the engine and free the devices. Requests still running are cancelled; calling it again is harmless."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    # ---- generation ---------------------------------------------------------------------------------------------

    def generate(
        self,
        inputs: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        use_tqdm: bool = True,
        *,
        priority: float | Sequence[float] = 0.5,
        cache_salt: str | None = None,
    ) -> Any:
        """Generate for one prompt or many, and wait for all of them.

        Args:
            inputs: a prompt, or a list of prompts. A prompt is a str, a list of token ids,
                {"prompt": str} or {"prompt_token_ids": [...]}.
            sampling_params: one for all, or a list with one for each prompt; None = greedy to the end of the context.
            use_tqdm: show a progress bar with input and output tokens per second.
            priority: higher runs first when `scheduler_config.waiting_queue_policy` is "priority"; one, or a list.
            cache_salt: prompts share cached pages only with prompts of the same salt.

        Returns:
            One RequestOutput for a single prompt, a list in the order of the prompts for a list.

        Raises:
            ValueError: the only prompt is bad. In a list a bad prompt fails alone: its output has `.error` set and
                finish_reason "error".
            RuntimeError: the engine died or was shut down.
        """
        self._check_running()
        prompts, single = as_batch(inputs)
        many_params = one_each(sampling_params, len(prompts), "sampling_params")
        priorities = one_each(priority, len(prompts), "priority")
        results: list[RequestOutput] = []
        try:
            prepared = [
                self._prepare(prompt, params, item_priority, cache_salt, keep_errors=not single)
                for prompt, params, item_priority in zip(prompts, many_params, priorities, strict=True)
            ]
            for result, request in prepared:
                results.append(result)
                if request is not None:
                    self._submit(result, request, keep_errors=not single)
            self._wait_for_all(results, use_tqdm)
        except BaseException:  # KeyboardInterrupt above all: nobody will ask for these results any more
            for result in results:
                result.abort()
            raise
        if single:
            return results[0].result()
        failed = [result for result in results if result.error is not None]
        if failed:
            logger.warning("%d of %d requests failed, the first with: %s", len(failed), len(results), failed[0].error)
        return results

    def generate_async(
        self,
        inputs: Prompt,
        sampling_params: SamplingParams | None = None,
        streaming: bool = False,
        *,
        priority: float = 0.5,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        """Submit one prompt and return at once.

        The returned object is a future (`result(timeout)`, `await`), an iterator (`for`, `async for`: each step of
        progress with `streaming=True`, else once at the end) and can be stopped by `abort()`.

        Raises:
            ValueError: the prompt or the parameters are bad.
            RuntimeError: the engine died or was shut down.
        """
        prompts, single = as_batch(inputs)
        if not single:
            raise RequestError(f"generate_async takes one prompt, not a list of {len(prompts)}; call it once for each")
        self._check_running()
        result, request = make_request(
            self._engine,
            next(self._request_ids),
            prompts[0],
            sampling_params,
            priority=priority,
            cache_salt=cache_salt,
            streaming=streaming,
        )
        self._submit(result, request, keep_errors=False)
        return result

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer one conversation, or a list of them, through the model's chat template.

        Args:
            messages: [{"role": "user", "content": "Hi"}, ...], or a list of such lists.
            add_generation_prompt: end with the header of the assistant's turn.
            tools, chat_template_kwargs: passed to the template.

        Other arguments, results and errors are those of `generate`.
        """
        if not messages:
            raise RequestError("messages is empty; give at least one {'role': 'user', 'content': ...}")
        if isinstance(messages, str | Mapping):
            check_messages(messages)
        single = isinstance(messages[0], Mapping)
        conversations = [messages] if single else messages
        prompts = [
            {
                "prompt_token_ids": self.chat_prompt(
                    cast(Sequence[Message], conversation), add_generation_prompt, tools, chat_template_kwargs
                )
            }
            for conversation in conversations
        ]
        return self.generate(prompts[0] if single else prompts, sampling_params, use_tqdm)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids that the model's chat template makes of a conversation. Raises ValueError for bad messages."""
        check_messages(messages)
        rendered = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            **(chat_template_kwargs or {}),
        )
        # A template writes the special tokens itself.
        return self.tokenizer.encode(rendered, add_special_tokens=False) if isinstance(rendered, str) else rendered

    # ---- one request --------------------------------------------------------------------------------------------

    def _prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        priority: float,
        cache_salt: str | None,
        *,
        keep_errors: bool,
    ) -> tuple[RequestOutput, Request | None]:
        """The result and the engine's request for one prompt; with `keep_errors` a bad prompt gives (failed, None)."""
        request_id = next(self._request_ids)
        try:
            return make_request(
                self._engine, request_id, prompt, params, priority=priority, cache_salt=cache_salt, streaming=False
            )
        except ValueError as error:
            if not keep_errors:
                raise
            text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
            return RequestOutput.failed(request_id, text if isinstance(text, str) else None, [], error), None

    def _check_running(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("this LLM was shut down; make a new one")

    def _submit(self, result: RequestOutput, request: Request, *, keep_errors: bool) -> None:
        result.timing.submitted = time.perf_counter()
        try:
            self._engine.submit(request)
        except ValueError as error:
            if not keep_errors:
                raise
            result._fail(error)

    def _wait_for_all(self, results: list[RequestOutput], use_tqdm: bool) -> None:
        """Wait until all have ended. What is not the fault of a request (no ValueError) is raised."""
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        ended: queue.SimpleQueue[GenerationResult] = queue.SimpleQueue()
        for result in results:
            result.add_done_callback(ended.put)
        started = time.perf_counter()
        tokens_in = tokens_out = 0
        with tqdm(total=len(results), desc="Generating", unit=" requests", disable=not use_tqdm) as bar:
            for _ in results:
                result = cast(RequestOutput, ended.get())
                result.wait()  # has ended: makes its text here while the others go on
                if result.error is not None and not isinstance(result.error, ValueError):
                    raise result.error
                tokens_in += len(result.prompt_token_ids)
                tokens_out += result.timing.tokens
                seconds = max(time.perf_counter() - started, 1e-9)
                bar.set_postfix_str(
                    f"in {tokens_in / seconds:.0f} tok/s, out {tokens_out / seconds:.0f} tok/s", refresh=False
                )
                bar.update()


def _start_engine(config: EngineConfig) -> Engine:
    from jaxllm.engine.devices import look_early

    look_early()
    from jaxllm.engine.engine import Engine  # imports jax: not before there is something to start

    interrupts.raise_if_seen()
    return Engine(config)
