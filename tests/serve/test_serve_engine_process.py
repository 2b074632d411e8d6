"""The engine's side of a frontend's connection: what crosses on the way between its threads."""

from __future__ import annotations

import itertools
import socket
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from jaxllm.engine.request import Request
from jaxllm.serve import wire
from jaxllm.serve.engine_process import Connection

PARAMS = {"max_tokens": 4, "structured_outputs": {"regex": "a"}}
SUBMIT = {"type": "submit", "id": 7, "prompt": wire.pack_tokens([5]), "params": PARAMS, "priority": 0.5, "salt": None}


class FakeEngine:
    """Remembers what it was asked for."""

    num_waiting = 0

    def __init__(self) -> None:
        self.submitted: list[Request] = []
        self.aborted: list[int] = []

    def submit(self, request: Request) -> None:
        self.submitted.append(request)

    def abort(self, request_id: int) -> None:
        self.aborted.append(request_id)


class Crossing(dict[int, bool]):
    """While somebody looks whether a request is being compiled, the compiling thread comes to its end."""

    end: threading.Thread

    def __contains__(self, key: object) -> bool:
        found = super().__contains__(key)
        self.end.start()
        self.end.join(0.3)
        return found


def test_an_abort_that_crosses_the_end_of_a_compilation_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "_write_all", lambda self: None)
    engine, jobs = FakeEngine(), []
    hub: Any = SimpleNamespace(
        engine=engine,
        max_queue_size=10,
        request_ids=itertools.count(),
        hello=lambda: {"type": "hello"},
        compilers=SimpleNamespace(submit=lambda *job: jobs.append(job)),
    )
    mine, theirs = socket.socketpair()
    with mine, theirs:
        connection = Connection(hub, mine, wire.Channel(b"k" * 32, True, b"a" * 32, b"b" * 32))
        connection._handle({**SUBMIT, "stream": True})
        ((job, *arguments),) = jobs
        connection._compiling = crossing = Crossing(connection._compiling)
        crossing.end = threading.Thread(target=job, args=arguments)
        connection._handle({"type": "abort", "id": 7})
        crossing.end.join(10)
        assert [request.request_id for request in engine.submitted] == engine.aborted == [0]
        assert len(crossing) == 0
