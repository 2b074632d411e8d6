"""Compiles grammars in a process of its own first: one that takes too long, or overruns the compiler's stack, costs
that process and not the engine.

The child reads grammars as lines of JSON and answers each with a line: what is wrong, or null. It is started with the
first grammar and ends when its standard input does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

SECONDS = 5.0
"""That a grammar may take to compile."""

LIMITS: dict[str, Any] = {"step_lexer_fuel": 50_000, "max_lexer_states": 50_000, "step_max_items": 20_000}
"""Of llguidance; by these the worst mask that was measured took 0.1 s, where its own allow 2 s."""

WHITESPACE = r"(?: |\n {0,16})?"
"""Between the tokens of JSON: what json.dumps writes, with and without indent. An end, unlike JSON's own rule: a model
at a high temperature would otherwise write spaces until its tokens are spent."""

_STACK_BYTES = 1 << 20  # an eighth of what the engine's threads have: what compiles here compiles there


class GrammarError(ValueError):
    """A schema, regular expression or grammar cannot be used."""


def make_grammar(kind: str, text: str) -> str:
    """llguidance's form of a constraint, as `StructuredOutputs.source` has it. Raises GrammarError."""
    from llguidance import LLMatcher, grammar_from

    try:
        if kind == "json":
            options: Any = {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE}
            return LLMatcher.grammar_from_json_schema(text, overrides=options)
        return grammar_from(kind, text)  # type: ignore[arg-type]
    except (ValueError, RecursionError, KeyError, IndexError, AttributeError) as error:
        raise GrammarError(_first_line(str(error) or type(error).__name__)) from None


class GrammarChecker:
    """The child, seen from the process that needs grammars; any thread may call `check`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None

    def check(self, kind: str, text: str) -> None:
        """Raises GrammarError that says why a constraint cannot be used."""
        with self._lock:
            if self._child is not None and self._child.poll() is not None:
                self._end()  # something else ended it: no fault of this constraint
            if self._child is None:
                command = [sys.executable, "-m", __name__]
                self._child = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
                )
            child = self._child
            assert child.stdin is not None and child.stdout is not None
            late = threading.Event()

            def give_up() -> None:
                late.set()
                child.kill()

            timer = threading.Timer(SECONDS, give_up)
            timer.start()
            try:
                child.stdin.write(json.dumps([kind, text]) + "\n")
                child.stdin.flush()
                line = child.stdout.readline()
            except OSError:
                line = ""
            finally:
                timer.cancel()
            if not line:
                self._end()
                took = f"did not compile within {SECONDS:g} s" if late.is_set() else "is too deep for its compiler"
                raise GrammarError(f"the {_name(kind)} {took}; make it simpler")
        problem = json.loads(line)
        if problem is not None:
            raise GrammarError(f"the {_name(kind)} cannot be used: {problem}")

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with suppress(OSError):  # closing sends what is left, and nobody reads it any more
                        pipe.close()

    def close(self) -> None:
        """Ends the child; the next check would start another."""
        with self._lock:
            self._end()


def _name(kind: str) -> str:
    return {"json": "JSON schema", "regex": "regular expression", "choice": "list of choices"}.get(kind, kind)


def _first_line(text: str) -> str:
    # What comes later quotes the grammar, which may be long.
    line = next((line.strip() for line in text.splitlines() if line.strip()), "it is no grammar")
    return line if len(line) <= 200 else line[:197] + "..."


def _problem(kind: str, text: str) -> str | None:
    from llguidance import LLMatcher, LLParserLimits

    try:
        grammar = make_grammar(kind, text)
    except GrammarError as error:
        return str(error)
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LLParserLimits(**LIMITS))
    return _first_line(messages[0]) if is_error else None


def _serve() -> None:
    for line in sys.stdin:
        print(json.dumps(_problem(*json.loads(line))), flush=True)


if __name__ == "__main__":
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()
