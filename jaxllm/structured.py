"""StructuredOutputs: the form that an output must have, checked when it is made. No jax here.

Names follow vLLM's `structured_outputs`; TensorRT-LLM's `GuidedDecodingParams` has the same fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

MAX_GRAMMAR_BYTES = 128 << 10
"""Longest schema, regular expression or grammar, as text; longer ones could not be compiled in time anyway."""

_KINDS = ("json", "regex", "choice", "grammar", "json_object")


class StructuredOutputsError(ValueError):
    """A constraint is contradictory, too long, or no grammar. The message names what, the rule and the way out."""


@dataclass(kw_only=True)
class StructuredOutputs:
    """What a text must look like; exactly one of the first five is given.

    Attributes:
      json: a JSON Schema, as a dict, as JSON text or as a pydantic model; the text is JSON that validates against it.
      regex: a regular expression (Rust's syntax, no look-around) that the whole text matches.
      choice: texts of which the output is one.
      grammar: a context-free grammar that has a rule `start` (Lark) or `root` (GBNF, EBNF with ::=).
      json_object: True for any JSON object.
      begin_after: id of a token up to which the output is free, such as the end of a model's reasoning; None = the
        whole output has the form.

    Raises:
      StructuredOutputsError (a ValueError): none or several are given, or one has the wrong type.
    """

    json: str | Mapping[str, Any] | type | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool = False
    begin_after: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool | None):
            raise StructuredOutputsError(
                f"structured outputs: json_object = {self.json_object!r} must be true or false"
            )
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            said = " and ".join(given) or "none of them"
            raise StructuredOutputsError(f"structured outputs: give one of {', '.join(_KINDS)}, not {said}")
        if self.json is not None and not isinstance(self.json, str | Mapping):
            self.json = _pydantic_schema(self.json)
        for name in ("regex", "grammar"):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or not text):
                raise StructuredOutputsError(f"structured outputs: {name} = {text!r} must be a text that is not empty")
        if self.choice is not None:
            choices = self.choice
            if isinstance(choices, str) or not all(isinstance(one, str) and one for one in choices) or not choices:
                raise StructuredOutputsError(f"structured outputs: choice = {choices!r} must be a list of texts")
        if self.begin_after is not None and (not isinstance(self.begin_after, int) or self.begin_after < 0):
            raise StructuredOutputsError(f"structured outputs: begin_after = {self.begin_after!r} must be a token id")
        length = len(self.source()[1].encode("utf-8", "replace"))
        if length > MAX_GRAMMAR_BYTES:
            raise StructuredOutputsError(
                f"structured outputs: {given[0]} has {length} bytes, more than {MAX_GRAMMAR_BYTES}; make it shorter"
            )

    @classmethod
    def of(cls, value: Any) -> StructuredOutputs:
        """`value` if it is one, else made of a mapping's items. Raises StructuredOutputsError."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise StructuredOutputsError(f"structured outputs = {value!r} must be a StructuredOutputs or a mapping")
        names = [field.name for field in fields(cls)]
        for name in value:
            if name not in names:
                raise StructuredOutputsError(f"structured outputs: {name!r} is unknown; there are {', '.join(names)}")
        return cls(**value)

    def source(self) -> tuple[str, str]:
        """(kind, text) of the constraint; equal ones have equal texts."""
        try:
            if self.json_object:
                return "json", '{"type": "object"}'
            if self.json is not None:
                return "json", self.json if isinstance(self.json, str) else json.dumps(self.json)
            if self.choice is not None:
                return "choice", json.dumps(list(self.choice))
        except (TypeError, ValueError, RecursionError) as error:
            raise StructuredOutputsError(f"structured outputs: the schema is not JSON: {error}") from None
        return ("regex", self.regex) if self.regex is not None else ("grammar", str(self.grammar))

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for another process; `of` reads it."""
        kind, text = self.source()
        found: dict[str, Any] = {kind: json.loads(text) if kind == "choice" else text}
        return found if self.begin_after is None else {**found, "begin_after": self.begin_after}


def _pydantic_schema(model: Any) -> Mapping[str, Any]:
    make = getattr(model, "model_json_schema", None)
    if make is None:
        raise StructuredOutputsError(
            f"structured outputs: json = {model!r} must be a schema (dict or JSON text) or a pydantic model"
        )
    found: Mapping[str, Any] = make()
    return found
