"""What a request gives back: a future, an iterator of partial results, and the result itself, in one object.

The engine's thread only appends updates to an inbox (`on_update`). They are applied, and text is made from tokens, in
the thread that asks for the result, so that a slow consumer or a long text never delays the next step.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllm.engine.request import Logprob, Update


@dataclass
class CompletionOutput:
    """One generated sequence. While streaming, `*_diff` hold what is new since the previous yield.

    Attributes:
        index: which of the request's `n` sequences.
        text: all text so far ("" without a tokenizer or with `detokenize=False`).
        token_ids: all tokens so far, the end token included.
        cumulative_logprob: sum of the log-probabilities of the tokens, when logprobs were asked for.
        logprobs: per token, token id -> Logprob, when asked for.
        prompt_logprobs: per prompt token (the first has none), when asked for.
        finish_reason: None while running, then "stop", "length", "cancelled" or "error".
        stop_reason: the stop string or stop token id that ended it; None for the model's own end token.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    _seen_text: int = field(default=0, repr=False)
    _seen_tokens: int = field(default=0, repr=False)
    _seen_logprobs: int = field(default=0, repr=False)

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        return len(self.token_ids)

    @property
    def text_diff(self) -> str:
        """Text since the previous yield."""
        return self.text[self._seen_text :]

    @property
    def token_ids_diff(self) -> list[int]:
        """Tokens since the previous yield."""
        return self.token_ids[self._seen_tokens :]

    @property
    def logprobs_diff(self) -> list[dict[int, Logprob]] | None:
        """`logprobs` of the tokens since the previous yield."""
        return None if self.logprobs is None else self.logprobs[self._seen_logprobs :]

    def _mark_seen(self) -> None:
        self._seen_text = len(self.text)
        self._seen_tokens = len(self.token_ids)
        self._seen_logprobs = len(self.logprobs or ())


@dataclass
class RequestTiming:
    """Clock readings of one request in seconds (`time.perf_counter`), taken when the engine reports; 0 = not yet."""

    submitted: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0
    tokens: int = 0

    @property
    def ttft(self) -> float:
        """Seconds from submission to the first token."""
        return self.first_token - self.submitted

    @property
    def e2e(self) -> float:
        """Seconds from submission to the last token."""
        return self.finished - self.submitted

    @property
    def tpot(self) -> float:
        """Seconds per token after the first one; 0 for a single token."""
        return (self.finished - self.first_token) / (self.tokens - 1) if self.tokens > 1 else 0.0


