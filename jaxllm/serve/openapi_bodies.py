"""Schemas of request bodies: what their pydantic models say, and what the server checks beyond types.

A body that its schema allows is answered with success, but for what JSON Schema has no words for: the prompt and the
tokens asked for share one context, min_tokens is at most max_tokens, prompts times n are bounded, a named tool is one
of the tools, forms of the output exclude each other, and a regular expression, a schema or a grammar has to compile.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jaxllm.serve.forms import FORMATS
from jaxllm.serve.protocol import MAX_PROMPTS, ROLES
from jaxllm.serve.tools import MAX_TOOLS, NAME_PATTERN

Schema = dict[str, Any]
STRING: Schema = {"type": "string"}
NULL: Schema = {"type": "null"}
OBJECT: Schema = {"type": "object"}
_TEXT: Schema = {"type": "string", "minLength": 1}
_TRUE: Schema = {"const": True}


def struct(required: Schema, **optional: Any) -> Schema:
    """An object with these fields, and others."""
    return {"type": "object", "required": list(required), "properties": {**required, **optional}}


def array(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _any(*kinds: Schema) -> Schema:
    return {"anyOf": list(kinds)}


_PART = _any(
    struct({"type": {"enum": ["text", "input_text", "output_text"]}, "text": STRING}),
    struct({"type": {"const": "refusal"}, "refusal": STRING}),
)
_CONTENT = _any(STRING, array(_PART))
_ARGUMENTS = _any({"type": "string", "contentMediaType": "application/json"}, OBJECT)
_CALL = struct({"function": struct({"name": STRING}, arguments=_ARGUMENTS)})
_CALLS = _any(array(_CALL), NULL)
_MESSAGE = _any(
    struct({"role": {"enum": [role for role in ROLES if role != "assistant"]}, "content": _CONTENT}, tool_calls=_CALLS),
    struct({"role": {"const": "assistant"}}, content=_any(_CONTENT, NULL), tool_calls=_CALLS),
)
_SAID = {"type": {"const": "message"}}
_INPUT = _any(
    struct({"role": {"enum": [role for role in ROLES if role != "assistant"]}, "content": _CONTENT}, **_SAID),
    struct({"role": {"const": "assistant"}}, content=_any(_CONTENT, NULL), **_SAID),
    struct({"type": {"const": "function_call"}, "call_id": STRING, "name": STRING}, arguments=_ARGUMENTS),
    struct({"type": {"const": "function_call_output"}, "call_id": STRING, "output": _CONTENT}),
    struct({"type": {"const": "reasoning"}}),
)
_FUNCTION = {"name": {"type": "string", "pattern": f"^{NAME_PATTERN}$"}}
_FUNCTION_PARAMETERS = {"parameters": _any(OBJECT, NULL), "description": _any(STRING, NULL)}
_TOOL = struct({"type": {"const": "function"}, "function": struct(_FUNCTION, **_FUNCTION_PARAMETERS)})
_CHOICES = {"enum": ["auto", "none", "required"]}
_FORMAT = _any(
    struct({"type": {"enum": ["text", "json_object"]}}),
    struct({"type": {"const": "json_schema"}, "json_schema": struct({"schema": OBJECT})}),
    struct({"type": {"const": "regex"}, "regex": {**_TEXT, "format": "regex"}}),
    *(struct({"type": {"const": kind}, kind: _TEXT}) for kind in FORMATS if kind in ("grammar", "ebnf")),
)
_STRUCTURES: dict[str, Schema] = {
    "json": _any(STRING, OBJECT), "regex": {**_TEXT, "format": "regex"}, "choice": array(_TEXT, minItems=1),
    "grammar": _TEXT, "json_object": _TRUE,
}  # fmt: skip
_STRUCTURED = {
    "anyOf": [{**struct({kind: value}), "additionalProperties": False} for kind, value in _STRUCTURES.items()]
}


def _nullable(schema: Schema) -> Schema:
    kinds = schema["anyOf"] if set(schema) == {"anyOf"} else [schema]
    return _any(*kinds, NULL)


def completed(schema: Schema, vocab_size: int | None, max_seq_len: int | None) -> Schema:
    """The schema of a body's model with the rules that the model checks in code; the sizes are None while unknown."""
    fields, rules = schema["properties"], list[Schema]()
    _RULES.get(schema["title"], _no_rules)(fields, rules)
    if rules:
        schema["allOf"] = rules
    if vocab_size is not None:
        _lower_token_limits(schema, vocab_size)
        if "logit_bias" in fields:
            names = {"pattern": f"^0*({number_pattern(vocab_size - 1)})$"}
            _kind(fields["logit_bias"], "object")["propertyNames"] = names
    if max_seq_len is not None:
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens"):
            if name in fields:
                limit = _kind(fields[name], "integer")
                limit.pop("exclusiveMaximum", None)
                limit["maximum"] = max_seq_len - 1  # a prompt has at least one token
    return schema


def _no_rules(fields: Schema, rules: list[Schema]) -> None:
    pass


def _generate(fields: Schema, rules: list[Schema]) -> None:
    """What completions and chats share."""
    fields["response_format"] |= _nullable(_FORMAT)
    fields["structured_outputs"] |= _nullable(_STRUCTURED)
    fields["guided_regex"]["anyOf"][0] |= {**_TEXT, "format": "regex"}
    fields["guided_grammar"]["anyOf"][0] |= _TEXT
    fields["guided_choice"] |= _nullable(_STRUCTURES["choice"])
    _kind(fields["logit_bias"], "object")["additionalProperties"] |= {"minimum": -100, "maximum": 100}
    rules.append(_only_with(("stream_options",), "stream"))


