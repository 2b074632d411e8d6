"""/v1/completions and /v1/chat/completions: from a checked body to an answer, whole or as a stream of chunks."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from jaxllm.serve.answers import CompletionLogprobs, Envelope, chat_logprobs, merged, sse, token_text, usage
from jaxllm.serve.errors import bad_request
from jaxllm.serve.forms import forced_schema
from jaxllm.serve.generation import Delta, Generation
from jaxllm.serve.protocol import DEFAULT_COMPLETION_TOKENS, ChatRequest, CompletionRequest, Generate
from jaxllm.serve.server import Server
from jaxllm.serve.speech import (
    Caller,
    ChosenCalls,
    ForcedCalls,
    NamedCall,
    ReasoningText,
    ReasoningTokens,
    Speech,
    Spoken,
)
from jaxllm.serve.tools import ToolText


class Job(ABC):
    """One request: `start` submits it; then either `whole` or `chunks`; `close` whatever happens."""

    envelope: Envelope
    chunk_kind: str

    def __init__(self, server: Server, body: Generate) -> None:
        self.server = server
        self.body = body
        self.n = body.n or 1
        self.generations: list[Generation] = []

    @abstractmethod
    async def start(self) -> None:
        """Tokenises and submits. Raises ApiError."""

    @abstractmethod
    def usage(self) -> dict[str, Any]:
        """Token counts so far."""

    @abstractmethod
    async def whole(self) -> dict[str, Any]:
        """The finished answer. Raises what `Generation.deltas` does."""

    @abstractmethod
    def opening(self, number: int) -> list[dict[str, Any]]:
        """Choices to send before the first news of a generation."""

    @abstractmethod
    def choice(self, number: int, delta: Delta) -> dict[str, Any]:
        """A chunk's choice."""

    def close(self) -> None:
        for generation in self.generations:
            generation.close()

    async def chunks(self) -> AsyncIterator[bytes]:
        """Events of the stream as they go over the line; nothing is yielded before the engine took the request."""
        options = self.body.stream_options
        wants_usage = options is not None and bool(options.include_usage or options.continuous_usage_stats)
        everywhere = options is not None and bool(options.continuous_usage_stats)
        self.envelope.kind = self.chunk_kind
        opened: set[int] = set()
        async for number, deltas in merged(self.generations):
            choices = [self.choice(number, delta) for delta in deltas]
            if number not in opened:
                opened.add(number)
                first = self.opening(number)
                if self.body.return_token_ids and first:
                    first[0]["prompt_token_ids"] = self.generations[number].prompt
                choices = first + choices
            more: dict[str, Any] = {"usage": self.usage() if everywhere else None} if wants_usage else {}
            yield b"".join([sse(self.envelope.wrap([choice], **more)) for choice in choices])
        if wants_usage:
            yield sse(self.envelope.wrap([], usage=self.usage()))
        yield b"data: [DONE]\n\n"

    def failure(self, body: dict[str, Any]) -> bytes:
        """The events with which a stream ends that failed; clients look for an error among them."""
        return sse(body) + b"data: [DONE]\n\n"

    async def _collect(self) -> list[list[_Whole]]:
        """Everything that was generated, by generation and sequence."""
        found = [[_Whole() for _ in range(self.n)] for _ in self.generations]
        async for number, deltas in merged(self.generations):
            for delta in deltas:
                found[number][delta.index].add(delta)
        return found


