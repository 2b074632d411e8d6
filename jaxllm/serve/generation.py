"""One prompt on its way through the engine, as a frontend sees it: tokens become text, stop strings are found."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from jaxllm.engine.stop_strings import StopWatch
from jaxllm.engine.tokenizer import IncrementalDecoder, Tokenizer
from jaxllm.serve.client import Call, EngineFailedError, Progress
from jaxllm.serve.errors import timed_out
from jaxllm.serve.metrics import Metrics


@dataclass(slots=True)
class Delta:
    """What is new of one sequence."""

    index: int
    text: str
    tokens: list[int]
    logprobs: list[list[Any]] | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become text, and which text ends a sequence."""

    stops: tuple[str, ...] = ()
    keep_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0


class Output:
    """The text of one sequence as its tokens arrive."""

    def __init__(self, index: int, tokenizer: Tokenizer, options: TextOptions) -> None:
        self.index = index
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self._decoder = IncrementalDecoder(tokenizer, options.skip_special_tokens)
        self._keep_stop = options.keep_stop
        self._watch = None
        if options.stops:
            self._watch = StopWatch(self._decoder, options.stops, options.keep_stop, options.min_tokens)
        self._sent = 0  # characters of the watch's text

    def take(self, news: Progress) -> Delta:
        """Makes text of new tokens. A stop string ends the sequence: the tokens after it are dropped."""
        tokens, logprobs, reason, stop = news.tokens, news.logprobs, news.finish_reason, news.stop_reason
        # The end token is part of the tokens, and of the text only when it is asked for.
        spoken = tokens[:-1] if reason == "stop" and not self._keep_stop else tokens
        if self._watch is None:
            text = self._decoder.decode(spoken)
            if reason is not None:
                text += self._decoder.flush()
        else:
            for count, token in enumerate(spoken, 1):
                found = self._watch.find(token, self.num_tokens + count)
                if found is not None:
                    tokens = tokens[:count]
                    logprobs = None if logprobs is None else logprobs[:count]
                    reason, stop = "stop", found
                    break
            else:
                if reason is not None:
                    self._watch.text += self._decoder.flush()
            known = self._watch.text if reason is not None else self._watch.safe_text()
            text, self._sent = known[self._sent :], max(self._sent, len(known))
        self.num_tokens += len(tokens)
        self.finish_reason = reason
        return Delta(self.index, text, tokens, logprobs, reason, stop)


@dataclass
class Generation:
    """A submitted prompt; iterate over `deltas`, and `close` it whatever happens.

    deadline: time of the event loop at which it is given up. limit: the seconds that that were, for the message.
    """

    call: Call
    prompt: list[int]
    outputs: list[Output]
    metrics: Metrics
    deadline: float | None = None
    limit: float = 0.0
    prompt_logprobs: list[list[Any] | None] | None = None
    cached_tokens: int = 0
    started: float = field(default_factory=time.monotonic)
    _first: float = 0.0
    _last: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens generated in all sequences."""
        return sum(output.num_tokens for output in self.outputs)

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What is new, until all sequences have ended. Raises what `Call.news` does; ApiError after the deadline."""
        while any(output.finish_reason is None for output in self.outputs):
            try:
                async with asyncio.timeout_at(self.deadline):
                    news = await self.call.news()
            except TimeoutError:
                self.metrics.ended("timeout")
                raise timed_out(self.limit) from None
            if not news:
                raise EngineFailedError("the engine ended the request early")
            found = [delta for progress in news if (delta := self._take(progress)) is not None]
            if found:
                self._count(found)
                yield found

    def _take(self, news: Progress) -> Delta | None:
        output = self.outputs[news.index]
        if output.finish_reason is not None:
            return None
        if news.finish_reason in ("cancelled", "error"):
            raise EngineFailedError("the engine ended the request early")
        self.cached_tokens = news.cached_tokens
        if news.prompt_logprobs is not None:
            self.prompt_logprobs = news.prompt_logprobs
        delta = output.take(news)
        if delta.finish_reason is not None and news.finish_reason is None:
            self.call.stop(news.index)
        return delta

    def _count(self, deltas: list[Delta]) -> None:
        now = time.monotonic()
        tokens = sum(len(delta.tokens) for delta in deltas)
        if not self._first:
            self._first = now
            self.metrics.first_token(now - self.started, len(self.prompt))
        elif tokens:
            self.metrics.more_tokens(now - self._last, tokens)
        self._last = now
        for delta in deltas:
            if delta.finish_reason is not None:
                count = self.outputs[delta.index].num_tokens
                self.metrics.ended(delta.finish_reason)
                self.metrics.finished(now - self.started, now - self._first, count)

    def close(self) -> None:
        """Cancels what still runs; its pages are free with the next step."""
        if any(output.finish_reason is None for output in self.outputs):
            self.metrics.ended("cancelled")
        self.call.close()
