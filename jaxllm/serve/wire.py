"""Messages between the frontends and the engine's process: msgpack over a Unix socket, every message authenticated.

A frame is its length (4 bytes), a tag (32 bytes), and a msgpack map. The tag is HMAC-SHA256 over the direction, the
frame's number on this connection and the body, under a key made for the connection from the key that both processes
were started with and a nonce of each side: a frame that was changed, repeated, left out, moved or recorded on another
connection is refused, and with it the connection. Nothing is unpickled.

A frontend says

    submit   id, prompt (int32 bytes), params (fields of SamplingParams), priority, salt, stream
    stop     id, index        it has seen a stop string in a sequence
    abort    id

and the engine

    hello    what the engine is: sizes, names, seconds of its start
    updates  list of [id, index, tokens, finish reason, stop reason, logprobs, prompt logprobs, cached tokens, error]
    status   counters, how long the step loop has been silent, the iterations since the last status

Logprobs are flat lists [token, logprob, rank, ...], the sampled token first; an error is [kind, message].
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
from array import array
from collections.abc import Sequence
from typing import Any

import msgpack  # type: ignore[import-untyped]

NONCE_BYTES = 32
TAG_BYTES = 32
HEADER_BYTES = 4 + TAG_BYTES
MAX_FRAME_BYTES = 256 << 20
_HEADER = struct.Struct(f">I{TAG_BYTES}s")
_NUMBER = struct.Struct(">Q")


class WireError(ConnectionError):
    """The peer closed the connection, or sent what it must not."""


class Channel:
    """One connection's keys and frame numbers, for one side; thread-safe in that `seal` and `unseal` are independent.

    Args:
        key: shared by both processes.
        is_engine: which side this is.
        mine, theirs: the nonces that this side sent and received.
    """

    def __init__(self, key: bytes, is_engine: bool, mine: bytes, theirs: bytes) -> None:
        nonces = mine + theirs if is_engine else theirs + mine
        connection = hmac.digest(key, b"jaxllm connection" + nonces, "sha256")
        to_engine, to_frontend = (hmac.digest(connection, name, "sha256") for name in (b"to engine", b"to frontend"))
        self._send_key, self._receive_key = (to_frontend, to_engine) if is_engine else (to_engine, to_frontend)
        self._sent = self._received = 0

    def seal(self, message: dict[str, Any]) -> bytes:
        """The next frame to send."""
        body: bytes = msgpack.packb(message)
        tag = hmac.digest(self._send_key, _NUMBER.pack(self._sent) + body, "sha256")
        self._sent += 1
        return _HEADER.pack(len(body), tag) + body

    def unseal(self, tag: bytes, body: bytes) -> dict[str, Any]:
        """The message of the next frame received. Raises WireError when it is not authentic or not a message."""
        wanted = hmac.digest(self._receive_key, _NUMBER.pack(self._received) + body, "sha256")
        if not hmac.compare_digest(tag, wanted):
            raise WireError("a message was not authentic")
        self._received += 1
        message = msgpack.unpackb(body, strict_map_key=False)
        if not isinstance(message, dict) or not isinstance(message.get("type"), str):
            raise WireError("a message has no type")
        return message


def split_header(header: bytes) -> tuple[int, bytes]:
    """(length of the body, tag). Raises WireError for a body that no message has."""
    length, tag = _HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise WireError(f"a message of {length} bytes is too long")
    return length, tag


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def read_exactly(sock: socket.socket, count: int) -> bytes:
    """That many bytes from a blocking socket. Raises WireError at its end."""
    parts = bytearray()
    while len(parts) < count:
        part = sock.recv(min(count - len(parts), 1 << 20))
        if not part:
            raise WireError("the connection was closed")
        parts += part
    return bytes(parts)


def read_message(sock: socket.socket, channel: Channel) -> dict[str, Any]:
    """The next message from a blocking socket. Raises WireError."""
    length, tag = split_header(read_exactly(sock, HEADER_BYTES))
    return channel.unseal(tag, read_exactly(sock, length))


def pack_tokens(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()


def unpack_tokens(packed: bytes) -> list[int]:
    tokens = array("i")
    tokens.frombytes(packed)
    return tokens.tolist()
