"""Reasoning, text and forced calls in what a model says, in pieces of any size; and the forms that requests ask for."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from jaxllm.serve.errors import ApiError
from jaxllm.serve.forms import forced_schema, form_of
from jaxllm.serve.parsing import validate
from jaxllm.serve.protocol import ChatRequest, CompletionRequest
from jaxllm.serve.speech import Caller, ForcedCalls, NamedCall, ReasoningText, ReasoningTokens, Speech, choose_reasoning

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}


def function(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **({"parameters": parameters} if parameters else {})}}


def spoken(speech: Speech, text: str, size: int, reason: str = "stop") -> tuple[str, str, list[dict[str, Any]], Any]:
    """(reasoning, text, calls put together, finish reason) of a text that comes in pieces."""
    pieces = [text[at : at + size] for at in range(0, len(text), size)] or [""]
    news = [speech.feed(piece, reason if index == len(pieces) - 1 else None) for index, piece in enumerate(pieces)]
    calls: list[dict[str, Any]] = []
    for delta in (call for new in news for call in new.calls):
        if delta["index"] == len(calls):
            calls.append({"name": delta["function"]["name"], "arguments": ""})
            assert delta["id"] and delta["type"] == "function"
        calls[delta["index"]]["arguments"] += delta["function"]["arguments"]
    return "".join(new.reasoning for new in news), "".join(new.text for new in news), calls, news[-1].reason


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("parser", "prompt", "said", "reasoning", "text"),
    [
        ("qwen3", "assistant\n", "<think>\nHm <b>.\n</think>\n\nYes", "Hm <b>.\n", "Yes"),
        ("qwen3", "assistant\n", "Yes <think>no</think>", "", "Yes <think>no</think>"),
        ("qwen3", "assistant\n<think>\n", "Hm</think>Yes", "Hm", "Yes"),
        ("qwen3", "<think>\n\n</think>\n\n", "Yes</think>", "", "Yes</think>"),
        ("qwen3", "assistant\n", "<think>never ends </thi", "never ends </thi", ""),
        ("qwen3", "assistant\n", "<thin", "", "<thin"),
        ("deepseek_r1", "<｜Assistant｜>", "Hm</think>\nYes", "Hm", "Yes"),
        ("deepseek_r1", "<｜Assistant｜>", "<think>\nHm", "Hm", ""),
        ("deepseek_r1", "<｜Assistant｜>", "", "", ""),
    ],
)
def test_reasoning(parser: str, prompt: str, said: str, reasoning: str, text: str, size: int) -> None:
    found = spoken(Speech(ReasoningText(parser, prompt), None), said, size)
    assert found == (reasoning, text, [], "stop")


def test_reasoning_is_not_held_back() -> None:
    reader = ReasoningText("deepseek_r1", "")
    assert [reader.feed(piece, False) for piece in ("ab", " <", "c</", "think>d", "e")] == [
        ("ab", ""), (" ", ""), ("<c", ""), ("", "d"), ("", "e")
    ]  # fmt: skip


@pytest.mark.parametrize("together", [1, 3, 100])
@pytest.mark.parametrize(
    ("parser", "prompt", "tokens", "count"),
    [
        ("qwen3", "assistant\n", ["<think>", "Hm", ".", "</think>", "Yes"], 4),
        ("qwen3", "assistant\n<think>", ["Hm", "</", "think", ">", "Yes", "</think>"], 4),
        ("qwen3", "assistant\n<think>", ["Hm", "</", "thin"], 3),
        ("qwen3", "assistant\n", ["Yes", " <think>", "no", "</think>"], 0),
        ("qwen3", "<think>\n</think>\n", ["Yes"], 0),
        ("deepseek_r1", "", ["Hm", "x</think>y", "Yes"], 2),
    ],
)
def test_reasoning_tokens(parser: str, prompt: str, tokens: list[str], count: int, together: int) -> None:
    reasoning = ReasoningText(parser, prompt)
    speech = Speech(reasoning, None, None if reasoning.is_over else ReasoningTokens(tokens.__getitem__))
    for start in range(0, len(tokens), together):
        ids = range(start, min(len(tokens), start + together))
        speech.feed("".join(tokens[i] for i in ids), "stop" if start + together >= len(tokens) else None, ids)
    assert speech.reasoning_tokens == count


def test_who_reasons() -> None:
    assert choose_reasoning("auto", "... </think> ...") == "qwen3"
    assert choose_reasoning("auto", "...") is choose_reasoning("auto", None) is choose_reasoning("none", "") is None
    assert choose_reasoning("deepseek_r1", None) == "deepseek_r1"


CALLS = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    ("caller", "said", "reason", "wanted"),
    [
        (NamedCall("f"), '{"a": 1}', "stop", ("", [("f", '{"a": 1}')], "stop")),
        (NamedCall("f"), '{"a"', "length", ("", [("f", '{"a"')], "length")),
        (ForcedCalls(), json.dumps(CALLS), "stop", ("", [("f", '{"a": 1}'), ("g", "{}")], "tool_calls")),
        (ForcedCalls(), '[{"name', "length", ('[{"name', [], "length")),
    ],
)
def test_forced_calls(caller: Caller, said: str, reason: str, wanted: Any, size: int) -> None:
    fresh = type(caller)("f") if isinstance(caller, NamedCall) else type(caller)()
    _, text, calls, found = spoken(Speech(None, fresh), said, size, reason)
    assert (text, [(call["name"], call["arguments"]) for call in calls], found) == wanted


def test_reasoning_before_a_forced_call() -> None:
    speech = Speech(ReasoningText("deepseek_r1", ""), NamedCall("f"))
    found = spoken(speech, 'Hm</think>\n{"a": 1}', 3)
    assert found == ("Hm", "", [{"name": "f", "arguments": '{"a": 1}'}], "stop")


def test_the_schema_of_forced_calls() -> None:
    """References lead where they led before, whatever function they belong to."""
    tree = {
        "type": "object",
        "properties": {"n": {"$ref": "#/$defs/n"}, "next": {"$ref": "#"}},
        "$defs": {"n": {"const": 1}},
    }
    tools = [function("f", tree), function("g")]
    schema = forced_schema(tools, "required", True)
    good = [{"name": "f", "arguments": {"n": 1, "next": {"n": 1}}}, {"name": "g", "arguments": {"x": 1}}]
    jsonschema.validate(good, schema)
    for bad in (
        [],
        [{"name": "f", "arguments": {"next": {"n": 2}}}],
        [{"name": "h", "arguments": {}}],
        [{"name": "g"}],
        good[0],
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(good, forced_schema(tools, "required", False))
    named = {"type": "function", "function": {"name": "f"}}
    assert forced_schema(tools, named, True) == tree
    assert forced_schema([function("g")], {**named, "function": {"name": "g"}}, True) == {"type": "object"}


@pytest.mark.parametrize(
    ("fields", "source"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ("json", '{"type": "object"}')),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": 1}}}},
            ("json", '{"a": 1}'),
        ),
        ({"response_format": {"type": "regex", "regex": "a+"}}, ("regex", "a+")),
        ({"response_format": {"type": "ebnf", "ebnf": 'root ::= "a"'}}, ("grammar", 'root ::= "a"')),
        ({"structured_outputs": {"choice": ["a"], "json": None}}, ("choice", '["a"]')),
        ({"guided_json": {"a": 1}}, ("json", '{"a": 1}')),
        ({"guided_choice": ["a"]}, ("choice", '["a"]')),
        ({"guided_regex": "a"}, ("regex", "a")),
        ({"guided_grammar": 'start: "a"'}, ("grammar", 'start: "a"')),
    ],
)
def test_forms(fields: dict[str, Any], source: Any) -> None:
    for model, body in ((ChatRequest, ASK), (CompletionRequest, {"prompt": "x"})):
        form = form_of(validate(model, {**body, **fields}))
        assert (None if form is None else form.source()) == source


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_format": {"type": "xml"}}, "must be one of"),
        ({"response_format": {"type": "json_schema"}}, "must be a JSON Schema"),
        ({"response_format": {"type": "regex"}}, "must be a text"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "exclude each other"),
        ({"structured_outputs": {"regx": "a"}}, "'regx' is unknown"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tool_choice": "often", "tools": [function("f")]}, "must be auto"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [function("f")]}, "not among"),
        ({"tool_choice": "required", "tools": [function("f")], "guided_regex": "a"}, "exclude each other"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]}, "must be a JSON Schema"),
    ],
)
def test_bad_forms(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError, match=message) as error:
        form_of(validate(ChatRequest, {**ASK, **fields}))
    assert error.value.status == 400
