"""Tool calls in the text of each family of models, whole and in pieces of any size."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from jaxllm.serve.chats import ChatJob
from jaxllm.serve.generation import Delta
from jaxllm.serve.jobs import Whole
from jaxllm.serve.parsing import validate
from jaxllm.serve.protocol import ChatRequest
from jaxllm.serve.tools import PARSERS, ToolText, choose_parser

NAMES = ["get_weather", "f"]
PARIS: tuple[str, dict[str, Any]] = ("get_weather", {"city": "Paris", "note": '}"</x>'})
F: tuple[str, dict[str, Any]] = ("f", {})
DS = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"

ARGUMENTS = json.dumps(PARIS[1])
END = "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
CASES: list[tuple[str, str, str, list[tuple[str, dict[str, Any]]]]] = [
    (
        "hermes",
        f'Hm.\n<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>',
        "Hm.\n",
        [PARIS],
    ),
    ("hermes", '<tool_call>{"name":"f","arguments":{}}</tool_call>\n<tool_call>{"name":"f"}</tool_call>', "", [F, F]),
    ("llama3", json.dumps({"name": "get_weather", "parameters": PARIS[1]}), "", [PARIS]),
    ("llama3", '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "f", "arguments": {}}<|eom_id|>', "", [F, F]),
    ("mistral", f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {ARGUMENTS}}}, {{"name": "f"}}]', "", [PARIS, F]),
    ("mistral", f"Yes[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}[TOOL_CALLS]f[CALL_ID]abc[ARGS]{{}}", "Yes", [PARIS, F]),
    ("deepseek", f"Hm{DS}function<｜tool▁sep｜>f\n```json\n{{}}\n```{END}", "Hm", [F]),
    ("deepseek", f"{DS}get_weather<｜tool▁sep｜>{ARGUMENTS}{END}", "", [PARIS]),
]
TEXTS = [
    ("hermes", "plain text with < and <tool and {"),
    ("hermes", "<tool_call>not json</tool_call>"),
    ("hermes", '<tool_call>{"name": "rm_rf", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", "<tool_call>" + "[" * 100_000),
    ("hermes", '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>'),
    ("llama3", '{"answer": 42}'),
    ("llama3", '{"name": "f", "parameters"'),
    ("llama3", "[1, 2]"),
    ("llama3", 'It is {"name": "f", "parameters": {}}'),
    ("llama3", "  "),
    ("mistral", "[TOOL_CALLS] 5"),
    ("mistral", "[TOOL_CALLS] [5]"),
    ("mistral", "[TOOL_CALLS]f[ARGS]x"),
    ("deepseek", DS + "f"),
]


def read(parser: str, text: str, size: int) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    reader = ToolText(PARSERS[parser](), NAMES)
    said = "".join(reader.feed(text[at : at + size]) for at in range(0, len(text), size))
    rest, calls = reader.finish()
    return said + rest, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("size", [1, 3, 10_000])
@pytest.mark.parametrize(("parser", "text", "said", "calls"), CASES)
def test_calls(parser: str, text: str, said: str, calls: Any, size: int) -> None:
    assert read(parser, text, size) == (said, calls)


@pytest.mark.parametrize("size", [7, 1_000_000])
@pytest.mark.parametrize(("parser", "text"), TEXTS)
def test_text_stays_text(parser: str, text: str, size: int) -> None:
    assert read(parser, text, size) == (text, [])


def test_text_is_not_held_back_longer_than_needed() -> None:
    reader = ToolText(PARSERS["hermes"](), NAMES)
    assert [reader.feed(piece) for piece in ("a <", "b <tool_", "x", "<tool_call>", "x")] == [
        "a ",
        "<b ",
        "<tool_x",
        "",
        "",
    ]
    reader = ToolText(PARSERS["llama3"](), NAMES)
    assert [reader.feed(piece) for piece in (" ", "a ", "{")] == ["", " a ", "{"]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("... <tool_call> ...", "Hermes"),
        ("... [TOOL_CALLS] ...", "Mistral"),
        ("... Environment: ipython ...", "Llama3"),
        ("... <｜tool▁calls▁begin｜> ...", "DeepSeek"),
        ("nothing", "NoneType"),
        (None, "NoneType"),
    ],
)
def test_auto(template: str | None, name: str) -> None:
    assert type(choose_parser("auto", template)).__name__ == name


def test_by_name() -> None:
    assert choose_parser("none", "<tool_call>") is None
    assert type(choose_parser("mistral", None)).__name__ == "Mistral"


class FakeServer:
    """As much of a server as an answer is made with."""

    model = "m"
    tokenizer = None
    tool_parser = PARSERS["hermes"]()
    reasoning_parser = None
    end_think_id = None

    async def chat_tokens(self, *args: Any) -> list[int]:
        return [1]

    def check_length(self, *args: Any) -> None:
        pass

    def submit(self, *args: Any) -> Any:
        assert args[-1] is (False if self.reasoning_parser is None else None)  # special tokens are wanted for tools
        return SimpleNamespace(prompt=[1], num_tokens=3, cached_tokens=0)


class ReasoningServer(FakeServer):
    """A server of a model that reasons; its tokens are words."""

    reasoning_parser = "deepseek_r1"  # type: ignore[assignment]
    words = ("<s>", "Hm", "</think>", "Yes")
    tokenizer = SimpleNamespace(  # type: ignore[assignment]
        is_byte_level=False, decode=lambda ids, **kwargs: "", backend=SimpleNamespace(id_to_token=words.__getitem__)
    )


def test_usage_tells_of_reasoning() -> None:
    body = validate(ChatRequest, {"messages": [{"role": "user", "content": "x"}]})
    job = ChatJob(ReasoningServer(), body)  # type: ignore[arg-type]
    asyncio.run(job.start())
    assert job.choice(0, Delta(0, "Hm", [1], None, None, None))["delta"] == {"reasoning_content": "Hm"}
    assert job.usage()["completion_tokens_details"] == {"reasoning_tokens": 1}
    assert job.choice(0, Delta(0, "</think>Yes", [2, 3], None, "stop", None))["delta"] == {"content": "Yes"}
    assert job.usage()["completion_tokens_details"] == {"reasoning_tokens": 2}
    assert job.usage()["completion_tokens"] == 3


@pytest.mark.parametrize(("tail", "reason"), [("</tool_call>", "tool_calls"), ("", "tool_calls"), ("x", "stop")])
def test_calls_in_chunks_and_whole(tail: str, reason: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    text = 'Well, <tool_call>{"name": "f", "arguments": {"a": 1}}' + tail
    body = validate(ChatRequest, {"messages": [{"role": "user", "content": "x"}], "tools": [tool]})

    def job() -> ChatJob:
        made = ChatJob(FakeServer(), body)  # type: ignore[arg-type]
        asyncio.run(made.start())
        return made

    streamed = job()
    pieces = [Delta(0, text[:8], [1], None, None, None), Delta(0, text[8:], [2], None, "stop", None)]
    first, last = (streamed.choice(0, piece) for piece in pieces)
    assert first["delta"] == {"content": "Well, "} and first["finish_reason"] is None
    assert last["finish_reason"] == reason

    whole = job()
    found = Whole()
    for piece in pieces:
        found.add(piece)

    async def collected() -> list[list[Whole]]:
        return [[found]]

    whole._collect = collected  # type: ignore[method-assign]
    whole.usage = dict  # type: ignore[method-assign]
    (choice,) = asyncio.run(whole.whole())["choices"]
    assert choice["finish_reason"] == reason
    if reason == "stop":
        assert choice["message"]["content"] == text and "tool_calls" not in choice["message"]
        assert last["delta"] == {"content": text[6:]}
        return
    (call,), (chunk,) = choice["message"]["tool_calls"], last["delta"]["tool_calls"]
    assert choice["message"]["content"] == "Well, " and chunk["index"] == 0
    for one in (call, chunk):
        assert one["function"] == {"name": "f", "arguments": '{"a": 1}'} and one["id"].startswith("call_")