class GenerationResult:
    """The state of a submitted request, shared by the engine's thread (writer) and consumers (readers).

    As a future: `result(timeout)`, `await result`, `await result.aresult()`. As an iterator: `for` and `async for`
    yield this same object each time there is news, with cumulative `outputs` (use `*_diff` for the increments); without
    streaming they yield once, at the end. A request that failed raises its error from all of them.

    Attributes:
        request_id: unique within its LLM.
        prompt_token_ids: the prompt, special tokens and truncation included.
        outputs: a CompletionOutput for each sequence that is returned.
        error: why the request failed; None otherwise.
        timing: when it was submitted, had its first token and ended, in seconds; `ttft`, `tpot` and `e2e` of these.
    """

    def __init__(
        self,
        request_id: int,
        prompt_token_ids: list[int],
        num_outputs: int,
        *,
        streaming: bool = False,
        abort: Callable[[int], None] | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.outputs = [CompletionOutput(index) for index in range(num_outputs)]
        self.error: Exception | None = None
        self.timing = RequestTiming(submitted=time.perf_counter())
        self._streaming = streaming
        self._abort = abort
        self._aborted = False
        self._inbox: deque[Update] = deque()
        self._open = num_outputs  # sequences the engine has not reported as finished; written by its thread only
        self._condition = threading.Condition()
        self._apply_lock = threading.RLock()
        self._async_waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._done_callbacks: list[Callable[[GenerationResult], None]] = []
        self._begun = False
        self._closed = False  # every update was applied, the last one included
        self._exhausted = False  # an iterator has yielded the finished state

    # ---- the engine's side --------------------------------------------------------------------------------------

    def on_update(self, update: Update) -> None:
        """Take one update. Called in the engine's thread; costs well under a microsecond unless someone waits."""
        if update.token_ids:
            if not self.timing.tokens:
                self.timing.first_token = time.perf_counter()
            self.timing.tokens += len(update.token_ids)
        self._inbox.append(update)
        ended = False
        if update.error is not None:
            ended = self._open > 0
            self._open = 0
        elif update.finish_reason is not None:
            self._open -= 1
            ended = self._open == 0
        if ended:
            self.timing.finished = time.perf_counter()
        if ended or self._streaming:
            self._wake(ended)

    def _wake(self, ended: bool) -> None:
        with self._condition:
            self._condition.notify_all()
            waiters, self._async_waiters = self._async_waiters, []
            callbacks = self._done_callbacks if ended else []
            if ended:
                self._done_callbacks = []
        for loop, future in waiters:
            with contextlib.suppress(RuntimeError):  # its event loop was closed: nobody is waiting any more
                loop.call_soon_threadsafe(_set_if_pending, future)
        for callback in callbacks:
            callback(self)

    # ---- the consumer's side ------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """True when all sequences have ended and their updates were taken in by `result`, `await` or iteration."""
        return self._closed

    def done(self) -> bool:
        """True when the engine has ended the request; `result()` then returns (or raises) at once."""
        return self._open <= 0

    def abort(self) -> None:
        """Ask the engine to stop: the result then ends with finish_reason "cancelled". Harmless when it has ended."""
        self._aborted = True
        if self._abort is not None and not self.done():
            self._abort(self.request_id)

    def aborted(self) -> bool:
        """True after `abort()` was called."""
        return self._aborted

    def add_done_callback(self, callback: Callable[[GenerationResult], None]) -> None:
        """Call `callback(self)` once the request has ended, in the engine's thread (at once if it already has)."""
        with self._condition:
            if not self.done():
                self._done_callbacks.append(callback)
                return
        callback(self)

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait until the request has ended and return this object.

        Raises:
            TimeoutError: it has not ended after `timeout` seconds (it goes on; `abort()` stops it).
            Exception: the request's own error.
        """
        self.wait(timeout)
        if self.error is not None:
            raise self.error
        return self

    def wait(self, timeout: float | None = None) -> None:
        """Like `result`, but a failed request does not raise: look at `error`."""
        with self._condition:
            if not self._condition.wait_for(self.done, timeout):
                raise TimeoutError(f"request {self.request_id} has not ended after {timeout} s; abort() stops it")
        self._apply_inbox()

    async def aresult(self) -> GenerationResult:
        """`result()` for asyncio: waits without blocking the event loop."""
        while not self.done():
            await self._async_news(self.done)
        self._apply_inbox()
        if self.error is not None:
            raise self.error
        return self

    def __await__(self) -> Generator[Any, None, GenerationResult]:
        return self.aresult().__await__()

    def __iter__(self) -> Iterator[GenerationResult]:
        return self

    def __next__(self) -> GenerationResult:
        if self._exhausted:
            raise StopIteration
        with self._condition:
            self._condition.wait_for(self._has_news)
        return self._next_state()

    def __aiter__(self) -> AsyncIterator[GenerationResult]:
        return self

    async def __anext__(self) -> GenerationResult:
        if self._exhausted:
            raise StopAsyncIteration
        while not self._has_news():
            await self._async_news(self._has_news)
        return self._next_state()

    def _has_news(self) -> bool:
        return self.done() or (self._streaming and bool(self._inbox))

    def _next_state(self) -> GenerationResult:
        self._apply_inbox()
        if self.error is not None:
            self._exhausted = True
            raise self.error
        self._exhausted = self._closed
        return self

    async def _async_news(self, ready: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self._condition:
            if ready():  # the engine's thread notifies under this lock, so that nothing is missed after this check
                return
            self._async_waiters.append((loop, future))
        await future

    def _apply_inbox(self) -> None:
        """Apply all updates received so far, in order, then bring the texts up to date."""
        with self._apply_lock:
            if self._closed:
                return
            for output in self.outputs:
                output._mark_seen()
            if not self._begun:
                self._begun = True
                self._begin()
            before = [(len(output.token_ids), output.finish_reason) for output in self.outputs]
            texts: dict[int, str] = {}
            # Read before the inbox is emptied: the engine's thread appends the last update and then changes `_open`.
            closed = self.done()
            while self._inbox:
                update = self._inbox.popleft()
                self._apply(update)
                if update.text is not None:
                    texts[update.index] = update.text
            # One call for all new tokens of an output: a result that nobody streamed is detokenised in one go.
            for output, (known, reason) in zip(self.outputs, before, strict=True):
                ended = reason is None and output.finish_reason is not None
                if ended or len(output.token_ids) > known or output.index in texts:
                    self._make_text(output, output.token_ids[known:], texts.get(output.index), ended)
            if closed:
                self._closed = True
                self._finish()

    def _apply(self, update: Update) -> None:
        if update.error is not None:
            self.error = update.error
            for output in self.outputs:
                output.finish_reason = output.finish_reason or "error"
            return
        output = self.outputs[update.index]
        output.token_ids.extend(update.token_ids)
        if update.logprobs:
            output.logprobs = output.logprobs or []
            output.logprobs.extend(update.logprobs)
            chosen = (row[token].logprob for token, row in zip(update.token_ids, update.logprobs, strict=True))
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + sum(chosen)
        if update.prompt_logprobs is not None:
            output.prompt_logprobs = update.prompt_logprobs
        if update.finish_reason is not None:
            reason = update.finish_reason
            output.finish_reason = getattr(reason, "value", reason)
            output.stop_reason = update.stop_reason

    def _begin(self) -> None:
        """Called once, before the first update is applied."""

    def _make_text(self, output: CompletionOutput, new_tokens: list[int], text: str | None, ended: bool) -> None:
        """Extend `output.text` by `new_tokens`, or take over the engine's `text`. Results of tokens only have none."""

    def _finish(self) -> None:
        """Called once, after the last update."""

    def _fail(self, error: Exception) -> None:
        """End a request that never reached the engine."""
        self.error = error
        self._open = 0
        self.timing.first_token = self.timing.finished = time.perf_counter()
        for output in self.outputs:
            output.finish_reason = "error"


def _set_if_pending(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
