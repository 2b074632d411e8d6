"""Connections that hold a place and do nothing: their requests never begin, or nobody reads their answers.

uvicorn bounds how long a connection may rest between two requests, and the gate how long a body may take. What is left
are a client that never ends the head of its request, and one that is answered and does not read: of the latter's
stream the frontend holds what fits the socket's buffer, and the rest waits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from typing import Any

import h11

logger = logging.getLogger("jaxllm.serve.access")

_MOST_SECONDS_BETWEEN_SWEEPS = 5.0


class Sweeper:
    """Looks at all connections now and then, and cuts those that made no progress for too long.

    Args:
        connections: uvicorn's, as its h11 protocol makes them; others come and go while this runs.
        header_timeout: seconds that the head of a request may take.
        send_timeout: seconds in which a client has to take something of what was sent to it.
    """

    def __init__(self, connections: Collection[Any], header_timeout: float, send_timeout: float) -> None:
        self._connections = connections
        self._header_timeout, self._send_timeout = header_timeout, send_timeout
        self._seen: dict[Any, tuple[Any, float]] = {}  # what a connection waits with, and since when

    async def run(self) -> None:
        """Sweeps until it is cancelled."""
        pause = min(self._header_timeout / 4, self._send_timeout / 4, _MOST_SECONDS_BETWEEN_SWEEPS)
        while True:
            await asyncio.sleep(pause)
            self.sweep(time.monotonic())

    def sweep(self, now: float) -> int:
        """Cuts what has waited too long by `now` (seconds of any clock); returns how many."""
        seen, cut = dict[Any, tuple[Any, float]](), 0
        for connection in list(self._connections):
            waits = self._waits_with(connection)
            if waits is None:
                continue
            before, since = self._seen.get(connection, (None, now))
            if before != waits:
                since = now
            what, _ = waits
            limit = self._header_timeout if what == "head" else self._send_timeout
            if now - since >= limit:
                reason = "its request did not begin" if what == "head" else "it took nothing of its answer"
                logger.info("a client was cut off: %s for %g s", reason, limit)
                connection.transport.abort()
                cut += 1
            else:
                seen[connection] = waits, since
        self._seen = seen
        return cut

    @staticmethod
    def _waits_with(connection: Any) -> tuple[str, Any] | None:
        """("answer", bytes that nobody takes), ("head", number of requests before); None for one that is not stuck."""
        unread = connection.transport.get_write_buffer_size()
        if unread:
            return "answer", unread
        if connection.conn.their_state is not h11.IDLE:
            return None
        # A connection that rests between requests is uvicorn's; the last cycle is kept, so that its identity stays.
        has_begun = bool(connection.conn.trailing_data[0]) or connection.cycle is None
        return ("head", connection.cycle) if has_begun else None
