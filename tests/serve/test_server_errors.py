"""What a server answers to requests that it cannot serve, in the official client's own types."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.serve.live import CHAT, KEY, TEXT, Live, text_of
from tests.tiny_llm import MAX_SEQ_LEN, VOCAB

pytestmark = pytest.mark.timeout(300)


def test_errors_are_the_clients_own_types(live: Live, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**{**CHAT, "model": "other"})
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**{**CHAT, "temperature": 3})
    assert bad.value.param == "temperature" and "less than or equal to 2" in bad.value.message
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="x" * 50, max_tokens=20)
    assert long.value.code == "context_length_exceeded" and "64 tokens" in long.value.message
    with openai.OpenAI(base_url=live.url + "/v1", api_key="wrong", max_retries=0) as stranger:
        for call in (stranger.models.list, lambda: stranger.chat.completions.create(**CHAT)):
            with pytest.raises(openai.AuthenticationError) as refused:
                call()
            assert refused.value.code == "invalid_api_key"


def test_who_needs_no_key(live: Live) -> None:
    with httpx.Client(base_url=live.url) as http:
        for path in ("/", "/health", "/metrics"):
            assert http.get(path).status_code == 200, path
        for path in (
            "/v1/models",
            "/version",
            "/iteration_stats",
            "/health_generate",
            "/nothing",
            "/metrics/",
            "//health",
        ):
            # Whole, or "//health" would be a host and the path that of the page.
            assert http.get(f"{live.url}{path}").status_code == 401, path
        for header in (
            KEY,
            f"Basic {KEY}",
            f"Bearer {KEY}x",
            "Bearer",
            "Bearer \udce9".encode("utf-8", "surrogateescape"),
        ):
            assert http.get("/version", headers={"authorization": header}).status_code == 401
        assert http.get("/version", headers={"authorization": f"bearer {KEY}"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", b"", 400),
        ("/v1/completions", b"{", 400),
        ("/v1/completions", b"\xff\xfe", 400),
        ("/v1/completions", b"[" * 50_000, 400),
        ("/v1/completions", b'{"prompt": "x", "temperature": NaN}', 400),
        ("/v1/completions", b'{"prompt": "\\ud800"}', 400),
        ("/v1/completions", b'{"prompt": ""}', 400),
        ("/v1/completions", json.dumps({"prompt": [VOCAB]}).encode(), 400),
        ("/v1/completions", json.dumps({"prompt": "x" * 5000}).encode(), 400),
        ("/v1/completions", b'{"prompt": "x", "stop_token_ids": [1000000]}', 400),
        ("/v1/completions", b'{"prompt": "x", "logit_bias": {"1000000": 1}}', 400),
        ("/v1/completions", b'{"prompt": "x", "min_tokens": 5, "max_tokens": 2}', 400),
        ("/v1/chat/completions", json.dumps({**CHAT, "min_tokens": MAX_SEQ_LEN}).encode(), 400),
        ("/v1/completions", b'{"prompt": "x", "max_tokens": 0}', 400),
        ("/v1/completions", b'{"prompt": "x", "stream": true, "logit_bias": {"1000000": 1}}', 400),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": 5}]}', 400),
        ("/v1/completions", b'{"prompt": "' + b"x" * 200_000 + b'"}', 413),
        (
            "/v1/chat/completions",
            json.dumps({**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]}).encode(),
            400,
        ),
        ("/tokenize", b"{}", 400),
        ("/detokenize", b'{"tokens": [1000000]}', 400),
        ("/nothing", b"{}", 404),
        ("/health", b"{}", 405),
    ],
)
def test_a_bad_request_is_told_so(live: Live, path: str, body: bytes, status: int) -> None:
    answer = live.http.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert len(answer.text) < 1000 and "Traceback" not in answer.text
    assert live.http.post("/v1/completions", content=body, headers={"content-type": "text/xml"}).status_code in (
        400,
        413,
    )
    assert text_of(live)


def test_hostile_bytes(live: Live) -> None:
    host, port = live.http.base_url.host, live.http.base_url.port
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n".encode()
    for request, status in (
        (b"GET /health HTTP/1.1\r\nhost: x\r\nbig: " + b"x" * 100_000, b" 400 "),
        (b"\x16\x03\x01garbage\r\n\r\n", b" 400 "),
        (head + b"content-length: 50\r\n\r\n{", b" 408 "),
        (head + b"transfer-encoding: chunked\r\n\r\n" + (b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 10, b" 413 "),
        (head + b"content-length: 99999999999\r\n\r\n", b" 413 "),
    ):
        with socket.create_connection((host, port), 10) as sock:
            sock.settimeout(10)
            sock.sendall(request)
            assert status in sock.recv(4096), request[:100]
    assert text_of(live)


def test_the_queue_has_an_end(live: Live) -> None:
    """What does not fit is told to come again, and all the others are served."""
    body = {**TEXT, "max_tokens": 50}
    with ThreadPoolExecutor(80) as pool:
        answers = list(pool.map(lambda _: live.post("/v1/completions", body), range(80)))
    statuses = {answer.status_code for answer in answers}
    assert statuses <= {200, 503} and 200 in statuses
    for answer in answers:
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) > 0 and answer.json()["error"]["code"] == "queue_full"
    big = live.post("/v1/completions", {**body, "prompt": ["x"] * 300})
    assert big.status_code == 503
    assert live.until_metric("jaxllm_num_requests_running", 0) == 0
    assert live.until_metric("jaxllm_kv_cache_usage_perc", 0) == 0
