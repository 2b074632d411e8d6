"""The server when things go wrong: the engine hangs or is killed, the server is told to end, its settings are bad."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from jaxllm.cli import main
from tests.serve.live import Live, children_of, events, serving, started
from tests.tiny_llm import MODEL

pytestmark = pytest.mark.timeout(300)

STREAMS = 50
LONG: dict[str, Any] = {"prompt": "Once", "max_tokens": 20_000, "ignore_eos": True, "temperature": 0, "stream": True}
SHORT: dict[str, Any] = {"prompt": "Once", "max_tokens": 5, "temperature": 0}


@pytest.fixture
def endless(tmp_path: Path) -> dict[str, Any]:
    """Settings under which a request can run for minutes: random weights, and room for long sequences."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40_000}))
    pages = {"tokens_per_block": 16, "max_tokens": 200_000}
    return {"model": str(model), "load_format": "dummy", "max_seq_len": 32_768, "kv_cache_config": pages}


class Streams:
    """Streams in threads, and what became of each: seconds (`time.monotonic`) and error of its end."""

    def __init__(self, url: str, count: int, body: dict[str, Any]) -> None:
        self.begun = threading.Semaphore(0)
        self.ends: list[tuple[float, str]] = []
        self._threads = [threading.Thread(target=self._follow, args=(url, body)) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _follow(self, url: str, body: dict[str, Any]) -> None:
        outcome = "no error"
        try:
            with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as response:
                if response.status_code != 200:
                    outcome = f"{response.status_code} {json.loads(response.read())['error']['code']}"
                else:
                    for number, event in enumerate(events(response)):
                        if number == 0:
                            self.begun.release()
                        if "error" in event:
                            outcome = f"event {event['error']['code']}"
        except Exception as error:
            outcome = repr(error)
        self.ends.append((time.monotonic(), outcome))

    def wait_for(self, count: int) -> None:
        """Until so many have had an event."""
        for _ in range(count):
            assert self.begun.acquire(timeout=60)

    def join(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.01, end - time.monotonic()))


def health_within(live: Live, status: int, seconds: float) -> float:
    """Seconds until /health has that status."""
    began = time.monotonic()
    while live.get("/health").status_code != status:
        assert time.monotonic() - began < seconds, live.get("/health").text
        time.sleep(0.02)
    return time.monotonic() - began


def test_a_hanging_and_a_killed_engine(tmp_path: Path, endless: dict[str, Any]) -> None:
    options = ["--health_timeout", "2", "--restart_engine", "1"]
    with serving(tmp_path, *options, settings=endless) as live:
        first_pid = live.engine_pid
        text = live.post("/v1/completions", SHORT).raise_for_status().json()["choices"][0]["text"]

        os.kill(first_pid, signal.SIGSTOP)
        try:
            assert health_within(live, 503, 5) > 1
            assert "silent" in live.get("/health").json()["reason"]
        finally:
            os.kill(first_pid, signal.SIGCONT)
        health_within(live, 200, 5)

        streams = Streams(live.url, STREAMS, LONG)
        streams.wait_for(8)
        seen = len(live.lines)
        killed = time.monotonic()
        os.kill(first_pid, signal.SIGKILL)
        health_within(live, 503, 2)
        streams.join(10)
        assert len(streams.ends) == STREAMS and max(end for end, _ in streams.ends) - killed < 2
        assert {outcome for _, outcome in streams.ends} == {"event engine_not_running", "503 engine_not_running"}
        refused = live.post("/v1/completions", SHORT)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0

        live.wait_for("serving tiny at", after=seen)
        assert live.engine_pid != first_pid
        assert live.post("/v1/completions", SHORT).raise_for_status().json()["choices"][0]["text"] == text
        health_within(live, 200, 5)

        os.kill(live.engine_pid, signal.SIGKILL)  # one time too many
        live.wait_for("the engine died (SIGKILL)", after=seen + 1)
        assert live.process.wait(20) == 1


