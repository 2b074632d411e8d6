"""From the bytes of a request to a checked body, or to an error that names what is wrong."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from jaxllm.serve.errors import ApiError, bad_request

Model = TypeVar("Model", bound=BaseModel)


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a request. Raises ApiError."""
    try:
        found = json.loads(body, parse_constant=_no_constant, parse_float=_number)
    except (ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise bad_request(f"the body is not valid JSON: {what}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise bad_request("the body must be a JSON object", code="invalid_json")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _number(text: str) -> float:
    """JSON has one kind of number: 110.0 is the integer 110."""
    value = float(text)
    return int(value) if value.is_integer() else value


def validate(model: type[Model], body: dict[str, Any]) -> Model:
    """The request, checked. Raises ApiError that names the first field at fault."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _first_problem(error) from None


def _first_problem(error: ValidationError) -> ApiError:
    item = max(error.errors(include_url=False, include_context=False), key=_nearness)
    names = [str(part) for part in item["loc"] if not (isinstance(part, str) and ("[" in part or part in _KINDS))]
    where = ".".join(names)
    text = item["msg"].removeprefix("Value error, ")
    if not where:
        return bad_request(text)
    value = repr(item["input"])
    value = value if len(value) <= 80 else value[:77] + "..."
    return bad_request(f"{where} = {value}: {text[0].lower()}{text[1:]}", where)


def _nearness(item: ErrorDetails) -> tuple[int, bool, int]:
    """Of the alternatives of a union, pydantic reports each: how near this one comes to what was meant.

    That is the deepest, then the one whose type it is, then the one that fitted furthest into a list.
    """
    *_, last = item["loc"] or ("",)
    return len(item["loc"]), not item["type"].endswith("_type"), last if isinstance(last, int) else -1


_KINDS: frozenset[str] = frozenset({"str", "int", "constrained-str"})
