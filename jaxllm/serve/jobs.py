"""What a completion and a chat have in common as requests on their way: submit, collect or stream, close."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from jaxllm.serve.answers import Envelope, merged, sse
from jaxllm.serve.errors import bad_request
from jaxllm.serve.generation import Delta, Generation
from jaxllm.serve.protocol import Generate
from jaxllm.serve.server import Server


class Job(ABC):
    """One request: `start` submits it; then either `whole` or `chunks`; `close` whatever happens."""

    envelope: Envelope
    chunk_kind: str

    def __init__(self, server: Server, body: Generate) -> None:
        self.server = server
        self.body = body
        self.n = body.n or 1
        self.generations: list[Generation] = []

    @abstractmethod
    async def start(self) -> None:
        """Tokenises and submits. Raises ApiError."""

    @abstractmethod
    def usage(self) -> dict[str, Any]:
        """Token counts so far."""

    @abstractmethod
    async def whole(self) -> dict[str, Any]:
        """The finished answer. Raises what `Generation.deltas` does."""

    @abstractmethod
    def opening(self, number: int) -> list[dict[str, Any]]:
        """Choices to send before the first news of a generation."""

    @abstractmethod
    def choice(self, number: int, delta: Delta) -> dict[str, Any]:
        """A chunk's choice."""

    def close(self) -> None:
        for generation in self.generations:
            generation.close()

    async def chunks(self) -> AsyncIterator[bytes]:
        """Events of the stream as they go over the line; nothing is yielded before the engine took the request."""
        options = self.body.stream_options
        wants_usage = options is not None and bool(options.include_usage or options.continuous_usage_stats)
        everywhere = options is not None and bool(options.continuous_usage_stats)
        self.envelope.kind = self.chunk_kind
        opened: set[int] = set()
        async for number, deltas in merged(self.generations):
            choices = [self.choice(number, delta) for delta in deltas]
            if number not in opened:
                opened.add(number)
                first = self.opening(number)
                if self.body.return_token_ids and first:
                    first[0]["prompt_token_ids"] = self.generations[number].prompt
                choices = first + choices
            more: dict[str, Any] = {"usage": self.usage() if everywhere else None} if wants_usage else {}
            yield b"".join([sse(self.envelope.wrap([choice], **more)) for choice in choices])
        if wants_usage:
            yield sse(self.envelope.wrap([], usage=self.usage()))
        yield b"data: [DONE]\n\n"

    def failure(self, body: dict[str, Any]) -> bytes:
        """The events with which a stream ends that failed; clients look for an error among them."""
        return sse(body) + b"data: [DONE]\n\n"

    async def _collect(self) -> list[list[Whole]]:
        """Everything that was generated, by generation and sequence."""
        found = [[Whole() for _ in range(self.n)] for _ in self.generations]
        async for number, deltas in merged(self.generations):
            for delta in deltas:
                found[number][delta.index].add(delta)
        return found


class Whole:
    """A finished sequence."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.tokens: list[int] = []
        self.rows: list[list[Any]] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.tokens += delta.tokens
        self.rows += delta.logprobs or []
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason

    @property
    def text(self) -> str:
        return "".join(self.texts)


def check_min_tokens(params: dict[str, Any], server: Server) -> None:
    """ApiError where min_tokens is more than max_tokens, or than any answer can have."""
    most, least = params.get("max_tokens"), params.get("min_tokens")
    if least is None:
        return
    if most is not None and least > most:
        raise bad_request(f"min_tokens = {least} is more than max_tokens = {most}", "min_tokens")
    context = server.hello["max_seq_len"]
    if least >= context:
        raise bad_request(f"min_tokens = {least} does not fit the context of {context} tokens", "min_tokens")
