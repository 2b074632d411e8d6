"""A real server on loopback: supervisor, engine and frontends as `jaxllm serve` starts them, with a tiny model."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.tiny_llm import MAX_SEQ_LEN, MODEL, PAGE, SLOTS, make_tokenizer

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}a {% endif %}"
)
KEY = "sk-of-this-test"
READY = re.compile(r"serving (\S+) at (\S+) \(engine: process (\d+)\)")
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "The cat", "temperature": 0, "max_tokens": 8, "ignore_eos": True}
TINY: dict[str, Any] = {
    "dtype": "float32",
    "max_batch_size": SLOTS,
    "max_num_tokens": 32,
    "max_seq_len": MAX_SEQ_LEN,
    "kv_cache_config": {"tokens_per_block": PAGE, "max_tokens": 512},
    "batch_buckets": [SLOTS],
    "token_buckets": [32],
    "progress": False,
}


def tiny_tokenizer(directory: Path) -> Path:
    """The tokenizer of `tests.tiny_llm` with a chat template."""
    make_tokenizer(directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return directory


class Live:
    """A running server. `url`, `engine_pid` and `http` (a client) are there once it is ready."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = ""
        self.engine_pid = 0
        self._news = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()
        self.http = httpx.Client(timeout=60)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                if found := READY.search(line):
                    self.url, self.engine_pid = found[2], int(found[3])
                    self.http.base_url = httpx.URL(self.url)
                self._news.notify_all()
        with self._news:
            self.lines.append("<end>")
            self._news.notify_all()

    def wait_for(self, text: str, seconds: float = 120.0, after: int = 0) -> int:
        """Waits for a line of the log; returns how many lines there are up to it."""
        end = time.monotonic() + seconds
        with self._news:
            while True:
                for number, line in enumerate(self.lines[after:], after):
                    if text in line:
                        return number + 1
                left = end - time.monotonic()
                assert left > 0 and "<end>" not in self.lines, f"no {text!r} in the log:\n" + "\n".join(
                    self.lines[-40:]
                )
                self._news.wait(left)

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return self.http.get(path, **kwargs)

    def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        return self.http.post(path, json=body, **kwargs)

    def metric(self, name: str) -> float:
        """The sum of all samples of that name in /metrics."""
        lines = [line for line in self.get("/metrics").text.splitlines() if re.match(rf"{name}[{{ ]", line)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def until_metric(self, name: str, wanted: float, seconds: float = 20.0) -> float:
        """Waits until a metric has a value; returns the last one seen."""
        end = time.monotonic() + seconds
        while (value := self.metric(name)) != wanted and time.monotonic() < end:
            time.sleep(0.02)
        return value

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def end(self) -> int:
        """Ends the server in any case; returns the exit code."""
        self.http.close()
        if self.process.poll() is None:
            self.terminate()
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()  # its children see their standard input close, and end too
            return self.process.wait(10)


@contextlib.contextmanager
def serving(
    directory: Path, *options: str, settings: dict[str, Any] | None = None, wait: bool = True
) -> Iterator[Live]:
    """A server of the tiny model, ready unless `wait` is False; ended at the end."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {**TINY, "tokenizer": str(tiny_tokenizer(directory / "tokenizer")), **(settings or {})}
    model = config.pop("model", str(MODEL))
    path = directory / "config.yml"
    path.write_text(yaml.safe_dump(config))
    arguments = [model, "--config", str(path), "--served_model_name", "tiny", *options]
    with started(*arguments) as live:
        if wait:
            live.wait_for("serving tiny at")
        yield live


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[Live]:
    """`jaxllm serve` with these arguments on a free port; ended at the end."""
    command = [sys.executable, "-m", "jaxllm.cli", "serve", *arguments, "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    live = Live(process)
    try:
        yield live
    finally:
        live.end()


def children_of(pid: int) -> list[int]:
    """Processes that a process has started and that have not ended."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON events of a stream; checks that it ends with [DONE]."""
    last = ""
    for line in response.iter_lines():
        if not line:
            continue
        assert line.startswith("data: "), line
        last = line.removeprefix("data: ")
        if last != "[DONE]":
            yield json.loads(last)
    assert last == "[DONE]"


def text_of(live: Live, **fields: Any) -> str:
    """What it says after a prompt."""
    return live.post("/v1/completions", {**TEXT, **fields}).raise_for_status().json()["choices"][0]["text"]
