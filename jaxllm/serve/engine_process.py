"""The engine's process: the step loop, and a Unix socket through which frontends submit requests.

Run by the supervisor as `python -m jaxllm.serve.engine_process`. Reading and writing have threads of their own; the
step loop only appends its updates to the list of the connection that they are for.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.engine.request import Logprob, Request, Update
from jaxllm.sampling_params import SamplingParams
from jaxllm.serve import wire
from jaxllm.serve.child import Boot, exit_code_of, start_logging, without_torch

if TYPE_CHECKING:
    from jaxllm.engine.engine import Engine

logger = logging.getLogger("jaxllm.serve.engine")

STATUS_SECONDS = 0.25
EXIT_DEAD = 70
_HANDSHAKE_SECONDS = 10.0


class Hub:
    """Accepts frontends on a Unix socket and serves each until it goes away.

    Args:
        engine: what they talk to.
        path: of the socket; its directory must be the user's alone.
        key: that the frontends know as well.
        max_queue_size: sequences that may wait; further requests are refused as "busy".
    """

    def __init__(self, engine: Engine, path: str, key: bytes, max_queue_size: int) -> None:
        self.engine = engine
        self.max_queue_size = max_queue_size
        self.request_ids = itertools.count()
        self.connections: set[Connection] = set()
        # Grammars take up to seconds to compile; messages of other requests do not wait for them.
        self.compilers = ThreadPoolExecutor(2, "grammar")
        self._key = key
        Path(path).unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(64)
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(sock,), name="frontend", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            sock.settimeout(_HANDSHAKE_SECONDS)
            mine = wire.new_nonce()
            sock.sendall(mine)
            channel = wire.Channel(self._key, True, mine, wire.read_exactly(sock, wire.NONCE_BYTES))
            # Nothing about the engine is told before the other side has shown that it knows the key.
            if wire.read_message(sock, channel)["type"] != "hello":
                raise wire.WireError("a frontend has to begin with hello")
            sock.settimeout(None)
            connection = Connection(self, sock, channel)
        except (OSError, ValueError) as error:
            logger.warning("a connection was refused: %s", error)
            sock.close()
            return
        self.connections.add(connection)
        try:
            connection.read_all()
        finally:
            self.connections.discard(connection)

    def flush(self, seconds: float) -> None:
        """Waits until everything was sent, at most so long."""
        end = time.monotonic() + seconds
        while any(connection.has_news for connection in self.connections.copy()) and time.monotonic() < end:
            time.sleep(0.01)

    def hello(self) -> dict[str, Any]:
        engine = self.engine
        return {
            "type": "hello",
            "pid": os.getpid(),
            "max_seq_len": engine.max_seq_len,
            "vocab_size": engine.model_config.vocab_size,
            "page_size": engine.config.kv_cache_config.tokens_per_block,
            "start_seconds": engine.start_report,
        }


class Connection:
    """One frontend: its requests, a thread that writes to it, and `read_all`, which reads from it."""

    def __init__(self, hub: Hub, sock: socket.socket, channel: wire.Channel) -> None:
        self._hub, self._engine = hub, hub.engine
        self._sock, self._channel = sock, channel
        self._requests: dict[int, Request] = {}  # by the frontend's id
        self._news: deque[tuple[int, Request | None, Update]] = deque()
        self._compiling: dict[int, bool] = {}  # requests whose grammar is being compiled, and whether they are wanted
        self._lock = threading.Lock()  # of what a compiling thread and the reading one both look at and change
        self._wake = threading.Event()
        self._writing = False
        self._closed = False
        sock.sendall(channel.seal(hub.hello()))
        threading.Thread(target=self._write_all, name="write", daemon=True).start()

    @property
    def has_news(self) -> bool:
        """Whether anything is still to be sent."""
        return not self._closed and (bool(self._news) or self._writing)

    def read_all(self) -> None:
        """Handles messages until the frontend is gone; then whatever it had asked for is cancelled."""
        try:
            while True:
                self._handle(wire.read_message(self._sock, self._channel))
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not isinstance(error, OSError) or isinstance(error, wire.WireError):
                logger.info("a frontend is gone: %s", error)
        finally:
            self._closed = True
            self._wake.set()
            self._sock.close()
            for request in list(self._requests.values()):
                self._engine.abort(request.request_id)

    def _handle(self, message: dict[str, Any]) -> None:
        kind, request_id = message["type"], message["id"]
        if kind == "submit":
            if "structured_outputs" in message["params"]:
                self._compiling[request_id] = True
                self._hub.compilers.submit(self._submit_compiled, request_id, message)
            else:
                self._submit(request_id, message)
        elif not self._was_compiling(request_id) and request_id in self._requests:
            number = self._requests[request_id].request_id
            if kind == "abort":
                self._engine.abort(number)
            elif kind == "stop":
                self._engine.stop(number, message["index"])

    def _was_compiling(self, request_id: int) -> bool:
        """Whether the grammar of a request is being compiled; whatever it is told, it is wanted no more."""
        with self._lock:
            if request_id not in self._compiling:
                return False
            self._compiling[request_id] = False
            return True

    def _submit_compiled(self, request_id: int, message: dict[str, Any]) -> None:
        """Submits a request with a grammar, in a thread that may wait for it."""
        if self._compiling[request_id] and not self._closed:
            self._submit(request_id, message)
        with self._lock:
            wanted = self._compiling.pop(request_id)
        request = self._requests.get(request_id)
        if request is not None and (self._closed or not wanted):
            self._engine.abort(request.request_id)

    def _submit(self, request_id: int, message: dict[str, Any]) -> None:
        def on_update(update: Update) -> None:
            self._tell(request_id, request, update)

        try:
            waiting = self._engine.num_waiting
            if waiting >= self._hub.max_queue_size:
                raise QueueFullError(f"{waiting} requests are waiting already; try again later")
            request = Request(
                next(self._hub.request_ids),
                wire.unpack_tokens(message["prompt"]),
                SamplingParams(**message["params"]),  # type: ignore[arg-type]
                priority=message["priority"],
                cache_salt=message["salt"],
                on_update=on_update,
                prefix_cache=message["params"].get("prompt_logprobs") is None,
                stream=message["stream"],
            )
            self._requests[request_id] = request
            self._engine.submit(request)
        except (ValueError, RuntimeError) as error:
            self._tell(request_id, None, Update(0, [], error=error))

    def _tell(self, request_id: int, request: Request | None, update: Update) -> None:
        """Called in the step loop's thread: leaves the work to the thread that writes."""
        self._news.append((request_id, request, update))
        if not self._wake.is_set():
            self._wake.set()

    def _write_all(self) -> None:
        sent, due = 0, 0.0
        try:
            while not self._closed:
                self._wake.wait(max(0.0, due - time.monotonic()))
                self._writing = True
                self._wake.clear()
                updates = []
                while self._news:
                    request_id, request, update = self._news.popleft()
                    updates.append(_packed(request_id, request, update))
                    if update.error is not None or (request is not None and request.finished):
                        self._requests.pop(request_id, None)
                if updates:
                    self._sock.sendall(self._channel.seal({"type": "updates", "updates": updates}))
                if time.monotonic() >= due:
                    due = time.monotonic() + STATUS_SECONDS
                    iterations = self._engine.iterations.since(sent)
                    sent = iterations[-1].number if iterations else sent
                    self._sock.sendall(self._channel.seal(self._status([astuple(one) for one in iterations])))
                self._writing = False
        except OSError:
            self._closed = True
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)  # read_all finds out, and cleans up

    def _status(self, iterations: list[tuple[Any, ...]]) -> dict[str, Any]:
        engine = self._engine
        death = engine.death
        return {
            "type": "status",
            "stats": engine.stats(),
            "silent": engine.seconds_silent,
            "death": None if death is None else str(death),
            "iterations": iterations,
        }