def _completion(fields: Schema, rules: list[Schema]) -> None:
    _generate(fields, rules)
    token = next(kind for kind in fields["prompt"]["anyOf"] if kind.get("items", {}).get("type") == "integer")["items"]
    tokens = array(token, minItems=1)
    fields["prompt"] |= _any(
        _TEXT, array(_TEXT, minItems=1, maxItems=MAX_PROMPTS), tokens, array(tokens, minItems=1, maxItems=MAX_PROMPTS),
        NULL,
    )  # fmt: skip
    rules.append(_either("prompt"))
    some = {"properties": {"max_tokens": _any({"type": "integer", "minimum": 1}, NULL)}}
    rules.append(_any(some, {"required": ["echo"], "properties": {"echo": _TRUE}}))


def _chat(fields: Schema, rules: list[Schema]) -> None:
    _generate(fields, rules)
    fields["messages"] |= {"items": _MESSAGE}
    fields["tools"] |= _nullable(array(_TOOL, maxItems=MAX_TOOLS))
    named = struct({"type": {"const": "function"}, "function": struct(_FUNCTION)})
    fields["tool_choice"] |= _any(_CHOICES, named, NULL)
    _tool_rules(rules)
    rules.append(_only_with(("top_logprobs",), "logprobs"))
    rules.append(_either("messages"))


def _responses(fields: Schema, rules: list[Schema]) -> None:
    spoken = _any(*_INPUT["anyOf"][:-1])  # what was thought before is not said again
    fields["input"] |= _any(STRING, array(_INPUT, minItems=1, contains=spoken))
    tool = struct({"type": {"const": "function"}, **_FUNCTION}, **_FUNCTION_PARAMETERS)
    fields["tools"] |= _nullable(array(tool, maxItems=MAX_TOOLS))
    fields["tool_choice"] |= _any(_CHOICES, struct({"type": {"const": "function"}, **_FUNCTION}), NULL)
    forms = [struct({"type": {"enum": ["text", "json_object"]}}),
             struct({"type": {"const": "json_schema"}, "name": STRING, "schema": OBJECT})]  # fmt: skip
    fields["text"] |= _nullable(struct({}, format=_any(*forms, NULL)))
    _tool_rules(rules)
    alone = {"properties": {"background": _any({"const": False}, NULL)}}
    rules.append(_any(alone, {"properties": {"stream": _any({"const": False}, NULL), "store": _any(_TRUE, NULL)}}))


def _tokenize(fields: Schema, rules: list[Schema]) -> None:
    fields["messages"] |= _nullable(array(_MESSAGE, minItems=1))
    rules.append(_any(*(
        {"required": [one], "properties": {one: {"not": NULL}, other: NULL}}
        for one, other in (("prompt", "messages"), ("messages", "prompt"))
    )))  # fmt: skip


_RULES = {
    "CompletionRequest": _completion, "ChatRequest": _chat, "ResponsesRequest": _responses, "TokenizeRequest": _tokenize
}  # fmt: skip


def _tool_rules(rules: list[Schema]) -> None:
    """A choice needs tools to choose from."""
    none = {"properties": {"tool_choice": _any({"const": "none"}, NULL)}}
    rules.append(_any(none, {"required": ["tools"], "properties": {"tools": array({}, minItems=1)}}))


def _only_with(names: Iterable[str], other: str) -> Schema:
    """These fields only where another one is true."""
    return _any(
        {"properties": dict.fromkeys(names, NULL)}, {"required": [other], "properties": {other: _TRUE}}
    )  # fmt: skip


def _either(name: str) -> Schema:
    """That field, or token ids in its place."""
    ids = {"required": ["prompt_token_ids"], "properties": {"prompt_token_ids": {"type": "array"}}}
    some = _any({"type": "string"}, {"type": "array", "minItems": 1})
    return _any({"required": [name], "properties": {name: some}}, ids)


def _kind(field: Schema, kind: str) -> Schema:
    """The part of a field's schema that is of that type."""
    return next(one for one in field.get("anyOf", [field]) if one.get("type") == kind)


def _lower_token_limits(schema: Any, vocab_size: int) -> None:
    if isinstance(schema, list):
        for item in schema:
            _lower_token_limits(item, vocab_size)
    elif isinstance(schema, dict):
        if schema.get("type") == "array" and "exclusiveMaximum" in schema.get("items", {}):
            schema["items"] = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
        for item in schema.values():
            _lower_token_limits(item, vocab_size)


def number_pattern(most: int) -> str:
    """A regular expression of the numbers 0..most in decimal, without leading zeros."""
    digits = str(most)
    parts = [] if len(digits) == 1 else ["[0-9]"]
    parts += [f"[1-9][0-9]{{{length - 1}}}" for length in range(2, len(digits))]
    for at, digit in enumerate(digits):
        low = 1 if at == 0 and len(digits) > 1 else 0
        high = int(digit) - (at < len(digits) - 1)
        if high >= low:
            rest = len(digits) - at - 1
            parts.append(f"{digits[:at]}[{low}-{high}]" + (f"[0-9]{{{rest}}}" if rest else ""))
    return "|".join(parts)
