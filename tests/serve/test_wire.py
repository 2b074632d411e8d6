"""Messages between the frontends and the engine: what was sealed is unsealed, and nothing else is."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from jaxllm.serve import wire
from jaxllm.serve.wire import Channel, WireError

KEY = b"k" * 32
MESSAGE: dict[str, Any] = {
    "type": "submit",
    "id": 1,
    "params": {"logit_bias": {5: -1.5}},
    "prompt": b"\x01\x00\x00\x00",
}


def channels(key_of_frontend: bytes = KEY) -> tuple[Channel, Channel]:
    """(engine's, frontend's) of one connection."""
    one, other = wire.new_nonce(), wire.new_nonce()
    return Channel(KEY, True, one, other), Channel(key_of_frontend, False, other, one)


def opened(channel: Channel, frame: bytes) -> dict[str, Any]:
    length, tag = wire.split_header(frame[: wire.HEADER_BYTES])
    body = frame[wire.HEADER_BYTES :]
    assert len(body) == length
    return channel.unseal(tag, body)


def test_both_directions() -> None:
    engine, frontend = channels()
    for _ in range(3):
        assert opened(engine, frontend.seal(MESSAGE)) == MESSAGE
        assert opened(frontend, engine.seal(MESSAGE)) == MESSAGE


def test_another_key() -> None:
    engine, stranger = channels(key_of_frontend=b"x" * 32)
    with pytest.raises(WireError, match="authentic"):
        opened(engine, stranger.seal(MESSAGE))


@pytest.mark.parametrize("position", [4, 35, 36, -1])
def test_a_changed_byte(position: int) -> None:
    engine, frontend = channels()
    frame = bytearray(frontend.seal(MESSAGE))
    frame[position] ^= 1
    with pytest.raises(WireError, match="authentic"):
        opened(engine, bytes(frame))


def test_repeated_left_out_and_sent_back() -> None:
    engine, frontend = channels()
    first, second, third = (frontend.seal(MESSAGE) for _ in range(3))
    opened(engine, first)
    with pytest.raises(WireError):
        opened(engine, first)
    with pytest.raises(WireError):
        opened(engine, third)
    assert opened(engine, second) == MESSAGE
    with pytest.raises(WireError):  # a frontend does not take its own words for the engine's
        opened(frontend, Channel(KEY, False, b"a" * 32, b"b" * 32).seal(MESSAGE))


def test_recorded_on_another_connection() -> None:
    _, frontend = channels()
    engine, _ = channels()
    with pytest.raises(WireError):
        opened(engine, frontend.seal(MESSAGE))


def test_only_messages() -> None:
    engine, frontend = channels()
    for wrong in ([1, 2], {"id": 1}, {"type": 3}):
        frame = frontend.seal(wrong)  # type: ignore[arg-type]
        with pytest.raises(WireError, match="no type"):
            opened(engine, frame)


def test_too_long() -> None:
    with pytest.raises(WireError, match="too long"):
        wire.split_header((wire.MAX_FRAME_BYTES + 1).to_bytes(4, "big") + bytes(32))


def test_over_a_socket_and_its_end() -> None:
    engine, frontend = channels()
    left, right = socket.socketpair()
    left.sendall(frontend.seal(MESSAGE) + frontend.seal(MESSAGE)[:-1])
    assert wire.read_message(right, engine) == MESSAGE
    left.close()
    with pytest.raises(WireError, match="closed"):
        wire.read_message(right, engine)


def test_tokens() -> None:
    tokens = [0, 1, 2**31 - 1]
    assert wire.unpack_tokens(wire.pack_tokens(tokens)) == tokens
