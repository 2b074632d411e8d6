"""One server for all tests that need nothing special of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from jaxllm.engine.tokenizer import Tokenizer
from tests.serve.live import KEY, Live, serving


@pytest.fixture(scope="session")
def server_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="session")
def live(server_directory: Path) -> Iterator[Live]:
    """A server with two frontends, a key, a short queue and small limits."""
    options = ["--api_key", KEY, "--num_serve_frontends", "2", "--log_format", "json", "--max_queue_size", "30"]
    options += ["--max_body_bytes", "100000", "--body_timeout", "3", "--header_timeout", "2"]
    with serving(server_directory, *options) as server:
        server.http.headers["authorization"] = f"Bearer {KEY}"
        yield server
        assert server.end() == 0


@pytest.fixture(scope="session")
def tokenizer(live: Live, server_directory: Path) -> Tokenizer:
    """The tokenizer of that server."""
    return Tokenizer.from_directory(server_directory / "tokenizer")


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    """OpenAI's own, without retries."""
    with openai.OpenAI(base_url=live.url + "/v1", api_key=KEY, max_retries=0, timeout=60) as found:
        yield found
