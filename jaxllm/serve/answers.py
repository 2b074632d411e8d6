"""OpenAI's response bodies, whole and in chunks, made of generations."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxllm.engine.tokenizer import Tokenizer
from jaxllm.serve.generation import Delta, Generation


def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, list[int]]:
    """A token alone as text, and the bytes that it stands for."""
    if tokenizer.is_byte_level:
        found = tokenizer.token_bytes(token)
        return found.decode("utf-8", "replace"), list(found)
    text = (tokenizer.backend.id_to_token(token) or "").replace("\u2581", " ")
    if len(text) == 6 and text.startswith("<0x"):
        return chr(int(text[3:5], 16)), [int(text[3:5], 16)]
    return text, list(text.encode("utf-8", "replace"))


def _entries(row: list[Any]) -> Iterator[tuple[int, float]]:
    """(token, logprob) of a flat row, the sampled token first."""
    for at in range(0, len(row), 3):
        yield row[at], row[at + 1]


def _likeliest(row: list[Any], count: int) -> list[tuple[int, float]]:
    """The `count` likeliest tokens of a row, without the sampled one unless it is among them."""
    return sorted(_entries(row), key=lambda entry: -entry[1])[:count]


def chat_logprobs(tokenizer: Tokenizer, tokens: list[int], rows: list[list[Any]], top: int) -> dict[str, Any]:
    """`logprobs` of a chat choice."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, found = token_text(tokenizer, token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": found}

    content = []
    for token, row in zip(tokens, rows, strict=True):
        best = [entry(*likely) for likely in _likeliest(row, top)]
        content.append({**entry(token, row[1]), "top_logprobs": best})
    return {"content": content, "refusal": None}


@dataclass
class CompletionLogprobs:
    """`logprobs` of a completion choice, which grow; `text_offset` counts characters from the start of its text."""

    tokenizer: Tokenizer
    top: int
    offset: int = 0

    def make(self, tokens: list[int], rows: list[list[Any] | None]) -> dict[str, Any]:
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, row in zip(tokens, rows, strict=True):
            text = token_text(self.tokenizer, token)[0]
            found["tokens"].append(text)
            found["text_offset"].append(self.offset)
            self.offset += len(text)
            if row is None:  # the first token of a prompt
                found["token_logprobs"].append(None)
                found["top_logprobs"].append(None)
                continue
            found["token_logprobs"].append(max(row[1], -9999.0))
            best: dict[str, float] = {}
            # OpenAI always names the chosen token; of tokens that read the same, the likelier one counts.
            for other, logprob in [*_likeliest(row, self.top), (token, row[1])]:
                best.setdefault(token_text(self.tokenizer, other)[0], max(logprob, -9999.0))
            found["top_logprobs"].append(best)
        return found


def usage(generations: list[Generation], dropped: int = 0) -> dict[str, Any]:
    """Token counts; `dropped` tokens were generated and not asked for."""
    prompt = sum(len(generation.prompt) for generation in generations)
    completion = max(0, sum(generation.num_tokens for generation in generations) - dropped)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(generation.cached_tokens for generation in generations)},
    }


@dataclass
class Envelope:
    """What all chunks of an answer have in common."""

    kind: str
    prefix: str
    model: str
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"

    def wrap(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id, "object": self.kind, "created": self.created, "model": self.model, "choices": choices, **more
        }  # fmt: skip


def to_json(value: Any) -> bytes:
    """Compact JSON; what is not Unicode is escaped."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def sse(value: Any) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


async def merged(generations: list[Generation]) -> AsyncIterator[tuple[int, list[Delta]]]:
    """(which generation, its news) of several generations as they come. The first error ends all."""
    if len(generations) == 1:
        async for deltas in generations[0].deltas():
            yield 0, deltas
        return
    queue: asyncio.Queue[tuple[int, list[Delta] | Exception | None]] = asyncio.Queue()

    async def follow(number: int, generation: Generation) -> None:
        try:
            async for deltas in generation.deltas():
                queue.put_nowait((number, deltas))
            queue.put_nowait((number, None))
        except Exception as error:
            queue.put_nowait((number, error))

    tasks = [asyncio.create_task(follow(number, one)) for number, one in enumerate(generations)]
    try:
        left = len(tasks)
        while left:
            number, news = await queue.get()
            if isinstance(news, Exception):
                raise news
            if news is None:
                left -= 1
            else:
                yield number, news
    finally:
        for task in tasks:
            task.cancel()
