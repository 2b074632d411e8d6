"""A frontend's side of the connection to the engine's process: asyncio, one task that reads."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxllm.engine.iterations import KEPT
from jaxllm.serve import wire

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 0.1
_HANDSHAKE_SECONDS = 10.0


class EngineFailedError(RuntimeError):
    """The engine is not there (yet, or any more), or failed on this request."""


class EngineBusyError(RuntimeError):
    """Too many requests are waiting."""


class RefusedError(ValueError):
    """The engine can never serve this request."""


@dataclass(slots=True)
class Progress:
    """News of one sequence. `logprobs` and `prompt_logprobs` are the flat lists of jaxllm/serve/wire.py."""

    index: int
    tokens: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: list[list[Any]] | None
    prompt_logprobs: list[list[Any] | None] | None
    cached_tokens: int


@dataclass
class Call:
    """One request on its way through the engine."""

    id: int
    client: EngineClient
    num_open: int  # sequences that have not ended
    _news: deque[Progress] = field(default_factory=deque)
    _error: Exception | None = None
    _waiter: asyncio.Future[None] | None = None

    async def news(self) -> list[Progress]:
        """What came since the last time, at least one thing; empty when all sequences have ended.

        Raises:
            RefusedError, EngineBusyError: the request was not taken.
            EngineFailedError: the engine died, or failed on this request.
        """
        while not self._news:
            if self._error is not None:
                raise self._error
            if self.num_open <= 0:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        news = list(self._news)
        self._news.clear()
        return news

    def put(self, progress: Progress) -> None:
        self._news.append(progress)
        if progress.finish_reason is not None:
            self.num_open -= 1
        self._wake()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def stop(self, index: int) -> None:
        """One sequence needs no more tokens."""
        self.client.send({"type": "stop", "id": self.id, "index": index})

    def close(self) -> None:
        """Nobody wants to hear of this request any more: if it still runs, it is cancelled and its pages are free."""
        if self.client.calls.pop(self.id, None) is not None and self.num_open > 0:
            self.client.send({"type": "abort", "id": self.id})


class EngineClient:
    """Talks to the engine's process, and to the next one when that has died.

    Attributes:
        hello: what the engine said when it was connected; None while there is none.
        stats: the counters of its last status. iterations: its last iterations, oldest first.
        calls: requests on their way, by id.
    """

    def __init__(self, path: str, key: bytes, on_hello: Callable[[dict[str, Any]], None] | None = None) -> None:
        self._path, self._key, self._on_hello = path, key, on_hello
        self.hello: dict[str, Any] | None = None
        self.stats: dict[str, Any] = {}
        self.iterations: deque[list[Any]] = deque(maxlen=KEPT)
        self.calls: dict[int, Call] = {}
        self.was_connected = False
        self.death: str | None = None
        self._silent = 0.0
        self._heard = time.monotonic()
        self._ids = itertools.count()
        self._writer: asyncio.StreamWriter | None = None
        self._channel: wire.Channel | None = None

    @property
    def seconds_silent(self) -> float:
        """Seconds since the step loop was last known to pass."""
        return self._silent + time.monotonic() - self._heard

    async def run(self) -> None:
        """Connects, reads until the connection ends, and connects again, until this task is cancelled."""
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(self._path)
            except OSError:
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            try:
                await self._read_all(reader, writer)
            except (OSError, ValueError, asyncio.IncompleteReadError, TimeoutError) as error:
                logger.warning("the connection to the engine ended: %s", str(error) or type(error).__name__)
            finally:
                writer.close()
                self._lose("the engine's process is gone")
            await asyncio.sleep(_RETRY_SECONDS)

    async def _read_all(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(_HANDSHAKE_SECONDS):
            mine = wire.new_nonce()
            writer.write(mine)
            self._channel = wire.Channel(self._key, False, mine, await reader.readexactly(wire.NONCE_BYTES))
            writer.write(self._channel.seal({"type": "hello"}))
            hello = await self._read(reader, self._channel)
        self.iterations.clear()
        self.hello, self.death, self._writer = hello, None, writer
        self._silent, self._heard = 0.0, time.monotonic()
        self.was_connected = True
        if self._on_hello is not None:
            self._on_hello(hello)
        while True:
            message = await self._read(reader, self._channel)
            if message["type"] == "updates":
                for update in message["updates"]:
                    self._deliver(*update)
            elif message["type"] == "status":
                self.stats, self.death = message["stats"], message["death"]
                self._silent, self._heard = message["silent"], time.monotonic()
                self.iterations.extend(message["iterations"])

    @staticmethod
    async def _read(reader: asyncio.StreamReader, channel: wire.Channel) -> dict[str, Any]:
        length, tag = wire.split_header(await reader.readexactly(wire.HEADER_BYTES))
        return channel.unseal(tag, await reader.readexactly(length))

    def _deliver(self, request_id: int, *update: Any) -> None:
        call = self.calls.get(request_id)
        if call is None:
            return
        *progress, error = update
        if error is None:
            call.put(Progress(*progress))
            return
        kind, text = error
        call.fail({"invalid": RefusedError, "busy": EngineBusyError}.get(kind, EngineFailedError)(text))

    def _lose(self, reason: str) -> None:
        self.hello = self._writer = self._channel = None
        for call in list(self.calls.values()):
            call.fail(EngineFailedError(reason))

    def submit(
        self,
        prompt: list[int],
        params: dict[str, Any],
        *,
        n: int = 1,
        priority: float = 0.5,
        salt: str | None = None,
        stream: bool = True,
    ) -> Call:
        """Sends a request; `params` are fields of SamplingParams. Raises EngineFailedError when there is no engine."""
        if self._writer is None:
            raise EngineFailedError("the engine is not running")
        call = Call(next(self._ids), self, n)
        self.calls[call.id] = call
        message = {"prompt": wire.pack_tokens(prompt), "params": params, "priority": priority, "salt": salt}
        self.send({"type": "submit", "id": call.id, "stream": stream, **message})
        return call

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message if anyone is there to hear it."""
        if self._writer is not None and self._channel is not None and not self._writer.is_closing():
            self._writer.write(self._channel.seal(message))
