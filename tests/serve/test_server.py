"""A real server, asked by the official client and by hand: right answers, and errors that say what is wrong."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from jaxllm.engine.tokenizer import Tokenizer
from tests.serve.live import CHAT, KEY, TEXT, Live, children_of, events, text_of
from tests.tiny_llm import MAX_SEQ_LEN, full_logits, log_softmax

pytestmark = pytest.mark.timeout(300)


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