class QueueFullError(RuntimeError):
    """Too many requests are waiting."""


def _packed(request_id: int, request: Request | None, update: Update) -> list[Any]:
    error = None
    if update.error is not None:
        kind = "invalid" if isinstance(update.error, ValueError) else "engine"
        error = ["busy" if isinstance(update.error, QueueFullError) else kind, str(update.error)]
    prompt = update.prompt_logprobs
    return [
        request_id,
        update.index,
        update.token_ids,
        None if update.finish_reason is None else update.finish_reason.value,
        update.stop_reason,
        None if update.logprobs is None else [_flat(row) for row in update.logprobs],
        None if prompt is None else [None if row is None else _flat(row) for row in prompt],
        0 if request is None else request.num_cached or 0,
        error,
    ]


def _flat(row: dict[int, Logprob]) -> list[float | int | None]:
    return [value for token, logprob in row.items() for value in (token, logprob.logprob, logprob.rank)]


def main() -> int:
    boot = Boot.read()
    start_logging(boot)
    without_torch()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor says when
    with exit_code_of(boot) as ended:
        from jaxllm.config import EngineConfig
        from jaxllm.engine.devices import look_early

        config = EngineConfig(**boot.settings["engine"])
        look_early()
        from jaxllm.engine.engine import Engine

        engine = Engine(config)
        hub = Hub(engine, boot.settings["socket"], boot.key, boot.settings["max_queue_size"])
        boot.report({"ready": True, "start_seconds": engine.start_report})
        while engine.death is None and not stop.wait(0.1):
            pass
        if not stop.is_set():
            logger.error("the engine died: %s", engine.death)
            ended.code = EXIT_DEAD
        engine.shutdown()
        hub.flush(2.0)
    return ended.code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # daemon threads may sit in calls of XLA that would abort the interpreter's own way out
