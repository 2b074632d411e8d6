"""Answers and chunks are what OpenAI's published schema says, as its client's models have it, checked strictly."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.serve.live import Live

pytestmark = pytest.mark.timeout(300)

NO_ARGUMENTS = {"type": "object", "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": NO_ARGUMENTS}}]
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "temperature": 1.0}
CHATS: list[dict[str, Any]] = [
    {},
    {"n": 2, "logprobs": True, "top_logprobs": 2},
    {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
    {"tools": TOOLS, "tool_choice": "required", "max_tokens": 40},
    {"response_format": {"type": "json_object"}},
]


def stream_of(live: Live, path: str, body: dict[str, Any]) -> list[str]:
    with live.http.stream("POST", path, json={**body, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    return [line for line in lines if line != "[DONE]"]


@pytest.mark.parametrize("more", CHATS)
def test_chats(live: Live, more: dict[str, Any]) -> None:
    body = {**CHAT, **more}
    answer = live.post("/v1/chat/completions", body)
    TypeAdapter(ChatCompletion).validate_json(answer.content, strict=True)
    options = {"include_usage": True}
    chunks = stream_of(live, "/v1/chat/completions", {**body, "stream_options": options})
    assert len(chunks) > 2
    for chunk in chunks:
        TypeAdapter(ChatCompletionChunk).validate_json(chunk, strict=True)


def test_completions_and_models(live: Live) -> None:
    for more in ({}, {"logprobs": 2, "n": 2}, {"echo": True, "logprobs": 0}):
        answer = live.post("/v1/completions", {"prompt": "The cat", "max_tokens": 4, "ignore_eos": True, **more})
        found = answer.json()
        logprobs = [choice["logprobs"] for choice in found["choices"] if choice["logprobs"]]
        for one in logprobs:  # the client's model knows no null, which echo has for the first token
            if more.get("echo"):
                assert one["token_logprobs"].pop(0) is None and one["top_logprobs"].pop(0) is None
        TypeAdapter(Completion).validate_python(found, strict=True)
    TypeAdapter(Model).validate_json(live.get("/v1/models/tiny").content, strict=True)


def test_responses(live: Live) -> None:
    tool = {"type": "function", "name": "f", "strict": True, "parameters": {"type": "object", "properties": {}}}
    for more in ({}, {"top_logprobs": 2}, {"tools": [tool], "tool_choice": {"type": "function", "name": "f"}},
                 {"text": {"format": {"type": "json_object"}}}):  # fmt: skip
        body = {"input": "Hi", "max_output_tokens": 5, **more}
        TypeAdapter(Response).validate_json(live.post("/v1/responses", body).content, strict=True)
        events = stream_of(live, "/v1/responses", body)
        assert len(events) > 4
        for event in events:
            TypeAdapter(ResponseStreamEvent).validate_json(event, strict=True)
