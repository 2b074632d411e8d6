"""The settings of the server, beside those of the engine; one YAML file may hold both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from jaxllm.config import EngineConfig
from jaxllm.settings import ConfigError, Strict, unknown_name_message


class ServeConfig(Strict):
    """How to serve.

    Attributes:
        host, port: where to listen; port 0 takes a free one.
        served_model_name: the name that clients use; None = the model as it was given.
        num_serve_frontends: processes that speak HTTP, tokenise and make text.
        api_key: bearer token that every route but /, /health and /metrics asks for; None = none.
        ssl_certfile, ssl_keyfile: PEM files; both or neither.
        tool_parser: the form in which the model writes tool calls; "auto" goes by its chat template.
        reasoning_parser: the form of its reasoning, which answers give as reasoning_content; "auto" as above.
        max_queue_size: sequences that may wait for the engine; more are refused with 503.
        response_store_bytes, response_store_seconds: what /v1/responses may keep in all, and how long.
        max_body_bytes, max_header_bytes: of a request.
        header_timeout: seconds that the head of a request may take from its first byte, or the connection's start.
        body_timeout: seconds in which the body of a request has to arrive.
        send_timeout: seconds after which a client that takes nothing of its answer is cut off.
        request_timeout: seconds after which a request is cancelled; None = never.
        drain_timeout: seconds that running requests get after SIGTERM.
        health_timeout: seconds of silence of the step loop after which /health answers 503.
        engine_start_timeout: seconds that the engine may take to start.
        otlp_traces_endpoint: URL that OpenTelemetry traces are sent to; None = none, unless its own variables name one.
        restart_engine: times that a dead engine is started again within ten minutes; 0 = exit instead.
        log_level, log_format: of standard error.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    served_model_name: str | None = Field(default=None, min_length=1)
    num_serve_frontends: int = Field(default=1, ge=1, le=64)
    tool_parser: Literal["auto", "none", "hermes", "llama3", "mistral", "deepseek"] = "auto"
    reasoning_parser: Literal["auto", "none", "deepseek_r1", "qwen3"] = "auto"
    api_key: str | None = Field(default=None, min_length=1)
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    max_queue_size: int = Field(default=2048, ge=1)
    response_store_bytes: int = Field(default=64 << 20, ge=0)
    response_store_seconds: float = Field(default=3600.0, gt=0)
    max_body_bytes: int = Field(default=32 << 20, ge=1024)
    max_header_bytes: int = Field(default=32 << 10, ge=1024)
    header_timeout: float = Field(default=30.0, gt=0)
    body_timeout: float = Field(default=30.0, gt=0)
    send_timeout: float = Field(default=120.0, gt=0)
    request_timeout: float | None = Field(default=None, gt=0)
    drain_timeout: float = Field(default=30.0, ge=0)
    health_timeout: float = Field(default=8.0, gt=0)
    engine_start_timeout: float = Field(default=3600.0, gt=0)
    otlp_traces_endpoint: str | None = None
    restart_engine: int = Field(default=0, ge=0)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"

    @model_validator(mode="after")
    def _fields_agree(self) -> ServeConfig:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl_certfile and ssl_keyfile belong together; give both or neither")
        return self


def split_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings of the server, those of the engine). Raises ConfigError for a name that neither has."""
    mine = {name: value for name, value in settings.items() if name in ServeConfig.model_fields}
    rest = {name: value for name, value in settings.items() if name not in mine}
    names = [*ServeConfig.model_fields, *EngineConfig.model_fields]
    for name in rest:
        if not EngineConfig.knows(name):
            raise ConfigError(unknown_name_message(name, names))
    return mine, rest
