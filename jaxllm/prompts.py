"""The forms a prompt may have, and what is wrong with those that have none of them."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxllm.sampling_params import SamplingParams
from jaxllm.settings import unknown_name_message

if TYPE_CHECKING:
    from jaxllm.engine.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]

NO_TOKENIZER = "this LLM has no tokenizer (skip_tokenizer_init=True); pass token ids instead of text"


class RequestError(ValueError):
    """A prompt is unusable. The message is one line: the value, the rule, the way out."""


def tokenize(
    prompt: Prompt, params: SamplingParams, tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[str | None, list[int]]:
    """A prompt in any of its forms -> (text or None, token ids), checked and truncated. Raises RequestError."""
    text: str | None = None
    given: Any = prompt
    if isinstance(prompt, Mapping):
        for name in prompt:
            if name not in ("prompt", "prompt_token_ids"):
                raise RequestError(unknown_name_message(str(name), ("prompt", "prompt_token_ids"), "key in a prompt"))
        given = prompt.get("prompt_token_ids")
        text = prompt.get("prompt")
        if given is None:
            given = text
    if isinstance(given, str):
        text = given
        if not text:
            raise RequestError("the prompt is empty; give at least one character")
        if tokenizer is None:
            raise RequestError(NO_TOKENIZER)
        token_ids = tokenizer.encode(text, add_special_tokens=params.add_special_tokens)
    else:
        token_ids = _token_ids(given)
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            bad = next(token for token in token_ids if not 0 <= token < vocab_size)
            raise RequestError(f"prompt token {bad} is not in the vocabulary; use ids in 0..{vocab_size - 1}")
    if not token_ids:
        raise RequestError("the prompt is empty; give at least one token")
    if params.truncate_prompt_tokens is not None:
        token_ids = token_ids[-params.truncate_prompt_tokens :]
    return text, token_ids


def check_messages(messages: Any) -> None:
    """Raise RequestError unless `messages` is a conversation: a list of {"role": str, "content": str}."""
    if isinstance(messages, str | Mapping) or not messages:
        raise RequestError(f"messages = {messages!r} must be a list like [{{'role': 'user', 'content': 'Hi'}}]")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"message {message!r} must be a dict with 'role' and 'content'")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise RequestError(f"message {message!r}: 'content' must be a str")


def _is_int(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool) and not hasattr(value, "__len__")


def _token_ids(value: Any) -> list[int]:
    """Any sequence of integers as a list of int. Raises RequestError for everything else."""
    if value is None or isinstance(value, bytes | bool) or not hasattr(value, "__iter__"):
        raise RequestError(
            f"prompt {value!r} must be a str, a list of token ids, {{'prompt': ...}} or {{'prompt_token_ids': ...}}"
        )
    tokens = []
    for token in value:
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise RequestError(f"prompt token {token!r} must be an integer")
        tokens.append(operator.index(token))
    return tokens


def as_batch(inputs: Any) -> tuple[list[Prompt], bool]:
    """(prompts, whether a single one was given). A list of integers is one prompt; an empty list has no prompts."""
    if isinstance(inputs, str | bytes | Mapping) or not hasattr(inputs, "__iter__"):
        return [inputs], True
    items = list(inputs)
    if items and _is_int(items[0]):
        return [items], True
    return items, False


def one_each(value: Any, count: int, name: str) -> list[Any]:
    """`value` for each of `count` prompts, or the list of values that was given. Raises RequestError."""
    if isinstance(value, list | tuple):
        if len(value) != count:
            raise RequestError(f"{len(value)} {name} for {count} prompts; give one for all, or one for each")
        return list(value)
    return [value] * count