class _Whole:
    """A finished sequence."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.tokens: list[int] = []
        self.rows: list[list[Any]] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.tokens += delta.tokens
        self.rows += delta.logprobs or []
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason

    @property
    def text(self) -> str:
        return "".join(self.texts)


_PROMPT_END_TOKENS = 16  # enough to see whether a template has begun, or ended, the model's reasoning


class ChatJob(Job):
    """A chat completion."""

    _reasons = False  # the answer begins with reasoning

    chunk_kind = "chat.completion.chunk"

    def __init__(self, server: Server, body: ChatRequest) -> None:
        super().__init__(server, body)
        self.chat = body
        self.envelope = Envelope("chat.completion", "chatcmpl", server.model)
        self._speech: list[Speech] = []

    async def start(self) -> None:
        body, server = self.chat, self.server
        params = body.engine_params()
        if body.forces_calls:
            schema = forced_schema(body.tools or [], body.tool_choice or "", body.parallel_tool_calls is not False)
            params["structured_outputs"] = {"json": json.dumps(schema)}
        elif body.tool_names and server.tool_parser is None:
            raise bad_request("this model's chat template tells of no tools; serve it with --tool_parser", "tools")
        if body.logprobs:
            params["logprobs"] = body.top_logprobs or 0
        prompt = body.prompt_token_ids
        if prompt is None:
            generation_prompt = body.add_generation_prompt is not False
            tools = body.tools if body.tool_names else None
            prompt = await server.chat_tokens(body.conversation, generation_prompt, body.template_kwargs, tools)
        if body.truncate_prompt_tokens is None:
            server.check_length(prompt, body.token_limit, "messages")
        if body.token_limit is not None:
            params["max_tokens"] = body.token_limit
        _check_min_tokens(params)
        self._speech = [self._new_speech(prompt) for _ in range(self.n)]
        if "structured_outputs" in params and self._reasons and server.end_think_id is not None:
            params["structured_outputs"]["begin_after"] = server.end_think_id
        # The marks of a call are special tokens in some vocabularies.
        special = bool(body.tool_names) and not body.forces_calls
        self.generations = [server.submit(body, prompt, params, False if special else None)]

    def _new_speech(self, prompt: list[int]) -> Speech:
        body, server = self.chat, self.server
        reasoning, caller, counter = None, None, None
        if server.reasoning_parser is not None:
            end = server.tokenizer.decode(prompt[-_PROMPT_END_TOKENS:], skip_special_tokens=False)
            reasoning = ReasoningText(server.reasoning_parser, end)
            self._reasons = not reasoning.is_over
            counter = ReasoningTokens(lambda token: token_text(server.tokenizer, token)[0]) if self._reasons else None
        if body.forces_calls:
            caller = self._forced()
        elif body.tool_names and server.tool_parser is not None:
            caller = ChosenCalls(ToolText(server.tool_parser, body.tool_names))
        return Speech(reasoning, caller, counter)

    def _forced(self) -> Caller:
        choice = self.chat.tool_choice
        return NamedCall(choice["function"]["name"]) if isinstance(choice, dict) else ForcedCalls()

    def usage(self) -> dict[str, Any]:
        reasoning = sum(one.reasoning_tokens for one in self._speech)
        return {**usage(self.generations), "completion_tokens_details": {"reasoning_tokens": reasoning}}

    def _logprobs(self, tokens: list[int], rows: list[list[Any]] | None) -> dict[str, Any] | None:
        if not self.chat.logprobs:
            return None
        return chat_logprobs(self.server.tokenizer, tokens, rows or [], self.chat.top_logprobs or 0)

    def opening(self, number: int) -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            for index in range(self.n)
        ]

    def feed(self, delta: Delta) -> Spoken:
        """What a delta says."""
        spoken = self._speech[delta.index].feed(delta.text, delta.finish_reason, delta.tokens)
        if self.chat.include_reasoning is False:
            spoken.reasoning = ""
        return spoken

    def logprobs_of(self, delta: Delta) -> list[dict[str, Any]]:
        """Entries for the tokens of a delta; none where they were not asked for."""
        found = self._logprobs(delta.tokens, delta.logprobs) if delta.tokens else None
        return [] if found is None else list(found["content"])

    def choice(self, number: int, delta: Delta) -> dict[str, Any]:
        spoken = self.feed(delta)
        reason = spoken.reason
        content: dict[str, Any] = {"content": spoken.text} if spoken.text or reason is None else {}
        if spoken.reasoning:
            content = {"reasoning_content": spoken.reasoning, **({"content": spoken.text} if spoken.text else {})}
        if spoken.calls:
            content["tool_calls"] = spoken.calls
        logprobs = self._logprobs(delta.tokens, delta.logprobs) if delta.tokens else None
        choice = {
            "index": delta.index, "delta": content, "logprobs": logprobs, "finish_reason": reason
        }  # fmt: skip
        if delta.stop_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self.body.return_token_ids:
            choice["token_ids"] = delta.tokens
        return choice

    async def whole(self) -> dict[str, Any]:
        choices = []
        for index, found in enumerate((await self._collect())[0]):
            spoken = self._speech[index].feed(found.text, found.finish_reason, found.tokens)
            message: dict[str, Any] = {"role": "assistant", "content": spoken.text, "refusal": None}
            if spoken.reasoning and self.chat.include_reasoning is not False:
                message["reasoning_content"] = spoken.reasoning
            if spoken.calls:
                calls = [{name: value for name, value in call.items() if name != "index"} for call in spoken.calls]
                message |= {"content": spoken.text or None, "tool_calls": calls}
            choice = {
                "index": index,
                "message": message,
                "logprobs": self._logprobs(found.tokens, found.rows),
                "finish_reason": spoken.reason,
                "stop_reason": found.stop_reason,
            }
            if self.body.return_token_ids:
                choice["token_ids"] = found.tokens
            choices.append(choice)
        more = {"prompt_token_ids": self.generations[0].prompt} if self.body.return_token_ids else {}
        return self.envelope.wrap(choices, usage=self.usage(), **more)


class CompletionJob(Job):
    """A completion of one prompt or many."""

    chunk_kind = "text_completion"

    def __init__(self, server: Server, body: CompletionRequest) -> None:
        super().__init__(server, body)
        self.completion = body
        self.envelope = Envelope("text_completion", "cmpl", server.model)
        self._texts: list[str] = []
        self._logprobs: dict[int, CompletionLogprobs] = {}
        # max_tokens 0 with echo asks for the prompt's logprobs only; the engine always samples one token.
        self._drop = body.max_tokens == 0

    async def start(self) -> None:
        body, server = self.completion, self.server
        if self._drop and not body.echo:
            raise bad_request("max_tokens = 0 makes sense with echo = true only", "max_tokens")
        params = body.engine_params()
        params["max_tokens"] = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
        if body.logprobs is not None:
            params["logprobs"] = body.logprobs
            if body.echo:
                params["prompt_logprobs"] = body.logprobs
        _check_min_tokens(params)
        prompts = []
        for given in body.prompts():
            if isinstance(given, str):
                prompt = await server.encode(given, body.add_special_tokens is not False)
            else:
                prompt = given
            if body.truncate_prompt_tokens is None:
                server.check_length(prompt, body.max_tokens, "prompt")
            prompts.append(prompt)
            self._texts.append(given if isinstance(given, str) else "")
        if body.echo:
            for number, prompt in enumerate(prompts):
                if not self._texts[number] or body.truncate_prompt_tokens is not None:
                    kept = prompt if body.truncate_prompt_tokens is None else prompt[-body.truncate_prompt_tokens :]
                    self._texts[number] = server.tokenizer.decode(kept, body.skip_special_tokens is not False)
        for prompt in prompts:
            self.generations.append(server.submit(body, prompt, params))

    def usage(self) -> dict[str, Any]:
        return usage(self.generations, len(self.generations) * self.n if self._drop else 0)

    def _index(self, number: int, index: int) -> int:
        return number * self.n + index

    def _make_logprobs(self, index: int, tokens: list[int], rows: list[Any] | None) -> dict[str, Any] | None:
        if self.completion.logprobs is None:
            return None
        if index not in self._logprobs:
            self._logprobs[index] = CompletionLogprobs(self.server.tokenizer, self.completion.logprobs)
        return self._logprobs[index].make(tokens, rows or [])

    def opening(self, number: int) -> list[dict[str, Any]]:
        if not self.completion.echo:
            return []
        generation = self.generations[number]
        choices = []
        for index in range(self.n):
            where = self._index(number, index)
            rows = generation.prompt_logprobs
            choices.append({
                "index": where,
                "text": self._texts[number],
                "logprobs": None if rows is None else self._make_logprobs(where, generation.prompt, rows),
                "finish_reason": None,
            })  # fmt: skip
        return choices

    def choice(self, number: int, delta: Delta) -> dict[str, Any]:
        where = self._index(number, delta.index)
        tokens, rows = ([], []) if self._drop else (delta.tokens, delta.logprobs)
        choice: dict[str, Any] = {
            "index": where,
            "text": "" if self._drop else delta.text,
            "logprobs": self._make_logprobs(where, tokens, rows) if tokens else None,
            "finish_reason": "length" if self._drop and delta.finish_reason else delta.finish_reason,
        }
        if delta.stop_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self.body.return_token_ids:
            choice["token_ids"] = tokens
        return choice

    async def whole(self) -> dict[str, Any]:
        choices = []
        for number, sequences in enumerate(await self._collect()):
            generation = self.generations[number]
            for index, found in enumerate(sequences):
                tokens, rows, text = found.tokens, list[Any](found.rows), found.text
                if self._drop:
                    tokens, rows, text, found.finish_reason = [], [], "", "length"
                out_tokens = tokens
                if self.completion.echo:
                    text = self._texts[number] + text
                    tokens, rows = generation.prompt + tokens, (generation.prompt_logprobs or []) + rows
                where = self._index(number, index)
                choice = {
                    "index": where,
                    "text": text,
                    "logprobs": self._make_logprobs(where, tokens, rows),
                    "finish_reason": found.finish_reason,
                    "stop_reason": found.stop_reason,
                }
                if self.body.return_token_ids:
                    choice |= {"token_ids": out_tokens, "prompt_token_ids": generation.prompt}
                choices.append(choice)
        return self.envelope.wrap(choices, usage=self.usage())


def _check_min_tokens(params: dict[str, Any]) -> None:
    most, least = params.get("max_tokens"), params.get("min_tokens")
    if most is not None and least is not None and least > most:
        raise bad_request(f"min_tokens = {least} is more than max_tokens = {most}", "min_tokens")
