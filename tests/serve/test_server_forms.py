"""Structured outputs and forced calls from a real server; bad forms are 400 and nobody else notices them."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import openai
import pytest

from tests.serve.live import KEY, Live, events

pytestmark = pytest.mark.timeout(300)

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": -9, "maximum": 99}, "b": {"enum": ["x", "y", None]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "f", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "g", "parameters": {"type": "object", "additionalProperties": False}}},
]
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "temperature": 1.5}
PLAIN: dict[str, Any] = {"prompt": "The cat", "temperature": 0, "max_tokens": 30, "ignore_eos": True}


def test_the_openai_client_gets_structured_outputs(live: Live) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
    with openai.OpenAI(base_url=live.url + "/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        answer = client.chat.completions.create(**CHAT, n=8, response_format=form)
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
        chunks = client.chat.completions.create(**CHAT, response_format=form, stream=True, logprobs=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        jsonschema.validate(json.loads(text), SCHEMA)
        named: Any = {"type": "function", "function": {"name": "f"}}
        message = client.chat.completions.create(**CHAT, tools=TOOLS, tool_choice=named).choices[0].message
        (call,) = message.tool_calls or []
        assert call.type == "function" and call.function.name == "f" and not message.content
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
        answer = client.chat.completions.create(
            **CHAT, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, n=4
        )
        for choice in answer.choices:
            if choice.finish_reason == "length":  # the tiny context was full
                continue
            (call,) = choice.message.tool_calls or []
            assert choice.finish_reason == "tool_calls" and call.type == "function"
            wanted = next(tool for tool in TOOLS if tool["function"]["name"] == call.function.name)
            jsonschema.validate(json.loads(call.function.arguments), wanted["function"]["parameters"])
        assert any(choice.finish_reason == "tool_calls" for choice in answer.choices)


def test_a_named_call_streams_its_arguments(live: Live) -> None:
    body = {**CHAT, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}, "stream": True}
    with live.http.stream("POST", "/v1/chat/completions", json=body) as response:
        choices = [event["choices"][0] for event in events(response)]
    deltas = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert len(deltas) > 1 and [("id" in delta) for delta in deltas] == [True] + [False] * (len(deltas) - 1)
    jsonschema.validate(json.loads("".join(delta["function"]["arguments"] for delta in deltas)), SCHEMA)
    assert choices[-1]["finish_reason"] == "stop" and not any(choice["delta"].get("content") for choice in choices)


def test_other_streams_do_not_notice(live: Live) -> None:
    """Plain greedy answers beside constrained ones and bad grammars are byte for byte what they are alone."""
    alone = live.post("/v1/completions", PLAIN).raise_for_status().json()["choices"][0]["text"]
    kinds: list[tuple[dict[str, Any], int]] = [
        (PLAIN, 200),
        ({**PLAIN, "temperature": 1.5, "ignore_eos": False, "guided_regex": "[ab]{3,9}"}, 200),
        ({**PLAIN, "ignore_eos": False, "structured_outputs": {"choice": ["yes", "no"]}}, 200),
        ({**PLAIN, "guided_regex": "((((a{100}){100}){100}){100}){100}"}, 400),
        ({**PLAIN, "guided_json": {"type": "objct"}}, 400),
        ({**PLAIN, "guided_grammar": "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(3000))}, 400),
        ({**PLAIN, "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/none"}}}}, 400),
        ({**PLAIN, "guided_regex": "x" * 200_000}, 413),
    ]
    jobs = kinds * 3
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(lambda job: live.post("/v1/completions", job[0]), jobs))
    for (body, status), answer in zip(jobs, answers, strict=True):
        assert answer.status_code == status, answer.text
        if status == 200:
            text = answer.json()["choices"][0]["text"]
            assert text == alone if body is PLAIN else re.fullmatch("[ab]{3,9}|yes|no", text)
    assert live.until_metric("jaxllm_num_requests_running", 0) == 0


def test_a_client_that_leaves_while_its_grammar_compiles(live: Live) -> None:
    body = {**PLAIN, "max_tokens": 50, "guided_json": {"enum": [f"{'x' * 40}{index}" for index in range(1500)]}}
    with pytest.raises(Exception, match="timed out"):
        live.post("/v1/completions", body, timeout=0.02)
    assert live.until_metric("jaxllm_num_requests_running", 0) == 0
    assert live.until_metric("jaxllm_kv_cache_usage_perc", 0) == 0
