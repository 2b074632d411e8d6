"""/openapi.json: the routes and the bodies that they take, from the same models that check them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from jaxllm import __version__
from jaxllm.serve.gate import OPEN_ROUTES
from jaxllm.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from jaxllm.serve.responses import ResponsesRequest

_BODIES: dict[str, tuple[type[BaseModel], str, str]] = {
    "/v1/chat/completions": (ChatRequest, "Answer a conversation", "ChatCompletion"),
    "/v1/completions": (CompletionRequest, "Continue prompts", "Completion"),
    "/v1/responses": (ResponsesRequest, "Answer an input", "Response"),
    "/tokenize": (TokenizeRequest, "Token ids of a text or a conversation", "Tokens"),
    "/detokenize": (DetokenizeRequest, "Text of token ids", "Text"),
}
_READS: dict[str, tuple[str, str]] = {
    "/v1/models": ("The models that are served", "Models"),
    "/v1/models/{name}": ("One model", "Model"),
    "/v1/responses/{response_id}": ("An answer that was kept", "Response"),
    "/health": ("Whether requests are served", "Health"),
    "/health_generate": ("The same, with a token generated", "Health"),
    "/version": ("The version", "Version"),
    "/iteration_stats": ("The last steps of the engine", "Iterations"),
}
_STRING, _INTEGER = {"type": "string"}, {"type": "integer"}
_NULLABLE = {"type": ["string", "null"]}


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": {**required, **optional}}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_CHOICE = {"index": _INTEGER, "finish_reason": _NULLABLE, "logprobs": {"type": ["object", "null"]}}
_USAGE = _object({"prompt_tokens": _INTEGER, "completion_tokens": _INTEGER, "total_tokens": _INTEGER})
_COMMON = {"id": _STRING, "created": _INTEGER, "model": _STRING}
_MESSAGE = _object({"role": {"const": "assistant"}, "content": _NULLABLE})
_MODEL = _object({"id": _STRING, "object": {"const": "model"}, "created": _INTEGER, "owned_by": _STRING})
_ANSWERS: dict[str, dict[str, Any]] = {
    "ChatCompletion": _object({
        **_COMMON, "object": {"const": "chat.completion"}, "usage": _USAGE,
        "choices": _list(_object({**_CHOICE, "message": _MESSAGE})),
    }),
    "Completion": _object({
        **_COMMON, "object": {"const": "text_completion"}, "usage": _USAGE,
        "choices": _list(_object({**_CHOICE, "text": _STRING})),
    }),
    "Response": _object({
        "id": _STRING, "object": {"const": "response"}, "created_at": _INTEGER, "status": _STRING, "model": _STRING,
        "output": _list(_object({"type": _STRING, "id": _STRING})),
    }),
    "Tokens": _object({"count": _INTEGER, "max_model_len": _INTEGER, "tokens": _list(_INTEGER)}),
    "Text": _object({"prompt": _STRING}),
    "Models": _object({"object": {"const": "list"}, "data": _list(_MODEL)}),
    "Model": _MODEL,
    "Health": _object({"status": _STRING}, reason=_STRING),
    "Version": _object({"version": _STRING}),
    "Iterations": _list(_object({"iter": _INTEGER, "iterLatencyMS": {"type": "number"}})),
    "Error": _object({"error": _object({"message": _STRING, "type": _STRING, "param": _NULLABLE, "code": _NULLABLE})}),
}  # fmt: skip


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _completed(schema: dict[str, Any], vocab_size: int | None) -> dict[str, Any]:
    """A body's schema with what its model checks in code: what must be there, and token ids of the vocabulary."""
    fields = schema["properties"]
    if schema["title"] == "CompletionRequest":
        schema["anyOf"] = _either("prompt")
        fields["prompt"]["anyOf"] = [
            {**kind, **({"minLength": 1} if kind["type"] == "string" else {"minItems": 1})}
            for kind in fields["prompt"]["anyOf"]
            if kind["type"] != "null"
        ]
    elif schema["title"] == "ChatRequest":
        schema["anyOf"] = _either("messages")
        roles = {"enum": ["system", "developer", "user", "assistant", "tool"]}
        fields["messages"] |= {"minItems": 1, "items": _object({"role": roles, "content": _STRING})}
    elif schema["title"] == "TokenizeRequest":
        schema["oneOf"] = [
            {"required": [one], "properties": {one: {"not": {"type": "null"}}, other: {"type": "null"}}}
            for one, other in (("prompt", "messages"), ("messages", "prompt"))
        ]
    if vocab_size is not None:
        _lower_token_limits(schema, vocab_size)
    return schema


def _either(name: str) -> list[dict[str, Any]]:
    """That field, or token ids in its place."""
    ids = {"required": ["prompt_token_ids"], "properties": {"prompt_token_ids": {"type": "array"}}}
    return [{"required": [name]}, ids]


def _lower_token_limits(schema: Any, vocab_size: int) -> None:
    if isinstance(schema, list):
        for item in schema:
            _lower_token_limits(item, vocab_size)
    elif isinstance(schema, dict):
        if schema.get("type") == "array" and "exclusiveMaximum" in schema.get("items", {}):
            schema["items"]["exclusiveMaximum"] = vocab_size
        for item in schema.values():
            _lower_token_limits(item, vocab_size)


def _operation(path: str, summary: str, answer: str, errors: tuple[int, ...], guarded: bool = False) -> dict[str, Any]:
    responses = {"200": {"description": "OK", "content": _json(answer)}}
    guarded = guarded and path not in OPEN_ROUTES
    for status in (*errors, 401) if guarded else errors:
        name = answer if answer == "Health" and status == 503 else "Error"
        responses[str(status)] = {"description": "see the message", "content": _json(name)}
    security: list[dict[str, list[str]]] = [{"key": []}] if guarded else []
    return {"summary": summary, "responses": dict(sorted(responses.items())), "security": security}


def openapi(vocab_size: int | None, guarded: bool) -> dict[str, Any]:
    """The document. `vocab_size` is None while the engine starts; `guarded`: a key is asked for."""
    schemas, paths = dict(_ANSWERS), {}
    for path, (model, summary, answer) in _BODIES.items():
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = _completed(schema, vocab_size)
        operation = _operation(path, summary, answer, (400, 404, 408, 413, 500, 503, 504), guarded)
        operation["requestBody"] = {"required": True, "content": _json(model.__name__)}
        if path.startswith("/v1/"):
            operation["responses"]["200"]["content"]["text/event-stream"] = {}
        paths[path] = {"post": operation}
    for path, (summary, answer) in _READS.items():
        operation = _operation(path, summary, answer, (503,) if answer == "Health" else (400, 404), guarded)
        if path.endswith("}"):
            name = path.rpartition("{")[2][:-1]
            operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": _STRING}]
        if path == "/iteration_stats":
            since = {"type": "integer", "minimum": 0, "maximum": 10**18 - 1}
            operation["parameters"] = [{"name": "since", "in": "query", "required": False, "schema": since}]
        paths[path] = {"get": operation}
    cancel = _operation("/v1/responses", "Stop an answer in the background", "Response", (400, 404), guarded)
    where = {"name": "response_id", "in": "path", "required": True, "schema": _STRING}
    paths["/v1/responses/{response_id}/cancel"] = {"post": {**cancel, "parameters": [where]}}
    text = {"200": {"description": "Prometheus text", "content": {"text/plain": {"schema": _STRING}}}}
    paths["/metrics"] = {"get": {"summary": "Figures for Prometheus", "responses": text, "security": []}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxllm", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }
