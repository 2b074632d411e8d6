"""What clients may ask for: OpenAI's request bodies and the extensions that other servers have, checked by pydantic.

Unknown fields are ignored, because clients send fields of other servers. Fields that are known, would change what is
generated and are not there yet are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from jaxllm.sampling_params import MAX_LOGPROBS
from jaxllm.serve.errors import bad_request
from jaxllm.serve.forms import form_of
from jaxllm.serve.tools import check_tools, with_parsed_arguments

MAX_N = 128
MAX_PROMPTS = 1024
MAX_SEQUENCES = 4096  # prompts * n of one request
MAX_STOPS = 16
DEFAULT_COMPLETION_TOKENS = 16

_MISSING = "is not supported yet; leave it out"
# Fields of OpenAI and of other servers that would change the output, and what to say about them.
_REFUSED: dict[str, str] = {
    "best_of": _MISSING,
    "suffix": _MISSING,
    "use_beam_search": _MISSING,
    "bad_words": _MISSING,
    "allowed_token_ids": "is not supported; use logit_bias",
    "prompt_embeds": _MISSING,
    "audio": _MISSING,
    "functions": "is not supported; it was replaced by tools",
    "function_call": "is not supported; it was replaced by tool_choice",
    "chat_template": "is not accepted from clients: a template is a program",
    "lora_request": _MISSING,
    "lora_path": _MISSING,
    "continue_final_message": _MISSING,
    "documents": _MISSING,
    "thinking_token_budget": _MISSING,
    "stop_regex": "is not supported; use stop",
    "regex": "is not taken; use guided_regex or response_format",
    "ebnf": "is not taken; use guided_grammar or response_format",
    "json_schema": "is not taken; use response_format",
    "logits_processors": "is not accepted from clients: a processor is a program",
    "custom_logit_processor": "is not accepted from clients: a processor is a program",
}
_NOTHING: tuple[Any, ...] = (None, False, "", [], {})  # 0 is one of them, as False is

Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
StopText = Annotated[str, Field(min_length=1, max_length=1024)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Generate(BaseModel):
    """The fields that completions and chat completions share."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_N)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=1024)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Not OpenAI's.
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=1000, allow_inf_nan=False)
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=256)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)
    priority: float | None = Field(default=None, ge=-1e9, le=1e9, allow_inf_nan=False)
    prompt_token_ids: list[TokenId] | None = Field(default=None, min_length=1)
    return_token_ids: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _not_there_yet(cls, body: Any) -> Any:
        if isinstance(body, dict):
            for name, why in _REFUSED.items():
                if name in body and body[name] not in _NOTHING and not (name == "best_of" and body[name] == 1):
                    raise ValueError(f"{name} {why}")
            if body.get("modalities") not in (*_NOTHING, ["text"]):
                raise ValueError(f"modalities = {body['modalities']!r} must be ['text']: this model only writes")
        return body

    @model_validator(mode="after")
    def _agree(self) -> Generate:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options belongs to stream = true")
        _utf8("cache_salt", self.cache_salt)
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def engine_params(self) -> dict[str, Any]:
        """Fields of SamplingParams, without those that belong to text or differ between the two requests."""
        bias: dict[int, float] = {}
        for token, value in (self.logit_bias or {}).items():
            if not token.isascii() or not token.isdigit():
                raise bad_request(f"logit_bias has the key {token!r}; keys must be token ids", "logit_bias")
            if not -100 <= value <= 100:
                raise bad_request(f"logit_bias[{token}] = {value} must be between -100 and 100", "logit_bias")
            bias[int(token)] = value
        params: dict[str, Any] = {
            "n": self.n or 1,
            # As OpenAI has it; SamplingParams without any of these would be greedy.
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k in (None, -1) else self.top_k,
            "min_p": self.min_p,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": bias or None,
            "seed": None if self.seed is None else self.seed % 2**64,
            "stop_token_ids": self.stop_token_ids,
            "min_tokens": self.min_tokens,
            "ignore_eos": bool(self.ignore_eos),
        }
        form = form_of(self)
        if form is not None:
            params["structured_outputs"] = form.to_dict()
        return {name: value for name, value in params.items() if value is not None}


