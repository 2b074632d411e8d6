"""What a model says, taken apart as it comes: its reasoning, the text for the client, and calls of functions."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxllm.serve.tools import ToolCall, ToolText

THINK, END_THINK = "<think>", "</think>"


@dataclass
class Spoken:
    """What is new: reasoning, text, calls in the form of a chunk's `tool_calls`, and why the sequence ended."""

    reasoning: str = ""
    text: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None


def choose_reasoning(setting: str, template: str | None) -> str | None:
    """The name of the reasoning parser; "auto" goes by the chat template. None where the model does not reason."""
    if setting == "auto":
        return "qwen3" if template is not None and END_THINK in template else None
    return None if setting == "none" else setting


class ReasoningText:
    """Splits an answer at the end of the model's reasoning.

    Args:
        parser: "deepseek_r1": an answer begins with reasoning, said or not; "qwen3": only where <think> says so.
        prompt_end: the last characters of the prompt; templates begin the reasoning there, or leave it out.
    """

    def __init__(self, parser: str, prompt_end: str) -> None:
        tail = prompt_end.rstrip()
        self.is_over = tail.endswith(END_THINK)
        # None: it is not known yet whether the answer begins with reasoning.
        self._inside: bool | None = True if tail.endswith(THINK) or parser == "deepseek_r1" else None
        if self.is_over:
            self._inside = False
        self._begun = self._skips = False
        self.is_there = bool(self._inside)  # whether the answer has any
        self._held = ""

    def feed(self, text: str, ended: bool) -> tuple[str, str]:
        """(new reasoning, new text) of new text of the model. Line ends after the marks belong to neither."""
        if self._inside is False:
            return "", self._after_mark(text)
        self._held += text
        if not self._begun and not self._begin(ended):
            return "", ""
        if not self._inside:
            text, self._held = self._held, ""
            return "", text
        at = self._held.find(END_THINK)
        if at >= 0:
            reasoning, rest = self._after_mark(self._held[:at]), self._held[at + len(END_THINK) :]
            self._inside, self._held, self.is_over, self._skips = False, "", True, True
            return reasoning, self._after_mark(rest)
        keep = 0 if ended else _overlap(self._held, END_THINK)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return self._after_mark(out), ""

    def _begin(self, ended: bool) -> bool:
        """Whether it is known by now if the answer begins with reasoning."""
        start = self._held.lstrip()
        if len(start) < len(THINK) and THINK.startswith(start) and not ended:
            return False
        self._begun = True
        if start.startswith(THINK):
            self._inside, self._held, self._skips = True, start.removeprefix(THINK), True
            self.is_there = True
        self._inside = bool(self._inside)
        return True

    def _after_mark(self, text: str) -> str:
        if self._skips:
            text = text.lstrip("\n")
            self._skips = not text
        return text


def _overlap(text: str, mark: str) -> int:
    """Characters at the end of a text that may be the beginning of a mark."""
    return next((count for count in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-count:])), 0)


class ReasoningTokens:
    """Counts the tokens of a sequence up to the end of its reasoning, the mark included.

    text_of: a token's text.
    """

    def __init__(self, text_of: Callable[[int], str]) -> None:
        self.count = 0
        self._text_of = text_of
        self._tail = ""
        self._is_over = False

    def add(self, tokens: Sequence[int]) -> None:
        """Takes the next tokens of the sequence."""
        for token in () if self._is_over else tokens:
            self.count += 1
            self._tail += self._text_of(token)
            if END_THINK in self._tail:
                self._is_over = True
                break
            self._tail = self._tail[1 - len(END_THINK) :]


class Caller(ABC):
    """Turns an answer, or a part of it, into calls."""

    @abstractmethod
    def feed(self, text: str, reason: str | None) -> Spoken:
        """What new text says; `reason` is given with the last."""


class ChosenCalls(Caller):
    """Calls that the model makes if it likes, in its own form; they come at the end."""

    def __init__(self, tools: ToolText) -> None:
        self._tools = tools

    def feed(self, text: str, reason: str | None) -> Spoken:
        text = self._tools.feed(text)
        if reason is None:
            return Spoken(text=text)
        rest, calls = self._tools.finish()
        bodies = [call.body(index) for index, call in enumerate(calls)]
        return Spoken(text=text + rest, calls=bodies, reason="tool_calls" if calls and reason == "stop" else reason)


class NamedCall(Caller):
    """The call of one function that the request names: all that is said are its arguments, as they come."""

    def __init__(self, name: str) -> None:
        self._call = ToolCall(name, "")
        self._begun = False

    def feed(self, text: str, reason: str | None) -> Spoken:
        if not text and (self._begun or reason is None):
            return Spoken(reason=reason)
        if self._begun:
            return Spoken(calls=[{"index": 0, "function": {"arguments": text}}], reason=reason)
        self._begun = True
        body = self._call.body(0)
        body["function"]["arguments"] = text
        return Spoken(calls=[body], reason=reason)


class ForcedCalls(Caller):
    """A JSON list of calls; a list that was cut off stays text."""

    def __init__(self) -> None:
        self._said = ""

    def feed(self, text: str, reason: str | None) -> Spoken:
        self._said += text
        if reason is None:
            return Spoken()
        try:
            calls = [ToolCall(one["name"], json.dumps(one["arguments"], ensure_ascii=False))
                     for one in json.loads(self._said)]  # fmt: skip
        except (ValueError, KeyError, TypeError, RecursionError):
            return Spoken(text=self._said, reason=reason)
        bodies = [call.body(index) for index, call in enumerate(calls)]
        return Spoken(calls=bodies, reason="tool_calls" if reason == "stop" else reason)


class Speech:
    """One sequence of a chat. `counter` belongs to the reasoning."""

    def __init__(
        self, reasoning: ReasoningText | None, caller: Caller | None, counter: ReasoningTokens | None = None
    ) -> None:
        self._reasoning, self._caller, self._counter = reasoning, caller, counter

    @property
    def reasoning_tokens(self) -> int:
        """Tokens so far that were reasoning; those of an answer that only might begin with some are not."""
        if self._reasoning is None or self._counter is None or not self._reasoning.is_there:
            return 0
        return self._counter.count

    def feed(self, text: str, reason: str | None, tokens: Sequence[int] = ()) -> Spoken:
        """What new text, made of these tokens, says; `reason` is given with the last."""
        thought = ""
        if self._counter is not None:
            self._counter.add(tokens)
        if self._reasoning is not None:
            thought, text = self._reasoning.feed(text, reason is not None)
        spoken = Spoken(text=text, reason=reason) if self._caller is None else self._caller.feed(text, reason)
        spoken.reasoning = thought
        return spoken
