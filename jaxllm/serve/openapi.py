"""/openapi.json: the routes and the bodies that they take, from the same models that check them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from jaxllm import __version__
from jaxllm.serve.gate import OPEN_ROUTES
from jaxllm.serve.openapi_bodies import STRING, array, completed, struct
from jaxllm.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from jaxllm.serve.responses_request import ResponsesRequest

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
_INTEGER = {"type": "integer"}
_NULLABLE = {"type": ["string", "null"]}


_CHOICE = {"index": _INTEGER, "finish_reason": _NULLABLE, "logprobs": {"type": ["object", "null"]}}
_USAGE = struct({"prompt_tokens": _INTEGER, "completion_tokens": _INTEGER, "total_tokens": _INTEGER})
_COMMON = {"id": STRING, "created": _INTEGER, "model": STRING}
_MESSAGE = struct({"role": {"const": "assistant"}, "content": _NULLABLE})
_MODEL = struct({"id": STRING, "object": {"const": "model"}, "created": _INTEGER, "owned_by": STRING})
_ANSWERS: dict[str, dict[str, Any]] = {
    "ChatCompletion": struct({
        **_COMMON, "object": {"const": "chat.completion"}, "usage": _USAGE,
        "choices": array(struct({**_CHOICE, "message": _MESSAGE})),
    }),
    "Completion": struct({
        **_COMMON, "object": {"const": "text_completion"}, "usage": _USAGE,
        "choices": array(struct({**_CHOICE, "text": STRING})),
    }),
    "Response": struct({
        "id": STRING, "object": {"const": "response"}, "created_at": _INTEGER, "status": STRING, "model": STRING,
        "output": array(struct({"type": STRING, "id": STRING})),
    }),
    "Tokens": struct({"count": _INTEGER, "max_model_len": _INTEGER, "tokens": array(_INTEGER)}),
    "Text": struct({"prompt": STRING}),
    "Models": struct({"object": {"const": "list"}, "data": array(_MODEL)}),
    "Model": _MODEL,
    "Health": struct({"status": STRING}, reason=STRING),
    "Version": struct({"version": STRING}),
    "Iterations": array(struct({"iter": _INTEGER, "iterLatencyMS": {"type": "number"}})),
    "Error": struct({"error": struct({"message": STRING, "type": STRING, "param": _NULLABLE, "code": _NULLABLE})}),
}  # fmt: skip


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _operation(path: str, summary: str, answer: str, errors: tuple[int, ...], guarded: bool = False) -> dict[str, Any]:
    responses = {"200": {"description": "OK", "content": _json(answer)}}
    guarded = guarded and path not in OPEN_ROUTES
    for status in (*errors, 401) if guarded else errors:
        name = answer if answer == "Health" and status == 503 else "Error"
        responses[str(status)] = {"description": "see the message", "content": _json(name)}
    security: list[dict[str, list[str]]] = [{"key": []}] if guarded else []
    return {"summary": summary, "responses": dict(sorted(responses.items())), "security": security}


def openapi(vocab_size: int | None, max_seq_len: int | None, guarded: bool) -> dict[str, Any]:
    """The document. The sizes are None while the engine starts; `guarded`: a key is asked for."""
    schemas, paths = dict(_ANSWERS), {}
    for path, (model, summary, answer) in _BODIES.items():
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = completed(schema, vocab_size, max_seq_len)
        operation = _operation(path, summary, answer, (400, 404, 408, 413, 500, 503, 504), guarded)
        operation["requestBody"] = {"required": True, "content": _json(model.__name__)}
        if path.startswith("/v1/"):
            operation["responses"]["200"]["content"]["text/event-stream"] = {}
        paths[path] = {"post": operation}
    for path, (summary, answer) in _READS.items():
        operation = _operation(path, summary, answer, (503,) if answer == "Health" else (400, 404), guarded)
        if path.endswith("}"):
            name = path.rpartition("{")[2][:-1]
            operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": STRING}]
        if path == "/iteration_stats":
            since = {"type": "integer", "minimum": 0, "maximum": 10**18 - 1}
            operation["parameters"] = [{"name": "since", "in": "query", "required": False, "schema": since}]
        paths[path] = {"get": operation}
    cancel = _operation("/v1/responses", "Stop an answer in the background", "Response", (400, 404), guarded)
    where = {"name": "response_id", "in": "path", "required": True, "schema": STRING}
    paths["/v1/responses/{response_id}/cancel"] = {"post": {**cancel, "parameters": [where]}}
    text = {"200": {"description": "Prometheus text", "content": {"text/plain": {"schema": STRING}}}}
    paths["/metrics"] = {"get": {"summary": "Figures for Prometheus", "responses": text, "security": []}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxllm", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }
