"""/v1/chat/completions: from a checked body to an answer, whole or as a stream of chunks."""

from __future__ import annotations

import json
from typing import Any

from jaxllm.serve.answers import Envelope, chat_logprobs, token_text, usage
from jaxllm.serve.errors import bad_request
from jaxllm.serve.forms import forced_schema
from jaxllm.serve.generation import Delta
from jaxllm.serve.jobs import Job, check_min_tokens
from jaxllm.serve.protocol import ChatRequest
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
        check_min_tokens(params, server)
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
