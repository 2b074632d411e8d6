"""What every request passes, whatever its route: its id, the key, limits, refusal while draining, the log line."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxllm.serve.errors import ApiError, as_api_error, internal_error, unavailable
from jaxllm.serve.server import Server

logger = logging.getLogger("jaxllm.serve.access")

# The page holds nothing but itself, and is where a person gives the key.
OPEN_ROUTES = frozenset({"/", "/health", "/metrics"})
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Gate:
    """ASGI middleware around the routes; `server` is set before the first request."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self._app, self._server = app, server
        key = server.settings.api_key
        self._key = None if key is None else hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        note: dict[str, Any] = {}
        scope["state"] = {**scope.get("state", {}), "note": note, "request_id": request_id}
        status = 0

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        work = scope["method"] == "POST"
        tracer = self._server.tracer if work else None
        span = None if tracer is None else tracer.start(scope["method"], scope["path"], headers, request_id)
        self._server.in_flight += work
        try:
            refusal = self._refuse(scope, headers, work)
            if refusal is not None:
                await refusal.response()(scope, receive, send_noted)
            else:
                await self._app(scope, self._limited(receive), send_noted)
        except asyncio.CancelledError:
            note.setdefault("outcome", "cancelled")
            raise
        except Exception as error:
            known = as_api_error(error) if isinstance(error, ApiError) else None
            if known is None:
                logger.exception("request %s failed", request_id)
            if not status:
                from starlette.responses import JSONResponse

                answer = known.response() if known is not None else JSONResponse(internal_error(), 500)
                await answer(scope, receive, send_noted)
        finally:
            self._server.in_flight -= work
            if tracer is not None:
                tracer.end(span, status, note)
            self._log(scope, request_id, status, time.monotonic() - started, note)

    def _refuse(self, scope: Scope, headers: dict[bytes, bytes], work: bool) -> ApiError | None:
        if scope["path"] not in OPEN_ROUTES and not self._authorised(headers.get(b"authorization", b"")):
            return ApiError(
                401,
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
            )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._server.settings.max_body_bytes:
            return self._too_long()
        if work and self._server.draining:
            return unavailable("the server is shutting down", "shutting_down", retry=5)
        return None

    def _authorised(self, header: bytes) -> bool:
        if self._key is None:
            return True
        scheme, _, token = header.partition(b" ")
        # Digests are compared, so that not even the key's length shows in the time that it takes.
        same = hmac.compare_digest(hashlib.sha256(token.strip()).digest(), self._key)
        return same and scheme.lower() == b"bearer"

    def _too_long(self) -> ApiError:
        limit = self._server.settings.max_body_bytes
        return ApiError(413, f"the body is longer than {limit} bytes", code="body_too_long")

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that counts bytes, and waits for a body only so long."""
        settings = self._server.settings
        deadline = asyncio.get_running_loop().time() + settings.body_timeout
        seen, complete = 0, False

        async def limited() -> Message:
            nonlocal seen, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408, f"the body did not arrive within {settings.body_timeout:g} s", code="body_timeout"
                ) from None
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if seen > settings.max_body_bytes:
                    raise self._too_long()
            return message

        return limited

    def _log(self, scope: Scope, request_id: str, status: int, seconds: float, note: dict[str, Any]) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        self._server.metrics.answered(route, status)
        level = logging.DEBUG if scope["path"] in OPEN_ROUTES else logging.INFO
        if not logger.isEnabledFor(level):
            return
        fields = {
            "request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status,
            "seconds": round(seconds, 4), **note,
        }  # fmt: skip
        text = " ".join(f"{name}={value}" for name, value in fields.items())
        logger.log(level, "%s", text, extra={"fields": fields})
