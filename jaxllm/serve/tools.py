"""Tool calls: what the families of models write when they call a function, found in their text.

hermes     <tool_call>{"name": ..., "arguments": {...}}</tool_call>, also Qwen 2.5 and 3
llama3     {"name": ..., "parameters": {...}} as the whole answer, perhaps after <|python_tag|>; several with ; between
mistral    [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], and since v11 [TOOL_CALLS]name[ARGS]{...}
deepseek   <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>name```json{...}```, v3.1: no fence

Text that is no call of a function which the request offers stays text: nothing a model writes is an error, and none of
it is ever evaluated.
"""

from __future__ import annotations

import json
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

NAME_PATTERN = r"[A-Za-z0-9_.-]{1,64}"
_NAME = re.compile(NAME_PATTERN)
MAX_TOOLS = 128
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class ToolCall:
    """A call as OpenAI has it: `arguments` is JSON text."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def body(self, index: int | None = None) -> dict[str, Any]:
        """Its form in a message, or with an index in a chunk."""
        call = {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        return call if index is None else {"index": index, **call}


class ToolParser(ABC):
    """How one family writes calls. `begin` is where they start; what is before it is text."""

    begin: str

    def find(self, text: str) -> tuple[int, bool]:
        """(characters that are text for sure, whether calls begin there) of an answer that goes on."""
        at = text.find(self.begin)
        if at >= 0:
            return at, True
        # An end that may be the beginning of the mark is held back.
        for at in range(max(0, len(text) - len(self.begin) + 1), len(text)):
            if self.begin.startswith(text[at:]):
                return at, False
        return len(text), False

    @abstractmethod
    def calls(self, text: str) -> Iterator[tuple[Any, Any]]:
        """(name, arguments) of each call in text that starts with `begin`. May raise ValueError."""


class Hermes(ToolParser):
    begin = "<tool_call>"

    def calls(self, text: str) -> Iterator[tuple[Any, Any]]:
        for part in text.split(self.begin)[1:]:
            yield _named(_json(part.partition("</tool_call>")[0]), "arguments")


class Llama3(ToolParser):
    begin = "<|python_tag|>"

    def find(self, text: str) -> tuple[int, bool]:
        start = len(text) - len(text.lstrip())
        if start == len(text):
            return 0, False
        return (0, True) if text[start] == "{" else super().find(text)

    def calls(self, text: str) -> Iterator[tuple[Any, Any]]:
        rest = text.strip().removeprefix(self.begin).strip()
        while rest:
            found, end = _DECODER.raw_decode(rest)
            yield _named(found, "parameters" if "parameters" in found else "arguments")
            rest = rest[end:].lstrip().removeprefix("<|eom_id|>").removeprefix("<|eot_id|>").removeprefix(";").lstrip()


class Mistral(ToolParser):
    begin = "[TOOL_CALLS]"

    def calls(self, text: str) -> Iterator[tuple[Any, Any]]:
        if "[ARGS]" in text:
            for part in text.split(self.begin)[1:]:
                name, _, arguments = part.partition("[ARGS]")
                yield name.partition("[CALL_ID]")[0].strip(), _json(arguments)
            return
        for found in _json(text.removeprefix(self.begin)):
            yield _named(found, "arguments")


class DeepSeek(ToolParser):
    begin = "<｜tool▁calls▁begin｜>"
    _CALL = re.compile("<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)<｜tool▁call▁end｜>", re.DOTALL)

    def calls(self, text: str) -> Iterator[tuple[Any, Any]]:
        for kind, rest in self._CALL.findall(text):
            if kind.strip() == "function":
                name, _, rest = rest.partition("\n")
            else:
                name = kind
            yield name.strip(), _json(rest.strip().removeprefix("```json").removesuffix("```"))


PARSERS: dict[str, type[ToolParser]] = {
    "hermes": Hermes, "llama3": Llama3, "mistral": Mistral, "deepseek": DeepSeek
}  # fmt: skip
# What a model's chat template says when the model was taught to write calls in this form; the first that is there.
_SIGNS = {"deepseek": "tool▁call", "hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "llama3": "ipython"}


def choose_parser(setting: str, template: str | None) -> ToolParser | None:
    """The parser of that name; "auto" goes by the chat template. None where there is none."""
    if setting == "auto":
        setting = next((name for name, sign in _SIGNS.items() if template is not None and sign in template), "none")
    return PARSERS[setting]() if setting in PARSERS else None


def _json(text: str) -> Any:
    return json.loads(text.strip())


def _named(found: Any, arguments: str) -> tuple[Any, Any]:
    if not isinstance(found, dict):
        raise ValueError("a call is not an object")
    return found.get("name"), found.get(arguments, {})


class ToolText:
    """One answer as it grows: what is text goes through, the rest becomes calls at the end."""

    def __init__(self, parser: ToolParser, names: Iterable[str]) -> None:
        self._parser, self._names = parser, frozenset(names)
        self._held = ""
        self._inside = False
        self._spoken = False

    def feed(self, text: str) -> str:
        """New text of the model -> new text for the client."""
        self._held += text
        if self._inside:
            return ""
        # "{" begins a call of Llama 3 only at the start of an answer.
        finder = ToolParser.find if self._spoken else type(self._parser).find
        count, self._inside = finder(self._parser, self._held)
        out, self._held = self._held[:count], self._held[count:]
        self._spoken = self._spoken or bool(out.strip())
        return out

    def finish(self) -> tuple[str, list[ToolCall]]:
        """(text that is left, calls), when no more comes."""
        if not self._inside:
            return self._held, []
        calls = []
        try:
            for name, arguments in self._parser.calls(self._held):
                if name not in self._names or not isinstance(arguments, dict):
                    return self._held, []
                calls.append(ToolCall(name, json.dumps(arguments, ensure_ascii=False)))
        except (ValueError, RecursionError, TypeError):
            return self._held, []
        return ("", calls) if calls else (self._held, [])


def check_tools(tools: list[dict[str, Any]]) -> list[str]:
    """The names of the functions that a request offers. Raises ValueError that says what is wrong."""
    if len(tools) > MAX_TOOLS:
        raise ValueError(f"{len(tools)} tools; at most {MAX_TOOLS} are taken")
    names = []
    for index, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise ValueError(f'tools.{index} must be {{"type": "function", "function": {{"name": ...}}}}')
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"tools.{index}.function.name = {name!r} must be letters, digits, _, . and -, at most 64")
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            raise ValueError(f"tools.{index}.function.parameters must be a JSON Schema")
        if not isinstance(function.get("description", ""), str | None):
            raise ValueError(f"tools.{index}.function.description must be a text")
        names.append(name)
    return names


def with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message of the history for a template: templates want the arguments of its calls as objects, not as text."""
    calls = message.get("tool_calls")
    if calls is None:
        return message
    if not isinstance(calls, list):
        raise ValueError("it must be a list of calls")
    parsed = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError("tool_calls must hold objects with a function and its name")
        arguments = function.get("arguments", "{}")
        if not isinstance(arguments, str | dict):
            raise ValueError(f"the arguments of {function['name']} must be JSON text or an object")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise ValueError(f"the arguments of {function['name']} are not valid JSON") from None
        parsed.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": parsed}