def test_timeouts_and_sigterm(tmp_path: Path, endless: dict[str, Any]) -> None:
    with serving(tmp_path, "--request_timeout", "6", "--drain_timeout", "3", settings=endless) as live:
        stream = Streams(live.url, 1, LONG)
        began = time.monotonic()
        answer = live.post("/v1/completions", {**LONG, "stream": False})
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "request_timeout"
        assert 5.9 < time.monotonic() - began < 9
        stream.join(5)
        assert [outcome for _, outcome in stream.ends] == ["event request_timeout"]
        assert live.until_metric("jaxllm_num_requests_running", 0) == 0
        assert live.until_metric("jaxllm_kv_cache_usage_perc", 0) == 0

        short = Streams(live.url, 2, {**LONG, "max_tokens": 200})
        endless_ones = Streams(live.url, 2, LONG)
        short.wait_for(2)
        endless_ones.wait_for(2)
        told = time.monotonic()
        live.terminate()
        live.wait_for("draining", 5)
        with openai.OpenAI(base_url=live.url + "/v1", api_key="x", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError) as refused:
                client.completions.create(model="tiny", prompt="x")
            assert refused.value.status_code == 503 and refused.value.code == "shutting_down"
        assert "shutting down" in live.get("/health").json()["reason"]
        assert live.process.wait(20) == 0
        assert 2.5 < time.monotonic() - told < 10
        short.join(5)
        endless_ones.join(5)
        assert [outcome for _, outcome in short.ends] == ["no error"] * 2
        assert [outcome for _, outcome in endless_ones.ends] == ["event shutting_down"] * 2


def test_children_do_not_outlive_the_supervisor(tmp_path: Path) -> None:
    with serving(tmp_path, wait=False) as live:
        end = time.monotonic() + 20
        while len(pids := children_of(live.process.pid)) < 2 and time.monotonic() < end:
            time.sleep(0.02)
        assert len(pids) == 2
        live.process.kill()
        live.process.wait(10)
        end = time.monotonic() + 10
        while any(map(_is_alive, pids)) and time.monotonic() < end:
            time.sleep(0.02)
        assert not any(map(_is_alive, pids))


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`jaxllm serve` in this process sets signal handlers; they are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_settings_of_which_the_engine_makes_nothing(tmp_path: Path) -> None:
    with started(str(tmp_path / "no-such-model")) as live:
        assert live.process.wait(60) == 2
    errors = [line for line in live.lines if "error" in line]
    assert len(errors) == 1 and errors[0].startswith("jaxllm: error:") and "no-such-model" in errors[0]


@pytest.mark.parametrize(
    ("options", "yaml_text", "message"),
    [
        (["--port", "99999"], "", "port"),
        (["--host", "256.256.256.256"], "", "give another --port or --host"),
        (["--ssl_certfile", "x.pem"], "", "belong together"),
        (["--prot", "1"], "", "did you mean --port"),
        ([], "prot: 1", "did you mean 'port'"),
        ([], "max_batch_sise: 1", "did you mean 'max_batch_size'"),
        ([], "max_queue_size: 0", "max_queue_size"),
        ([], "skip_tokenizer_init: true", "skip_tokenizer_init"),
        ([], "cache_transceiver_config: {backend: UCX}", "disaggregated serving is not supported yet"),
    ],
)
def test_bad_settings_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet: None, options: list[str], yaml_text: str, message: str
) -> None:
    (tmp_path / "c.yml").write_text(yaml_text)
    try:
        code = main(["serve", str(MODEL), "--config", str(tmp_path / "c.yml"), *options])
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_options_beat_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yml").write_text(
        "port: 1234\nmax_queue_size: 7\napi_key: secret\nmax_batch_size: 3\n"
        "pytorch_backend_config: {enable_overlap_scheduler: false}\nkv_cache_config: {tokens_per_block: 16}\n"
    )
    options = ["--port", "99", "--max_batch_size", "5", "--kv_cache_free_gpu_memory_fraction", "0.5", "--tp_size", "2"]
    assert main(["serve", "m", "--config", str(tmp_path / "c.yml"), *options, "--print_config"]) == 0
    out = capsys.readouterr().out
    found = yaml.safe_load(out)
    assert (found["port"], found["max_queue_size"], found["max_batch_size"]) == (99, 7, 5)
    assert found["kv_cache_config"]["tokens_per_block"] == 16 and found["tensor_parallel_size"] == 2
    assert found["kv_cache_config"]["free_gpu_memory_fraction"] == 0.5
    assert found["disable_overlap_scheduler"] is True and "secret" not in out


@pytest.mark.slow
def test_tls(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl program to make a certificate")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(key)]
    subprocess.run([*command, "-out", str(cert), *names], check=True, capture_output=True)
    with serving(tmp_path / "server", "--ssl_certfile", str(cert), "--ssl_keyfile", str(key)) as live:
        assert live.url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=str(cert))
        with httpx.Client(base_url=live.url, verify=context, timeout=60) as http:
            answer = http.post("/v1/completions", json=SHORT).raise_for_status().json()
            assert answer["usage"]["completion_tokens"] == 5
        with pytest.raises(httpx.ConnectError, match="certificate"):
            httpx.get(live.url + "/health")  # nobody vouches for it
        with pytest.raises(httpx.HTTPError):
            httpx.get(live.url.replace("https", "http") + "/health")
        assert live.end() == 0
