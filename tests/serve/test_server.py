"""A real server, asked by the official client and by hand: right answers, and errors that say what is wrong."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from jaxllm.engine.tokenizer import Tokenizer
from tests.serve.live import KEY, Live, children_of, events
from tests.tiny_llm import MAX_SEQ_LEN, VOCAB, full_logits, log_softmax

pytestmark = pytest.mark.timeout(300)

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "The cat", "temperature": 0, "max_tokens": 8, "ignore_eos": True}


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key=KEY, max_retries=0, timeout=60) as found:
        yield found


def text_of(live: Live, **fields: Any) -> str:
    return live.post("/v1/completions", {**TEXT, **fields}).raise_for_status().json()["choices"][0]["text"]


# ---- right answers ------------------------------------------------------------------------------------------------


def test_the_openai_client_chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, max_tokens=12, logprobs=True, top_logprobs=3)
    (choice,) = answer.choices
    assert choice.finish_reason == "length" and answer.object == "chat.completion" and answer.model == "tiny"
    assert choice.message.role == "assistant" and choice.logprobs is not None and choice.logprobs.content is not None
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    assert all(len(entry.top_logprobs) == 3 for entry in choice.logprobs.content)
    assert answer.usage is not None and answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12

    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(**CHAT, max_tokens=12, stream=True, stream_options=options))
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == choice.message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12


def test_greedy_tokens_and_logprobs_are_the_models(live: Live, tokenizer: Tokenizer) -> None:
    """With echo, as lm-eval asks: every logprob, of the prompt too, is that of the model over the whole sequence."""
    body = {**TEXT, "echo": True, "logprobs": 2, "return_token_ids": True}
    (choice,) = live.post("/v1/completions", body).raise_for_status().json()["choices"]
    prompt, tokens = choice["prompt_token_ids"], choice["token_ids"]
    assert prompt == tokenizer.encode("The cat") and len(tokens) == 8
    (logits,) = full_logits([prompt + tokens])
    wanted = log_softmax(logits[: len(prompt + tokens) - 1])
    ids = np.array((prompt + tokens)[1:])
    found = choice["logprobs"]["token_logprobs"]
    assert found[0] is None and choice["logprobs"]["top_logprobs"][0] is None
    np.testing.assert_allclose(found[1:], wanted[np.arange(len(ids)), ids], atol=1e-3)
    best = [max(row.values()) for row in choice["logprobs"]["top_logprobs"][1:]]
    np.testing.assert_allclose(best, wanted.max(-1), atol=1e-3)
    assert (wanted[len(prompt) - 1 :].argmax(-1) == tokens).all()
    assert choice["text"] == "The cat" + text_of(live) == "".join(choice["logprobs"]["tokens"])
    assert choice["logprobs"]["text_offset"][-1] == len(choice["text"]) - len(choice["logprobs"]["tokens"][-1])


def test_max_tokens_0_scores_the_prompt(live: Live) -> None:
    whole = live.post("/v1/completions", {**TEXT, "max_tokens": 0, "echo": True, "logprobs": 0}).json()
    more = live.post("/v1/completions", {**TEXT, "echo": True, "logprobs": 0}).json()
    scores = whole["choices"][0]["logprobs"]["token_logprobs"]
    assert whole["choices"][0]["text"] == "The cat" and whole["usage"]["completion_tokens"] == 0
    assert scores == pytest.approx(more["choices"][0]["logprobs"]["token_logprobs"][: len(scores)], abs=1e-3)


def test_prompts_in_every_form(live: Live, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The cat")
    texts = ["The cat", "a dog"]
    wanted = [text_of(live, prompt=text) for text in texts]
    assert text_of(live, prompt=ids) == wanted[0] and text_of(live, prompt_token_ids=ids) == wanted[0]
    for prompt in (texts, [tokenizer.encode(text) for text in texts]):
        answer = live.post("/v1/completions", {**TEXT, "prompt": prompt, "n": 2}).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert [choice["text"] for choice in answer["choices"]] == [wanted[0]] * 2 + [wanted[1]] * 2
    with live.http.stream("POST", "/v1/completions", json={**TEXT, "prompt": texts, "stream": True}) as response:
        found = ["", ""]
        for event in events(response):
            found[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert found == wanted


def test_seeds(live: Live) -> None:
    def sample(seed: int | None) -> list[str]:
        body = {**TEXT, "temperature": 1.5, "n": 4, "seed": seed, "max_tokens": 16}
        return [choice["text"] for choice in live.post("/v1/completions", body).json()["choices"]]

    assert sample(7) == sample(7) != sample(8)
    assert len(set(sample(7))) == 4


def test_stop_strings_and_tokens(live: Live, tokenizer: Tokenizer) -> None:
    whole = text_of(live, max_tokens=24)
    stop = whole[5:8]
    at = whole.index(stop)
    for stream in (False, True):
        body = {**TEXT, "max_tokens": 24, "stop": ["never there", stop], "stream": stream}
        if stream:
            with live.http.stream("POST", "/v1/completions", json=body) as response:
                choices = [event["choices"][0] for event in events(response)]
        else:
            choices = live.post("/v1/completions", body).json()["choices"]
        assert "".join(choice["text"] for choice in choices) == whole[:at]
        assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", stop)
    kept = text_of(live, max_tokens=24, stop=stop, include_stop_str_in_output=True)
    assert kept == whole[: at + len(stop)]
    tokens = live.post("/v1/completions", {**TEXT, "return_token_ids": True}).json()["choices"][0]["token_ids"]
    body = {**TEXT, "stop_token_ids": [tokens[3]]}
    choice = live.post("/v1/completions", body).json()["choices"][0]
    first = tokens.index(tokens[3])
    assert choice["stop_reason"] == tokens[3] and choice["text"] == tokenizer.decode(tokens[:first])


def test_logit_bias(live: Live, tokenizer: Tokenizer) -> None:
    token = tokenizer.encode("Q")[0]
    assert text_of(live, logit_bias={str(token): 100}) == "Q" * 8


def test_cached_tokens_and_salt(live: Live) -> None:
    def cached(**more: Any) -> int:
        usage = live.post("/v1/completions", {**TEXT, "prompt": "seen before? " * 2, **more}).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert cached(cache_salt="a") == 0
    assert cached(cache_salt="a") >= 16
    assert cached(cache_salt="b") == 0


def test_tokenize_and_back(live: Live, tokenizer: Tokenizer) -> None:
    found = live.post("/tokenize", {"prompt": "The cat", "return_token_strs": True}).json()
    assert found["tokens"] == tokenizer.encode("The cat") and found["count"] == len(found["tokens"])
    assert "".join(found["token_strs"]) == "The cat" and found["max_model_len"] == MAX_SEQ_LEN
    assert live.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "The cat"}
    chat = live.post("/tokenize", {"messages": CHAT["messages"]}).json()["tokens"]
    assert live.post("/detokenize", {"tokens": chat}).json() == {"prompt": "u Hi a "}


# ---- what it says about itself ------------------------------------------------------------------------------------


def test_models_version_and_health(live: Live, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "jaxllm"
    assert live.get("/version").json().keys() == {"version"}
    assert live.get("/health").status_code == 200 and live.get("/health_generate").status_code == 200


def test_openapi_describes_what_is_there(live: Live) -> None:
    found = live.get("/openapi.json").json()
    for path in found["paths"]:
        if "{response_id}" in path:
            continue  # test_server_responses.py
        method = "GET" if "get" in found["paths"][path] else "POST"
        answer = live.http.request(method, path.replace("{name}", "tiny"), json={} if method == "POST" else None)
        assert answer.status_code == (200 if method == "GET" else 400), path
    fields = found["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "temperature", "stream_options", "top_k", "tools"} <= fields.keys()


def test_only_the_engine_has_jax(live: Live) -> None:
    """What speaks HTTP shares no interpreter, and no fate, with XLA."""

    def has(pid: int, library: str) -> bool:
        return library in Path(f"/proc/{pid}/maps").read_text()

    pids = children_of(live.process.pid)
    assert len(pids) == 3 and [pid for pid in pids if has(pid, "jaxlib")] == [live.engine_pid]
    assert not any(has(pid, "libtorch") for pid in pids)  # which transformers would bring


def test_iteration_stats_have_any_number_of_readers(live: Live) -> None:
    text_of(live)
    live.until_metric("jaxllm_num_requests_running", 0)
    end = time.monotonic() + 10
    while True:  # each frontend hears of the last steps in its own time
        first, second = live.get("/iteration_stats").json(), live.get("/iteration_stats").json()
        if (first and first == second) or time.monotonic() > end:
            break
    numbers = [one["iter"] for one in first]
    assert numbers == sorted(set(numbers)) == [one["iter"] for one in second]
    assert all(one["iterLatencyMS"] > 0 for one in first)
    assert any(one["inflightBatchingStats"]["numContextRequests"] for one in first)
    assert first[0]["kvCacheStats"]["maxNumBlocks"] == 128
    assert [one["iter"] for one in live.get(f"/iteration_stats?since={numbers[-2]}").json()] == numbers[-1:]
    assert live.get("/iteration_stats?since=x").status_code == 400


def test_metrics_add_up_over_the_frontends(live: Live) -> None:
    name = "jaxllm_request_success_total"
    before, tokens = live.metric(name), live.metric("jaxllm_request_generation_tokens_sum")
    for _ in range(12):  # each on a connection of its own, so that both frontends get some
        with httpx.Client(base_url=live.url, headers=live.http.headers, timeout=60) as http:
            http.post("/v1/completions", json=TEXT).raise_for_status()
    assert live.metric(name) == before + 12
    assert live.metric("jaxllm_request_generation_tokens_sum") == tokens + 12 * 8
    text = live.get("/metrics").text
    for wanted in ("time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket", "num_requests_waiting"):
        assert f"jaxllm_{wanted}" in text
    assert live.metric("jaxllm_engine_up") == 1


def test_log_lines_carry_the_request_id(live: Live) -> None:
    answer = live.post("/v1/completions", TEXT, headers={"x-request-id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    live.wait_for("abc-1", 10)
    line = json.loads(next(line for line in live.lines if "abc-1" in line))
    assert (line["status"], line["completion_tokens"], line["path"]) == (200, 8, "/v1/completions")
    odd = live.post("/v1/completions", TEXT, headers={"x-request-id": 'x" onload='})
    assert re.fullmatch("[0-9a-f]{32}", odd.headers["x-request-id"])


# ---- errors -------------------------------------------------------------------------------------------------------


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


# ---- leaving early ------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_pages(live: Live, client: openai.OpenAI) -> None:
    name = 'jaxllm_request_success_total{finished_reason="cancelled"'
    body = {**TEXT, "max_tokens": 57, "n": 4, "prompt": "leaving"}

    def cancelled() -> float:
        lines = [line for line in live.get("/metrics").text.splitlines() if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    before = cancelled()
    for _ in range(10):
        with live.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            next(response.iter_lines())
    stream = client.chat.completions.create(**CHAT, max_tokens=50, stream=True)
    next(iter(stream))
    stream.close()
    assert live.until_metric("jaxllm_num_requests_running", 0) == 0
    streams = cancelled()
    assert streams > before  # some of them: the tiny model may be done before the client has left
    raw = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-length: {len(raw)}\r\n\r\n"
    )
    for _ in range(5):
        with socket.create_connection((live.http.base_url.host, live.http.base_url.port), 10) as sock:
            sock.sendall(head.encode() + raw)
    assert live.until_metric("jaxllm_num_requests_running", 0) == 0
    assert live.until_metric("jaxllm_kv_cache_usage_perc", 0) == 0
    assert cancelled() > streams
    assert text_of(live)


def test_many_streams_at_once_are_as_alone(live: Live) -> None:
    prompts = [f"number {index}" for index in range(12)]
    alone = [text_of(live, prompt=prompt) for prompt in prompts]
    found: dict[int, str] = {}

    def follow(index: int) -> None:
        with httpx.Client(base_url=live.url, headers=live.http.headers, timeout=60) as http:
            body = {**TEXT, "prompt": prompts[index], "stream": True}
            with http.stream("POST", "/v1/completions", json=body) as response:
                found[index] = "".join(event["choices"][0]["text"] for event in events(response))

    threads = [threading.Thread(target=follow, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[index] for index in range(len(prompts))] == alone
