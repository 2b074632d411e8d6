"""A frontend's process: uvicorn on the socket that the supervisor listens on. Imports no jax.

Run by the supervisor as `python -m jaxllm.serve.frontend`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxllm.serve.child import Boot, exit_code_of, start_logging, without_torch
from jaxllm.serve.errors import unavailable

logger = logging.getLogger("jaxllm.serve.frontend")

_KEEP_ALIVE_SECONDS = 75
_GRACE_SECONDS = 2


def main() -> int:
    boot = Boot.read()
    start_logging(boot)
    without_torch()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor says when
    with exit_code_of(boot) as ended:
        import uvicorn

        from jaxllm.config import EngineConfig
        from jaxllm.engine.tokenizer import load_tokenizer
        from jaxllm.serve.app import make_app
        from jaxllm.serve.client import EngineClient
        from jaxllm.serve.metrics import Metrics
        from jaxllm.serve.server import Server
        from jaxllm.serve.settings import ServeConfig
        from jaxllm.serve.store import ResponseStore
        from jaxllm.serve.tracing import Tracer
        from jaxllm.weights.resolve import resolve_model

        settings = ServeConfig(**boot.settings["serve"])
        engine = EngineConfig(**boot.settings["engine"])
        files = resolve_model(engine.model, need_weights=engine.load_format != "dummy")
        tokenizer = load_tokenizer(engine.tokenizer if engine.tokenizer is not None else files)
        client = EngineClient(boot.settings["socket"], boot.key, lambda hello: boot.report({"engine": hello["pid"]}))
        names = [settings.served_model_name or engine.model]
        kept = Path(boot.settings["socket"]).parent / "responses"
        store = ResponseStore(kept, settings.response_store_bytes, settings.response_store_seconds)
        tracer = Tracer.make(settings.otlp_traces_endpoint, names[0])
        server = Server(settings, names, tokenizer, client, Metrics(client, names[0]), store, tracer=tracer)
        config = uvicorn.Config(
            make_app(server),
            http="h11",  # the one that bounds the size of headers
            ws="none",
            h11_max_incomplete_event_size=settings.max_header_bytes,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_GRACE_SECONDS,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
            backlog=2048,
        )
        listener = socket.socket(fileno=boot.settings["listen_fd"])
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(_run(uvicorn.Server(config), server, listener, boot))
        if tracer is not None:
            tracer.close()
    return ended.code


async def _run(http, server, listener, boot) -> None:  # type: ignore[no-untyped-def]
    from jaxllm.serve.connections import Sweeper

    draining = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, draining.set)
    http.capture_signals = _no_signals  # ours drains first
    settings = server.settings
    sweeper = Sweeper(http.server_state.connections, settings.header_timeout, settings.send_timeout)
    tasks = [asyncio.create_task(_drain(http, server, draining)), asyncio.create_task(sweeper.run())]
    boot.report({"ready": True})
    try:
        await http.serve(sockets=[listener])
    finally:
        for task in tasks:
            task.cancel()


@contextlib.contextmanager
def _no_signals() -> Iterator[None]:
    yield


async def _drain(http, server, draining: asyncio.Event) -> None:  # type: ignore[no-untyped-def]
    """After SIGTERM: refuses new work, waits for what runs, and then ends the HTTP server."""
    await draining.wait()
    server.draining = True
    limit = server.settings.drain_timeout
    logger.info("draining: %d requests are running, they get %g s", server.in_flight, limit)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit):
            while server.in_flight:
                await asyncio.sleep(0.05)
    if server.in_flight:
        logger.warning("%d requests are cancelled: the time to drain is over", server.in_flight)
        for call in list(server.client.calls.values()):
            call.fail(unavailable("the server is shutting down", "shutting_down"))
        await asyncio.sleep(0.2)  # for their errors to be written
    http.should_exit = True


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
