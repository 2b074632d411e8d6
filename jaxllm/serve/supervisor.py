"""The process that `jaxllm serve` is: it listens, starts the engine and the frontends, and watches over them.

It imports neither jax nor an HTTP server, so that nothing which can go wrong in those can take it along.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxllm.config import EngineConfig
from jaxllm.options import EXIT_USAGE
from jaxllm.serve.settings import ServeConfig
from jaxllm.settings import ConfigError

EXIT_ENGINE_DIED = 1
_POLL_SECONDS = 0.05
_RESTART_WINDOW_SECONDS = 600.0
_MAX_FRONTEND_RESTARTS = 10
_DEATH_NOTICE_SECONDS = 2.0  # /health tells of a dead engine for so long before the server goes
_KILL_SECONDS = 10.0


@dataclass
class Child:
    """A process that was started from a module of this package, and what it reports."""

    name: str
    process: subprocess.Popen[bytes]
    reports: queue.SimpleQueue[dict[str, Any]] = field(default_factory=queue.SimpleQueue)
    ready: bool = False
    engine: int = 0  # process of the engine that a frontend is connected to
    error: str | None = None
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def start(
        cls, name: str, module: str, settings: dict[str, Any], key: bytes, fds: tuple[int, ...], env: dict[str, str]
    ) -> Child:
        reader, writer = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, pass_fds=(*fds, writer), env={**os.environ, **env}
        )
        os.close(writer)
        child = cls(name, process)
        threading.Thread(target=child._read_reports, args=(reader,), daemon=True).start()
        assert process.stdin is not None
        boot = {"settings": settings, "key": key.hex(), "report_fd": writer}
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(boot).encode() + b"\n")
            process.stdin.flush()
        return child

    def _read_reports(self, fd: int) -> None:
        with open(fd, "rb") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    self.reports.put(json.loads(line))

    def look(self) -> int | None:
        """Takes in the reports; returns the exit code once it has ended."""
        code = self.process.poll()
        with contextlib.suppress(queue.Empty):
            while True:
                report = self.reports.get_nowait()
                self.ready = self.ready or bool(report.get("ready"))
                self.engine = report.get("engine", self.engine)
                self.error = report.get("error", self.error)
        return code

    def tell(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def end(self, seconds: float) -> None:
        """SIGTERM, and SIGKILL after so many seconds."""
        self.tell(signal.SIGTERM)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError when the address cannot be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}; give another --port or --host") from None
    return sock


class Supervisor:
    """Starts the children, and ends when they do or when it is told to."""

    def __init__(
        self,
        engine: EngineConfig,
        settings: ServeConfig,
        debug: bool = False,
        on_ready: Callable[[str], None] | None = None,
    ) -> None:
        self._settings = settings
        self._on_ready = on_ready
        self._model = settings.served_model_name or engine.model
        self._listener = listen(settings.host, settings.port)
        self._key = secrets.token_bytes(32)
        self._directory = tempfile.mkdtemp(prefix="jaxllm-")  # readable by this user only, as mkdtemp makes it
        self._told = {
            "engine": engine.model_dump(mode="json", exclude_unset=True),
            "serve": settings.model_dump(mode="json"),
            "socket": str(Path(self._directory) / "engine.sock"),
            "max_queue_size": settings.max_queue_size,
            "listen_fd": self._listener.fileno(),
            "log_level": settings.log_level,
            "log_format": settings.log_format,
            "debug": debug,
        }
        self._stop = threading.Event()
        self._engine: Child | None = None
        self._frontends: list[Child] = []
        self._engine_deaths: list[float] = []
        self._frontend_deaths = 0
        self._announced = False

    @property
    def url(self) -> str:
        host, port = self._listener.getsockname()[:2]
        scheme = "https" if self._settings.ssl_certfile else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def stop(self) -> None:
        """Ends `run` as a signal does."""
        self._stop.set()

    def run(self) -> int:
        """Serves until a signal or a death; returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        try:
            self._engine = self._start_engine()
            self._frontends = [self._start_frontend() for _ in range(self._settings.num_serve_frontends)]
            code = self._watch()
        finally:
            self._end_all()
            shutil.rmtree(self._directory, ignore_errors=True)
        return code

    def _start_engine(self) -> Child:
        return Child.start("engine", "jaxllm.serve.engine_process", self._told, self._key, (), {})

    def _start_frontend(self) -> Child:
        # Each thread that tokenises would get a heap of its own: 32 threads hold 310 MB, and with four heaps 245.
        env = {"MALLOC_ARENA_MAX": os.environ.get("MALLOC_ARENA_MAX", "4")}
        if self._settings.num_serve_frontends > 1:
            shared = Path(self._directory) / "metrics"
            shared.mkdir(exist_ok=True)
            env["PROMETHEUS_MULTIPROC_DIR"] = str(shared)
        fds = (self._listener.fileno(),)
        return Child.start("frontend", "jaxllm.serve.frontend", self._told, self._key, fds, env)

    def _watch(self) -> int:
        while not self._stop.wait(_POLL_SECONDS):
            assert self._engine is not None
            code = self._engine.look()
            if code is not None and (ended := self._on_engine_death(code)) is not None:
                return ended
            if not self._engine.ready and time.monotonic() - self._engine.started > self._settings.engine_start_timeout:
                _say(f"error: the engine did not start within {self._settings.engine_start_timeout:g} s")
                return EXIT_ENGINE_DIED
            for index, frontend in enumerate(self._frontends):
                code = frontend.look()
                if code is None:
                    continue
                self._frontend_deaths += 1
                if not frontend.ready or self._frontend_deaths > _MAX_FRONTEND_RESTARTS:
                    _say(f"error: {frontend.error or f'a frontend ended with {code}'}")
                    return EXIT_USAGE if code == EXIT_USAGE else 1
                _say(f"a frontend ended with {code} and is started again")
                self._frontends[index] = self._start_frontend()
            pid = self._engine.process.pid
            if not self._announced and self._engine.ready and all(one.engine == pid for one in self._frontends):
                self._announced = True
                if self._on_ready is not None:
                    self._on_ready(self.url)
                    self._on_ready = None
                _say(f"serving {self._model} at {self.url} (engine: process {pid})")
        _say("shutting down")
        return 0

    def _on_engine_death(self, code: int) -> int | None:
        """What to exit with, or None when the engine was started again."""
        assert self._engine is not None
        if not self._engine.ready and not self._engine_deaths:  # its settings are wrong: trying again cannot help
            _say(f"error: {self._engine.error or f'the engine ended with {code} before it was ready'}")
            return EXIT_USAGE if code == EXIT_USAGE else EXIT_ENGINE_DIED
        now = time.monotonic()
        recent = [death for death in self._engine_deaths if now - death < _RESTART_WINDOW_SECONDS]
        self._engine_deaths = [*recent, now]
        if len(recent) < self._settings.restart_engine:
            _say(f"the engine died ({_how(code)}) and is started again")
            self._announced = False
            self._engine = self._start_engine()
            return None
        _say(f"error: the engine died ({_how(code)}); --restart_engine N would start it again")
        self._stop.wait(_DEATH_NOTICE_SECONDS)
        return EXIT_ENGINE_DIED

    def _end_all(self) -> None:
        """Frontends first, which drain; then the engine."""
        for frontend in self._frontends:
            frontend.tell(signal.SIGTERM)
        end = time.monotonic() + self._settings.drain_timeout + _KILL_SECONDS
        for frontend in self._frontends:
            frontend.end(max(0.1, end - time.monotonic()))
        if self._engine is not None:
            self._engine.end(_KILL_SECONDS)
        self._listener.close()


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def _say(text: str) -> None:
    print(f"jaxllm: {text}", file=sys.stderr, flush=True)
