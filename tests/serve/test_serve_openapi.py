"""The document at /openapi.json says what the server takes: the same bodies are right, and wrong, for both."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel

from jaxllm.serve.errors import ApiError
from jaxllm.serve.openapi import openapi
from jaxllm.serve.openapi_bodies import number_pattern
from jaxllm.serve.parsing import parse_json, validate
from jaxllm.serve.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from jaxllm.serve.responses_request import ResponsesRequest

VOCAB, CONTEXT = 203, 64
DOCUMENT = openapi(VOCAB, CONTEXT, guarded=True)
HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
CALL: dict[str, Any] = {"function": {"name": "f", "arguments": "{}"}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
FORM: dict[str, Any] = {"type": "json_schema", "json_schema": {"schema": {}}}


def taken(model: type[BaseModel], body: dict[str, Any]) -> bool:
    """Whether the server takes a body, as far as neither a tokenizer nor an engine is asked."""
    try:
        found: Any = validate(model, parse_json(json.dumps(body).encode()))
        if isinstance(found, ResponsesRequest):
            found = validate(ChatRequest, found.to_chat([]))
        if isinstance(found, CompletionRequest):
            found.prompts()
        if not isinstance(found, TokenizeRequest):
            found.engine_params()
    except ApiError:
        return False
    return True


def described(model: type[BaseModel], body: dict[str, Any]) -> bool:
    """Whether the document has such a body."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}", "components": DOCUMENT["components"]}
    return bool(jsonschema.Draft202012Validator(schema).is_valid(body))


@pytest.mark.parametrize(
    ("model", "good", "bad"),
    [
        (
            CompletionRequest,
            [{"prompt": "x"}, {"prompt": [1, 2]}, {"prompt": [[1], [2.0]]}, {"prompt": ["x", "y"]},
             {"prompt_token_ids": [1]}, {"prompt": None, "prompt_token_ids": [1]}, {"prompt": "x", "n": 2.0},
             {"prompt": "x", "max_tokens": 0, "echo": True}, {"prompt": "x", "logit_bias": {"202": -100, "007": 1}},
             {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}}],
            [{}, {"prompt": None}, {"prompt": []}, {"prompt": [[]]}, {"prompt": ["x"] * 1025},
             {"prompt": "x", "n": 1.5}, {"prompt": "x", "logit_bias": {"x": 1}}, {"prompt": "x", "temperature": 3},
             {"prompt": "x", "logit_bias": {"1": 101}}, {"prompt": "x", "stream_options": {}}],
        ),
        (
            ChatRequest,
            [{"messages": HI}, {"prompt_token_ids": [5]}, {"messages": [], "prompt_token_ids": [5]},
             {"messages": [{"role": "assistant", "tool_calls": [CALL]}]},
             {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
             {"messages": HI, "tools": [TOOL], "tool_choice": "required"},
             {"messages": HI, "tools": [TOOL], "tool_choice": TOOL}, {"messages": HI, "response_format": FORM},
             {"messages": HI, "structured_outputs": {"choice": ["a"]}}, {"messages": HI, "logprobs": True,
             "top_logprobs": 2}, {"messages": HI, "reasoning_effort": "low"}],
            [{}, {"messages": []}, {"messages": [{"role": "user"}]}, {"messages": [{"role": "me", "content": ""}]},
             {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
             {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}]},
             {"messages": HI, "tool_choice": "auto"}, {"messages": HI, "tools": [{**TOOL, "type": "f"}]},
             {"messages": HI, "tools": [{"type": "function", "function": {"name": "a b"}}]},
             {"messages": HI, "response_format": {"type": "json_schema"}},
             {"messages": HI, "response_format": {}}, {"messages": HI, "top_logprobs": 2},
             {"messages": HI, "structured_outputs": {"json_object": "yes"}},
             {"messages": HI, "structured_outputs": {}}, {"messages": HI, "structured_outputs": {"regx": "a"}},
             {"messages": HI, "guided_choice": []}, {"messages": HI, "reasoning_effort": "huge"}],
        ),
        (
            ResponsesRequest,
            [{"input": "Hi"}, {"input": HI}, {"input": [{"role": "assistant", "content": None}]},
             {"input": HI, "text": {"format": {"type": "json_object"}}},
             {"input": [*HI, {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                        {"type": "function_call_output", "call_id": "1", "output": "5"}]},
             {"input": "Hi", "tools": [{"type": "function", "name": "f"}], "tool_choice": "auto"}],
            [{}, {"input": []}, {"input": [{"type": "reasoning"}]},
             {"input": [{"type": "function_call_output", "call_id": {}, "output": "5"}]},
             {"input": [{"type": "input_image"}]},
             {"input": "Hi", "text": {"format": {}}}, {"input": "Hi", "text": {"format": [None]}},
             {"input": "Hi", "tools": [{"type": "search"}]},
             {"input": "Hi", "text": {"format": {"type": "json_schema", "schema": {}}}},
             {"input": "Hi", "reasoning": {"effort": "huge"}}],
        ),
        (TokenizeRequest, [{"prompt": ""}, {"messages": HI}], [{"prompt": 5}]),
    ],
)  # fmt: skip
def test_the_same_bodies(model: type[BaseModel], good: list[dict[str, Any]], bad: list[dict[str, Any]]) -> None:
    for body in good:
        assert taken(model, body) and described(model, body), body
    for body in bad:
        assert not taken(model, body) and not described(model, body), body


def test_sizes_of_the_model_are_in_it() -> None:
    other = [{"prompt": "x", "logit_bias": {str(VOCAB): 1}}, {"prompt": "x", "max_tokens": CONTEXT}]
    for body in ({"prompt": [VOCAB]}, *other):
        assert taken(CompletionRequest, body) and not described(CompletionRequest, body), body
    assert described(CompletionRequest, {"prompt": [VOCAB - 1], "max_tokens": CONTEXT - 1})


@pytest.mark.parametrize("most", [0, 9, 10, 202, 999, 1000])
def test_patterns_of_numbers(most: int) -> None:
    pattern = re.compile(number_pattern(most))
    assert [number for number in range(3 * most + 20) if pattern.fullmatch(str(number))] == list(range(most + 1))
