"""What the routes of a frontend share: the tokenizer, the engine, the settings; and how a prompt is submitted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from jaxllm.engine.tokenizer import Tokenizer
from jaxllm.serve.client import EngineClient, EngineFailedError
from jaxllm.serve.errors import ApiError, bad_request, unavailable
from jaxllm.serve.generation import Generation, Output, TextOptions
from jaxllm.serve.metrics import Metrics
from jaxllm.serve.protocol import Generate
from jaxllm.serve.settings import ServeConfig
from jaxllm.serve.speech import END_THINK, choose_reasoning
from jaxllm.serve.store import ResponseStore
from jaxllm.serve.tools import choose_parser
from jaxllm.serve.tracing import Tracer

_INLINE_CHARACTERS = 4096  # a longer text is tokenised in a thread, or other requests would wait for it


@dataclass
class Server:
    """A frontend's state.

    Attributes:
        names: of the model; the first is the one that answers carry.
        draining: no new work is taken, because the server is about to end.
        in_flight: requests for work that were taken and not answered yet.
    """

    settings: ServeConfig
    names: list[str]
    tokenizer: Tokenizer
    client: EngineClient
    metrics: Metrics
    store: ResponseStore
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    in_flight: int = 0
    tracer: Tracer | None = None
    _behind: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        vocabulary = self.tokenizer.backend.get_vocab(with_added_tokens=True)
        self.tool_parser = choose_parser(self.settings.tool_parser, self.tokenizer.chat_template)
        self.reasoning_parser = choose_reasoning(self.settings.reasoning_parser, self.tokenizer.chat_template)
        self.end_think_id: int | None = vocabulary.get(END_THINK)
        self._longest_token = max(map(len, vocabulary), default=1)

    @property
    def model(self) -> str:
        return self.names[0]

    def run_behind(self, work: Coroutine[Any, Any, None]) -> None:
        """Goes on with work after its request was answered; the server drains it like a request."""

        async def counted() -> None:
            self.in_flight += 1
            try:
                await work
            finally:
                self.in_flight -= 1

        task = asyncio.create_task(counted())
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)

    def health(self) -> str | None:
        """What is wrong; None when requests are served."""
        client, limit = self.client, self.settings.health_timeout
        if self.draining:
            return "the server is shutting down"
        if client.death is not None:
            return f"the engine died: {client.death}"
        if client.hello is None:
            return "the engine is gone" if client.was_connected else "the engine is starting"
        if client.seconds_silent > limit:
            return f"the engine's step loop has been silent for {client.seconds_silent:.1f} s (limit {limit:g} s)"
        return None

    def check_model(self, name: str | None) -> None:
        """ApiError 404 for another model than the one that is served."""
        if name is not None and name not in self.names:
            text = name if len(name) <= 80 else name[:77] + "..."
            raise ApiError(404, f"The model `{text}` does not exist.", param="model", code="model_not_found")

    @property
    def hello(self) -> dict[str, Any]:
        """What the engine is. Raises ApiError 503 while there is none."""
        hello = self.client.hello
        if hello is None:
            starting = not self.client.was_connected
            message = "the engine is starting" if starting else "the engine is not running"
            raise unavailable(message, "engine_not_running", retry=5)
        return hello

    async def encode(self, text: str, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        """Token ids of a text. Raises ApiError when it cannot fit the context: that is told before it is tokenised."""
        longest = self._longest_token * self.hello["max_seq_len"]
        if len(text) > longest:
            raise bad_request(
                f"the text has {len(text)} characters, more than the {longest} that {self.hello['max_seq_len']} "
                "tokens can have; shorten it",
                param,
                "context_length_exceeded",
            )
        try:
            if len(text) <= _INLINE_CHARACTERS:
                return self.tokenizer.encode(text, add_special_tokens)
            return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)
        except ValueError as error:
            raise bad_request(str(error), param) from None

    async def chat_tokens(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        kwargs: dict[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids that the model's template makes of a conversation. Raises ApiError when it refuses it."""

        def render() -> Any:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt, tools, tokenize=False, **given)

        given = {name: value for name, value in (kwargs or {}).items() if name not in _TEMPLATE_ARGUMENTS}
        try:
            text = await asyncio.to_thread(render)
        except ValueError as error:
            raise bad_request(str(error), "messages") from None
        return await self.encode(text, add_special_tokens=False, param="messages")

    def check_length(self, prompt: list[int], wanted: int | None, param: str) -> None:
        """ApiError when the prompt and the tokens that it asks for do not fit the context."""
        limit = self.hello["max_seq_len"]
        if len(prompt) + (wanted or 1) <= limit:
            return
        asked = "" if wanted is None else f" and {wanted} are asked for"
        raise bad_request(
            f"This model's maximum context length is {limit} tokens. The prompt has {len(prompt)} tokens{asked}. "
            "Please shorten the prompt or ask for fewer tokens.",
            param,
            "context_length_exceeded",
        )

    def submit(
        self, body: Generate, prompt: list[int], params: dict[str, Any], skip_special_tokens: bool | None = None
    ) -> Generation:
        """Sends a prompt to the engine; the text has no special tokens unless the body wants them. Raises ApiError."""
        if skip_special_tokens is None:
            skip_special_tokens = body.skip_special_tokens is not False
        vocabulary = self.hello["vocab_size"]
        if not prompt:
            raise bad_request("the prompt is empty; give at least one token", "prompt")
        if max(prompt) >= vocabulary:
            raise bad_request(f"prompt token {max(prompt)} is not in the vocabulary of {vocabulary}", "prompt")
        if body.truncate_prompt_tokens is not None:
            prompt = prompt[-body.truncate_prompt_tokens :]
        stops = body.stops
        options = TextOptions(stops, bool(body.include_stop_str_in_output), skip_special_tokens, body.min_tokens or 0)
        n = params["n"]
        try:
            call = self.client.submit(
                prompt,
                params,
                n=n,
                priority=0.5 if body.priority is None else body.priority,
                salt=body.cache_salt,
                # Stop strings are looked for here, so every token is needed at once.
                stream=bool(body.stream or stops),
            )
        except EngineFailedError as error:
            raise unavailable(str(error), "engine_not_running", retry=5) from None
        outputs = [Output(index, self.tokenizer, options) for index in range(n)]
        limit = self.settings.request_timeout
        deadline = None if limit is None else asyncio.get_running_loop().time() + limit
        return Generation(call, prompt, outputs, self.metrics, deadline, limit or 0.0)


_TEMPLATE_ARGUMENTS = frozenset(
    {"messages", "tools", "add_generation_prompt", "tokenize", "chat_template", "conversation", "documents"}
    | {"bos_token", "eos_token", "return_tensors", "return_dict", "padding", "truncation", "max_length"}
    | {"continue_final_message", "return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs"}
)
