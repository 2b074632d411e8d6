"""Tokens become text in the frontend: stop strings over token borders, end tokens, what is held back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxllm.engine.tokenizer import Tokenizer
from jaxllm.serve.answers import CompletionLogprobs, chat_logprobs, to_json
from jaxllm.serve.client import Progress
from jaxllm.serve.generation import Delta, Output, TextOptions
from tests.tiny_llm import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_directory(make_tokenizer(Path(tmp_path_factory.mktemp("tokenizer"))))


def feed(output: Output, tokens: list[int], reason: str | None = None, logprobs: Any = None) -> Delta:
    return output.take(Progress(output.index, tokens, reason, None, logprobs, None, 0))


def test_a_stop_string_over_tokens(tokenizer: Tokenizer) -> None:
    output = Output(0, tokenizer, TextOptions(("XYZ",)))
    ids = {character: tokenizer.backend.token_to_id(character) for character in "abXYZ"}
    seen = [feed(output, [ids[character]]) for character in "aXbXY"]
    assert [delta.text for delta in seen] == ["a", "", "Xb", "", ""]
    rows = [[ids["Z"], -1.0, 1], [ids["a"], -2.0, 1]]
    last = feed(output, [ids["Z"], ids["a"]], logprobs=rows)
    assert (last.text, last.finish_reason, last.stop_reason) == ("", "stop", "XYZ")
    assert last.tokens == [ids["Z"]] and last.logprobs == rows[:1] and output.num_tokens == 6


def test_a_stop_string_that_stays(tokenizer: Tokenizer) -> None:
    output = Output(0, tokenizer, TextOptions(("ab", "b"), keep_stop=True, min_tokens=3))
    a, b = (tokenizer.backend.token_to_id(character) for character in "ab")
    assert feed(output, [b]).text == "b"
    delta = feed(output, [a, b])
    assert (delta.text, delta.stop_reason) == ("ab", "ab")


def test_what_was_held_back_comes_at_the_end(tokenizer: Tokenizer) -> None:
    output = Output(0, tokenizer, TextOptions(("abc",)))
    a, b = (tokenizer.backend.token_to_id(character) for character in "ab")
    assert feed(output, [a]).text == ""
    assert feed(output, [b], "length").text == "ab"


@pytest.mark.parametrize(("keep", "text"), [(False, "a"), (True, "ab")])
def test_the_end_token_is_no_text(tokenizer: Tokenizer, keep: bool, text: str) -> None:
    a, b = (tokenizer.backend.token_to_id(character) for character in "ab")
    for stops in ((), ("zzz",)):
        delta = feed(Output(0, tokenizer, TextOptions(stops, keep_stop=keep)), [a, b], "stop")
        assert delta.text == text and delta.tokens == [a, b]


def test_logprobs_in_both_forms(tokenizer: Tokenizer) -> None:
    a, b = (tokenizer.backend.token_to_id(character) for character in "ab")
    row = [b, -3.0, 9, a, -0.5, 1]  # b was sampled, a is the likeliest
    (entry,) = chat_logprobs(tokenizer, [b], [row], 1)["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("b", -3.0, [98])
    assert [(one["token"], one["logprob"]) for one in entry["top_logprobs"]] == [("a", -0.5)]
    found = CompletionLogprobs(tokenizer, 1)
    assert found.make([a, b], [None, row]) == {
        "tokens": ["a", "b"],
        "token_logprobs": [None, -3.0],
        "top_logprobs": [None, {"a": -0.5, "b": -3.0}],
        "text_offset": [0, 1],
    }
    assert found.make([b], [row])["text_offset"] == [2]


def test_json_of_what_is_not_unicode() -> None:
    assert to_json({"a": "é"}) == '{"a":"é"}'.encode()
    assert to_json({"a": "\ud800"}) == b'{"a":"\\ud800"}'
