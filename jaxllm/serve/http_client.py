"""A small HTTP/1.1 client for asyncio: connections are kept, answers can be read as they come.

The benchmark and run-batch put hundreds of requests on their way at once; a general client would cost more per event
than the server does.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from jaxllm.settings import ConfigError

_LINE_LIMIT = 1 << 20


class HttpError(ConnectionError):
    """The server closed the connection, or spoke something else than HTTP."""


@dataclass
class Answer:
    """A status and headers; the body is read by `chunks` or `read`, once."""

    status: int
    headers: dict[str, str]
    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter
    complete: bool = False

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body in the pieces in which it was sent."""
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await self._reader.readuntil(b"\r\n")).partition(b";")[0], 16):
                yield (await self._reader.readexactly(size + 2))[:-2]
            while (await self._reader.readuntil(b"\r\n")) != b"\r\n":
                pass
        elif "content-length" in self.headers:
            if size := int(self.headers["content-length"]):
                yield await self._reader.readexactly(size)
        else:
            while piece := await self._reader.read(1 << 16):
                yield piece
            self.headers["connection"] = "close"
        self.complete = True

    async def read(self) -> bytes:
        return b"".join([piece async for piece in self.chunks()])

    async def events(self) -> AsyncIterator[str]:
        """The data of server-sent events, [DONE] included."""
        rest = b""
        async for piece in self.chunks():
            *whole, rest = (rest + piece).split(b"\n\n")
            for event in whole:
                if event.startswith(b"data: "):
                    yield event[6:].decode()


@dataclass
class Client:
    """Talks to one server.

    Args:
        url: http:// or https://, host and port; a path is put before that of every request.
        headers: sent with every request.
    """

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    _free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{self.url!r} is not a URL of a server; write for example http://127.0.0.1:8000")
        self._host, self._tls = parts.hostname, parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix, self._authority = parts.path.rstrip("/"), parts.netloc

    async def request(self, method: str, path: str, body: Any = None) -> Answer:
        """Sends a request with a JSON body. Raises HttpError, OSError.

        The answer's body must be read to its end, and `done` called with it, before its connection serves again.
        """
        payload = b"" if body is None else json.dumps(body).encode()
        headers = {"host": self._authority, "content-length": str(len(payload)), **self.headers}
        if payload:
            headers["content-type"] = "application/json"
        lines = [f"{method} {self._prefix}{path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        raw = ("\r\n".join(lines) + "\r\n\r\n").encode() + payload
        kept = bool(self._free)
        reader, writer = self._free.pop() if kept else await self._connect()
        try:
            return await self._exchange(reader, writer, raw)
        except (HttpError, ConnectionError):
            writer.close()
            if not kept:
                raise
        # The server may close a kept connection at any time, also while we write: that is no answer to this request.
        reader, writer = await self._connect()
        return await self._exchange(reader, writer, raw)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context = ssl.create_default_context() if self._tls else None
        return await asyncio.open_connection(self._host, self._port, ssl=context, limit=_LINE_LIMIT)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, raw: bytes) -> Answer:
        writer.write(raw)
        await writer.drain()
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            raise HttpError("the server closed the connection") from None
        first, *lines = head[:-4].split("\r\n")
        _, _, status = first.partition(" ")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if not status[:3].isdigit():
            raise HttpError("the server does not speak HTTP")
        return Answer(int(status[:3]), headers, reader, writer)

    def done(self, answer: Answer) -> None:
        """The answer was read, or is not wanted any more: its connection is kept, or closed."""
        if answer.complete and answer.headers.get("connection", "").lower() != "close":
            self._free.append((answer._reader, answer._writer))
        else:
            answer._writer.close()

    async def json(self, method: str, path: str, body: Any = None) -> tuple[Answer, Any]:
        """Sends a request and reads its answer; (answer, what its body says, None when it is not JSON)."""
        answer = await self.request(method, path, body)
        try:
            try:
                return answer, json.loads(await answer.read())
            except ValueError:
                return answer, None
        finally:
            self.done(answer)

    def close(self) -> None:
        for _, writer in self._free:
            writer.close()
        self._free.clear()
