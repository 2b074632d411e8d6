"""The form that a request asks its output to have: OpenAI's response_format, and the fields of vLLM and SGLang."""

from __future__ import annotations

from typing import Any, Protocol

from jaxllm.serve.errors import bad_request
from jaxllm.structured import StructuredOutputs, StructuredOutputsError

FORMATS = ("text", "json_object", "json_schema", "regex", "grammar", "ebnf")
MAX_FORCED_CALLS = 16


class HasForm(Protocol):
    """The fields of a request that say what its output must look like."""

    response_format: dict[str, Any] | None
    structured_outputs: dict[str, Any] | None
    guided_json: str | dict[str, Any] | None
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None


def form_of(body: HasForm) -> StructuredOutputs | None:
    """The form that a request asks for; None for none. Raises ApiError."""
    found: dict[str, dict[str, Any]] = {}
    if body.response_format is not None:
        fields = _of_response_format(body.response_format)
        if fields is not None:
            found["response_format"] = fields
    if body.structured_outputs is not None:
        found["structured_outputs"] = {
            name: value for name, value in body.structured_outputs.items() if value not in (None, False)
        }
    for kind in ("json", "regex", "choice", "grammar"):
        value = getattr(body, f"guided_{kind}")
        if value is not None:
            found[f"guided_{kind}"] = {kind: value}
    if not found:
        return None
    if len(found) > 1:
        raise bad_request(f"{' and '.join(found)} exclude each other; give one", next(iter(found)))
    ((param, fields),) = found.items()
    try:
        return StructuredOutputs.of(fields)
    except StructuredOutputsError as error:
        raise bad_request(str(error), param) from None


def _of_response_format(given: dict[str, Any]) -> dict[str, Any] | None:
    kind = given.get("type")
    if kind not in FORMATS:
        raise bad_request(f"response_format.type = {kind!r} must be one of {', '.join(FORMATS)}", "response_format")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        named = given.get("json_schema")
        schema = named.get("schema", named.get("json_schema")) if isinstance(named, dict) else None
        if not isinstance(schema, dict):
            raise bad_request("response_format.json_schema.schema must be a JSON Schema", "response_format.json_schema")
        return {"json": schema}
    field = "regex" if kind == "regex" else "grammar"
    text = given.get(kind, given.get(field))
    if not isinstance(text, str):
        raise bad_request(f"response_format.{kind} must be a text", "response_format")
    return {field: text}


def forced_schema(tools: list[dict[str, Any]], choice: str | dict[str, Any], parallel: bool) -> dict[str, Any]:
    """The schema of forced calls: a function's arguments where it is named, else a list of calls with names.

    A schema's references to its own parts are led to where these are in the whole.
    """
    functions = [tool["function"] for tool in tools]
    if isinstance(choice, dict):
        name = choice["function"]["name"]
        return dict(next(one for one in functions if one["name"] == name).get("parameters") or {"type": "object"})
    items, defs = [], {}
    for index, function in enumerate(functions):
        where = f"tool{index}"
        defs[where] = _moved(function.get("parameters") or {"type": "object"}, f"#/$defs/{where}")
        items.append({
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "arguments": {"$ref": f"#/$defs/{where}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        })  # fmt: skip
    most = MAX_FORCED_CALLS if parallel else 1
    return {"type": "array", "minItems": 1, "maxItems": most, "items": {"anyOf": items}, "$defs": defs}


def _moved(schema: Any, root: str) -> Any:
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: root + value[1:] if name == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, root)
        for name, value in schema.items()
    }  # fmt: skip
