"""Clients that are slow on purpose, do not read, or stop halfway: they are cut off and hold nothing."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import h11
import pytest
import uvicorn

from jaxllm.serve.connections import Sweeper
from tests.serve.live import KEY, Live

pytestmark = pytest.mark.timeout(120)


class Connection:
    """What the sweeper looks at of a connection of uvicorn."""

    def __init__(self, received: bytes = b"", unread: int = 0, cycle: Any = None) -> None:
        self.conn = h11.Connection(h11.SERVER)
        if received:
            self.conn.receive_data(received)
            self.conn.next_event()
        self.cycle, self.unread, self.aborted = cycle, unread, False
        self.transport = SimpleNamespace(get_write_buffer_size=lambda: self.unread, abort=self.abort)

    def abort(self) -> None:
        self.aborted = True


def test_who_is_cut_off() -> None:
    whole = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    silent, begun = Connection(), Connection(b"GET / HT")
    resting, works, again = Connection(cycle=object()), Connection(whole), Connection(b"GET", cycle=object())
    stuck, slow = Connection(whole, unread=9), Connection(whole, unread=9)
    everybody = [silent, begun, resting, works, again, stuck, slow]
    sweeper = Sweeper(everybody, header_timeout=10, send_timeout=20)
    assert [sweeper.sweep(now) for now in (0, 9)] == [0, 0]
    slow.unread = 8
    assert sweeper.sweep(10) == 3 and silent.aborted and begun.aborted and again.aborted
    for gone in (silent, begun, again):
        everybody.remove(gone)
    assert sweeper.sweep(20) == 1 and stuck.aborted
    everybody.remove(stuck)
    assert sweeper.sweep(25) == 0 and sweeper.sweep(31) == 1 and slow.aborted
    assert not resting.aborted and not works.aborted


@contextmanager
def connected(live: Live, sent: bytes) -> Iterator[socket.socket]:
    with socket.create_connection((live.http.base_url.host, live.http.base_url.port), 20) as sock:
        sock.sendall(sent)
        yield sock


def request(**fields: Any) -> bytes:
    raw = json.dumps({"prompt": "The cat", "max_tokens": 50, "ignore_eos": True, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-length: {len(raw)}\r\n"
    return head.encode() + b"\r\n" + raw


def nothing_runs(live: Live) -> bool:
    names = ("jaxllm_num_requests_running", "jaxllm_num_requests_waiting", "jaxllm_kv_cache_usage_perc")
    return [live.until_metric(name, 0) for name in names] == [0, 0, 0]


def test_a_request_that_never_begins(live: Live) -> None:
    began = time.monotonic()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-slow: a"
    with connected(live, b"") as silent, connected(live, head) as begun:
        for sock in (silent, begun):
            with suppress(ConnectionResetError):
                assert sock.recv(100) == b""
    assert 1.5 < time.monotonic() - began < 10


def test_a_client_that_does_not_read() -> None:
    """More is sent than the sockets' buffers take; the answer's task ends, and the connection with it."""
    told: list[str] = []

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        async def gone() -> None:
            while (message := await receive())["type"] != "http.disconnect":
                pass
            told.append(message["type"])

        watch = asyncio.create_task(gone())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not watch.done():
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await asyncio.sleep(0)

    async def run() -> None:
        server = uvicorn.Server(uvicorn.Config(endless, http="h11", lifespan="off", log_config=None))
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sweeper = Sweeper(server.server_state.connections, header_timeout=5, send_timeout=1)
            tasks = [asyncio.create_task(server.serve([listener])), asyncio.create_task(sweeper.run())]
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, listener.getsockname())
            sock.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            async with asyncio.timeout(20):
                while not told:
                    await asyncio.sleep(0.05)
            assert not server.server_state.connections
            server.should_exit = True
            await tasks[0]
            tasks[1].cancel()

    asyncio.run(run())


def test_a_client_that_says_it_is_done_has_gone(live: Live) -> None:
    """A half-closed connection is one that nobody reads any more, as for most servers: its request is cancelled."""
    for stream in (False, True):
        with connected(live, request(n=16, stream=stream)) as sock:
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass
        assert nothing_runs(live)
