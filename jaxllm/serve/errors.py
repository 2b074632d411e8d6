"""Errors as OpenAI's clients expect them: a status, and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from jaxllm.serve.client import EngineBusyError, EngineFailedError, RefusedError

RETRY_SECONDS = 1


class ApiError(Exception):
    """What a client is told when its request fails.

    Args:
        status: of HTTP. kind: "type" of the envelope. param: the field at fault. code: for programs.
        retry: seconds for Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        retry: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = {} if retry is None else {"retry-after": str(retry)}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str, retry: int = RETRY_SECONDS) -> ApiError:
    return ApiError(503, message, "server_error", code=code, retry=retry)


def timed_out(seconds: float) -> ApiError:
    return ApiError(504, f"the request was not finished within {seconds:g} s", "server_error", code="request_timeout")


def as_api_error(error: Exception, *, engine_is_there: bool = True) -> ApiError | None:
    """The error of a request in its API form; None for what nobody foresaw."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineBusyError):
        return unavailable(str(error), "queue_full")
    if isinstance(error, EngineFailedError):
        if not engine_is_there:
            return unavailable(str(error), "engine_not_running", retry=5)
        return ApiError(500, str(error), "server_error", code="engine_failed")
    if isinstance(error, RefusedError | ValueError):
        return bad_request(str(error))
    return None


def internal_error() -> dict[str, Any]:
    """The envelope for what nobody foresaw; what it was stands in the log, and is nobody else's business."""
    return ApiError(500, "internal error; the server's log tells more", "server_error", code="internal_error").body
