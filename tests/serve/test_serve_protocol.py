"""Request bodies: what is taken, what is refused and in which words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jaxllm.sampling_params import SamplingParams
from jaxllm.serve.errors import ApiError
from jaxllm.serve.parsing import parse_json, validate
from jaxllm.serve.protocol import ChatRequest, CompletionRequest

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


def refused(model: Any, body: dict[str, Any]) -> dict[str, Any]:
    with pytest.raises(ApiError) as caught:
        found = validate(model, body)
        found.engine_params()
        found.prompts() if model is CompletionRequest else found.conversation
    assert caught.value.status == 400 and caught.value.body["error"]["type"] == "invalid_request_error"
    return caught.value.body["error"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", "1"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", 2),
        ("n", 0),
        ("n", 129),
        ("n", 1.5),
        ("n", True),
        ("max_tokens", -1),
        ("max_tokens", 2**40),
        ("presence_penalty", 3),
        ("frequency_penalty", float("inf")),
        ("repetition_penalty", 0),
        ("seed", 2**64),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [2**31]),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": float("nan")}),
        ("logit_bias", {"²": 1}),
        ("stream", "yes"),
        ("priority", float("nan")),
        ("cache_salt", ""),
        ("cache_salt", "\ud800"),
        ("prompt_token_ids", []),
        ("prompt_token_ids", [-1]),
        ("stream_options", {"include_usage": True}),
        ("suffix", "x"),
        ("best_of", 2),
        ("lora_request", "x"),
        ("continue_final_message", True),
        ("regex", "a"),
        ("modalities", ["text", "audio"]),
    ],
)
def test_refused_by_both(field: str, value: Any) -> None:
    for model, body in ((CompletionRequest, {"prompt": "x"}), (ChatRequest, CHAT)):
        message = refused(model, {**body, field: value})["message"]
        assert field in message and len(message) < 300


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": [[-1]]}, "prompt"),
        ({"prompt": ["x"] * 1025}, "1025"),
        ({"prompt": ["x"] * 100, "n": 100}, "4096"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "logprobs": True}, "logprobs"),
    ],
)
def test_refused_completions(body: dict[str, Any], word: str) -> None:
    assert word in refused(CompletionRequest, body)["message"]


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"tools": [{"type": "function"}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "'a b'"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}] * 129}, "129"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "a"}}}, "tool_choice"),
        ({"tool_choice": "auto"}, "needs tools"),
        ({"tool_choice": "maybe"}, "maybe"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}]}, "JSON"),
        ({"messages": [{"role": "assistant", "tool_calls": [5]}]}, "tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": "f"}]}, "list of calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": 5}}]}]}, "object"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "no text"),
        ({"messages": [{"role": "nobody", "content": "x"}], "prompt_token_ids": [1]}, "messages.0.role"),
        ({"structured_outputs": {}}, "none of them"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ],
)
def test_refused_chats(more: dict[str, Any], word: str) -> None:
    assert word in refused(ChatRequest, {**CHAT, **more})["message"]


def test_params_are_sampling_params() -> None:
    body = {
        "prompt": "x", "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": -1, "n": 3, "min_tokens": 2,
        "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.2, "logit_bias": {"7": -100, "8": 1.5},
        "stop_token_ids": [4], "ignore_eos": True, "nobody_knows_this": 1, "best_of": 1, "tools": [], "suffix": None,
    }  # fmt: skip
    params = SamplingParams(**validate(CompletionRequest, body).engine_params())
    assert params.logit_bias == {7: -100, 8: 1.5} and params.seed == 2**64 - 1 and params.top_k == 5
    assert (params.n, params.min_tokens, params.ignore_eos, params.stop_token_ids) == (3, 2, True, [4])


def test_defaults_are_openais() -> None:
    assert validate(ChatRequest, CHAT).engine_params() == {"n": 1, "temperature": 1.0, "ignore_eos": False}
    assert validate(ChatRequest, {**CHAT, "top_k": -1}).engine_params()["temperature"] == 1.0


def test_what_templates_are_told() -> None:
    def told(**more: Any) -> dict[str, Any]:
        return validate(ChatRequest, {**CHAT, **more}).template_kwargs

    assert told() == {} and told(reasoning_effort="low") == {"reasoning_effort": "low"}
    assert told(reasoning_effort="none") == {"reasoning_effort": "none", "enable_thinking": False}
    mine = {"enable_thinking": True, "x": 1}
    assert told(reasoning_effort="none", chat_template_kwargs=mine) == {"reasoning_effort": "none", **mine}
    assert "reasoning_effort" in refused(ChatRequest, {**CHAT, "reasoning_effort": "huge"})["message"]


def test_content_parts_and_developers() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [{"role": "developer", "content": parts}, {"role": "assistant", "content": None}]}
    found = validate(ChatRequest, body).conversation
    assert [(one["role"], one["content"]) for one in found] == [("system", "ab"), ("assistant", "")]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"a": NaN}', b'{"a": -Infinity}', b"[" * 100_000]
)
def test_not_json(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_json(body)
    assert caught.value.status == 400
    json.dumps(caught.value.body)


def test_json() -> None:
    assert parse_json(b'{"a": [1.5, "\\ud800"]}') == {"a": [1.5, "\ud800"]}


def test_json_has_one_kind_of_number() -> None:
    found = validate(ChatRequest, parse_json(json.dumps({**CHAT, "n": 2.0, "temperature": 1.0, "top_k": 5e1}).encode()))
    assert (found.n, found.temperature, found.top_k) == (2, 1.0, 50)
    for number in ("1.5", "1e400", "1e30"):
        with pytest.raises(ApiError):
            validate(CompletionRequest, parse_json(b'{"prompt": "x", "n": %s}' % number.encode()))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"stop": ["a"] * 18}, "list should have at most 16 items"),
        ({"stop": ["a", 5]}, "stop.1 = 5: input should be a valid string"),
        ({"prompt": [1, "a"]}, "prompt.1 = 'a': input should be a valid integer"),
        ({"prompt": [1, 2, 2**40]}, "prompt.2 = 1099511627776: input should be less than"),
        ({"prompt": ["a", [1]]}, "prompt.1 = [1]: input should be a valid string"),
        ({"prompt": [[1], [2, "a"]]}, "prompt.1.1 = 'a': input should be a valid integer"),
        ({"prompt": 5}, "prompt = 5: input should be a valid string"),
    ],
    ids=str,
)
def test_of_several_forms_the_one_that_was_meant_is_named(body: dict, message: str) -> None:
    assert message in refused(CompletionRequest, {"prompt": "x", **body})["message"]


def test_calls_of_the_history_are_objects_for_the_template() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "a", "arguments": '{"b": [1]}'}}
    body = {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    (message,) = validate(ChatRequest, body).conversation
    assert message["tool_calls"][0]["function"] == {"name": "a", "arguments": {"b": [1]}} and message["content"] == ""
