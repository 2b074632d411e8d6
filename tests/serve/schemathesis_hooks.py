"""What /openapi.json cannot say, told to schemathesis: rules between fields, and texts that have to compile.

Only valid bodies are touched: what has to be compiled is replaced by something that can be, and bodies that break one
of the rules that the head of jaxllm/serve/openapi_bodies.py names are made to keep it.
"""

from __future__ import annotations

import os
from typing import Any

import schemathesis

CONTEXT = int(os.environ["JAXLLM_TEST_CONTEXT"])
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
COMPILES: dict[str, Any] = {
    "guided_json": SCHEMA, "json": SCHEMA, "schema": SCHEMA, "guided_regex": "[a-c]{1,3}", "regex": "[a-c]{1,3}",
    "guided_grammar": 'start: "a"', "grammar": 'start: "a"', "ebnf": 'root ::= "a"', "parameters": SCHEMA,
    "guided_choice": ["a", "b"], "choice": ["a", "b"], "arguments": "{}",
}  # fmt: skip
GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
FORMS = ("response_format", "structured_outputs", *GUIDED, "text")
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@schemathesis.hook
def map_case(context: Any, case: Any) -> Any:
    if case.meta is not None and case.meta.generation.mode.is_positive and isinstance(case.body, dict):
        case.body = _keep_rules(_compiling(case.body))
    return case


def _compiling(value: Any) -> Any:
    if isinstance(value, list):
        return [_compiling(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        name: COMPILES[name] if name in COMPILES and inner not in (None, {}) else _compiling(inner)
        for name, inner in value.items()
    }


def _keep_rules(body: dict[str, Any]) -> dict[str, Any]:
    limits = [name for name in LIMITS if body.get(name) is not None]
    for name in limits:
        body[name] = min(body[name], 8)
    if not limits:  # or it would go on to the end of the context
        body["max_output_tokens" if "input" in body else "max_tokens"] = 8
    if body.get("min_tokens") is not None:
        body["min_tokens"] = min(body["min_tokens"], *(body[name] for name in LIMITS if body.get(name) is not None), 8)
    if body.get("n") is not None:
        body["n"] = min(body["n"], 3)
    choice = body.get("tool_choice")
    if isinstance(choice, dict):  # of chats, or of responses
        tool = body["tools"][0]
        name = tool["function"]["name"] if "function" in tool else tool["name"]
        if "function" in choice:
            choice["function"]["name"] = name
        else:
            choice["name"] = name
    forms = [name for name in FORMS if body.get(name) is not None]
    forced = isinstance(choice, dict) or choice == "required"  # is a form of its own
    for name in forms if forced else forms[1:]:
        del body[name]
    return body