class CompletionRequest(Generate):
    """POST /v1/completions."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]] | None = None
    max_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    def prompts(self) -> list[str | list[int]]:
        """Every prompt, as text or token ids."""
        prompt: Any = self.prompt if self.prompt_token_ids is None else self.prompt_token_ids
        if prompt is None or prompt == []:
            raise bad_request("prompt is missing; give a string, token ids, or a list of them", "prompt")
        many: list[str | list[int]] = (
            list(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        )
        if not all(many):
            raise bad_request("the prompt is empty; give at least one character or token", "prompt")
        if len(many) > MAX_PROMPTS:
            raise bad_request(f"{len(many)} prompts in a request; at most {MAX_PROMPTS} are taken", "prompt")
        if len(many) * (self.n or 1) > MAX_SEQUENCES:
            raise bad_request(f"prompts * n = {len(many) * (self.n or 1)} is more than {MAX_SEQUENCES}", "n")
        return many


class ChatRequest(Generate):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(default_factory=list, max_length=10_000)
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    _conversation: list[dict[str, Any]] = PrivateAttr(default_factory=list)

    @model_validator(mode="after")
    def _chat(self) -> ChatRequest:
        if self.messages or self.prompt_token_ids is None:
            self._conversation = self._plain_messages()
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        names = check_tools(self.tools or [])
        choice = self.tool_choice
        if isinstance(choice, dict):
            function = choice.get("function")
            name = function.get("name") if isinstance(function, dict) else None
            if choice.get("type") != "function" or name not in names:
                shown = ", ".join(names) or "there are none"
                raise ValueError(f"tool_choice names {name!r}, which is not among the tools ({shown})")
        elif choice not in (None, "auto", "none", "required"):
            raise ValueError(f"tool_choice = {choice!r} must be auto, none, required or name a function")
        elif choice in ("auto", "required") and not names:
            raise ValueError(f"tool_choice = {choice!r} needs tools")
        if self.forces_calls and form_of(self) is not None:
            raise ValueError("a forced tool_choice and another form of the output exclude each other; give one")
        return self

    @property
    def forces_calls(self) -> bool:
        """Whether the answer has to be calls."""
        return isinstance(self.tool_choice, dict) or self.tool_choice == "required"

    @property
    def tool_names(self) -> list[str]:
        """The functions that may be called."""
        return [] if self.tool_choice == "none" else check_tools(self.tools or [])

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The messages with plain text as content."""
        return self._conversation

    def _plain_messages(self) -> list[dict[str, Any]]:
        if not self.messages:
            raise bad_request("messages is empty; give at least one", "messages")
        return [_plain(message, f"messages.{index}") for index, message in enumerate(self.messages)]

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """What the chat template is told beside the conversation; templates know no effort "none" but a switch."""
        effort = self.reasoning_effort
        told: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
        if effort == "none":
            told["enable_thinking"] = False
        return {**told, **(self.chat_template_kwargs or {})}

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeRequest(BaseModel):
    """POST /tokenize: of a text, or of a conversation."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    tokens: list[TokenId]


ROLES: tuple[str, ...] = ("system", "developer", "user", "assistant", "tool")


def _plain(message: dict[str, Any], where: str) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise bad_request(f"{where}.role = {role!r} must be one of {', '.join(ROLES)}", f"{where}.role")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") not in ("text", "input_text", "output_text", "refusal"):
                kind = part.get("type") if isinstance(part, dict) else part
                raise bad_request(f"{where}.content: a part of type {kind!r} is not text", f"{where}.content")
            if not isinstance(part.get("refusal" if part["type"] == "refusal" else "text"), str):
                raise bad_request(f"{where}.content: a part of type {part['type']!r} has no text", f"{where}.content")
        content = "".join(part["refusal" if part["type"] == "refusal" else "text"] for part in content)
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        raise bad_request(f"{where}.content must be text", f"{where}.content")
    try:
        message = with_parsed_arguments(message)
    except ValueError as error:
        raise bad_request(f"{where}.tool_calls: {error}", f"{where}.tool_calls") from None
    return {**message, "role": "system" if role == "developer" else role, "content": content}


def _utf8(name: str, text: str | None) -> None:
    if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name} is not valid Unicode")
