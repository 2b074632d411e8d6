"""What clients may ask of /v1/responses, and the same as the body of a chat."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from jaxllm.serve.errors import bad_request
from jaxllm.serve.protocol import ReasoningEffort


class Reasoning(BaseModel):
    model_config = ConfigDict(strict=True)

    effort: ReasoningEffort | None = None


class ResponsesRequest(BaseModel):
    """POST /v1/responses."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    stream: bool | None = None
    background: bool | None = None
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    user: str | None = None
    truncation: Literal["auto", "disabled"] | None = None
    reasoning: Reasoning | None = None
    # Not OpenAI's.
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)
    priority: float | None = Field(default=None, ge=-1e9, le=1e9, allow_inf_nan=False)

    def to_chat(self, before: list[dict[str, Any]]) -> dict[str, Any]:
        """The body of the same chat completion; `before`: messages of the answer that it follows. Raises ApiError."""
        messages = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        said = self.messages()
        if not said:
            raise bad_request("input holds nothing but reasoning; give a message", "input")
        messages += [*before, *said]
        chat: dict[str, Any] = {"messages": messages, "stream": bool(self.stream)}
        if self.max_output_tokens is not None:
            chat["max_completion_tokens"] = self.max_output_tokens
        if self.tools:
            chat["tools"] = [_chat_tool(tool, index) for index, tool in enumerate(self.tools)]
        choice = self.tool_choice
        if isinstance(choice, dict):
            choice = {"type": choice.get("type"), "function": {"name": choice.get("name")}}
        if choice is not None and not (choice == "auto" and not self.tools):
            chat["tool_choice"] = choice
        if self.reasoning is not None:
            chat["reasoning_effort"] = self.reasoning.effort
        form = (self.text or {}).get("format")
        if not isinstance(form, dict | None):
            raise bad_request(f"text.format = {form!r:.80} must be an object", "text.format")
        if form is not None:
            is_schema = form.get("type") == "json_schema"
            if is_schema and not isinstance(form.get("name"), str):
                raise bad_request("text.format.name must be a text", "text.format.name")
            chat["response_format"] = {"type": "json_schema", "json_schema": form} if is_schema else form
        for name in ("temperature", "top_p", "parallel_tool_calls", "user", "seed", "top_k", "min_p", "cache_salt"):
            chat[name] = getattr(self, name)
        if self.top_logprobs is not None:
            chat |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return {**chat, "priority": self.priority}

    def messages(self) -> list[dict[str, Any]]:
        """The input as messages of a chat. Raises ApiError for what is no text and no call."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return messages_of(self.input)


def messages_of(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items of an input or an output as messages of a chat. Raises ApiError for what is no text and no call."""
    found: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        kind = item.get("type", "message")
        if kind in ("function_call", "function_call_output") and not isinstance(item.get("call_id"), str):
            raise bad_request(f"input.{index}.call_id must be a text", "input")
        if kind == "message":
            found.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if found and found[-1].get("tool_calls"):
                found[-1]["tool_calls"].append(call)
            else:
                found.append({"role": "assistant", "content": "", "tool_calls": [call]})
        elif kind == "function_call_output":
            found.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind != "reasoning":  # what was thought before is not said again
            raise bad_request(f"input.{index}.type = {kind!r} is not supported", "input")
    return found


def _chat_tool(tool: dict[str, Any], index: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise bad_request(f"tools.{index}.type = {tool.get('type')!r} is not supported; only functions are", "tools")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
