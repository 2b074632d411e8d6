"""`jaxllm bench serve` and `jaxllm run-batch` against a real server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jaxllm.bench.serving import Outcome, ServeLoad, summary
from jaxllm.cli import main
from tests.serve.live import KEY, ROOT, Live

pytestmark = pytest.mark.timeout(200)


def run(*arguments: str) -> int:
    try:
        return main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)


# ---- bench serve --------------------------------------------------------------------------------------------------


def bench(live: Live, *options: str) -> int:
    sizes = ["--num-prompts", "20", "--input-len", "4:12", "--output-len", "6", "--vocab-size", "200"]
    return run("bench", "serve", "--base-url", live.url, "--api-key", KEY, *sizes, *options)


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_bench_serve(live: Live, capsys: pytest.CaptureFixture[str], tmp_path: Path, endpoint: str) -> None:
    path = tmp_path / "out.json"
    extra = [] if endpoint == "/v1/completions" else ["--input-len", "2"]  # words are several tokens here
    options = ["--endpoint", endpoint, "--max-concurrency", "4", "--goodput", "ttft:60000", "--json", str(path), *extra]
    assert bench(live, *options, "--request-rate", "200", "--metric-percentiles", "50,99") == 0
    found = json.loads(path.read_text())
    assert (found["completed"], found["failed"], found["model_id"]) == (20, 0, "tiny")
    assert found["total_output_tokens"] == 120 and found["total_input_tokens"] > 0
    assert 0 < found["max_concurrent_requests"] <= 5  # an end and the start after it may be the same moment
    assert found["request_goodput"] == pytest.approx(found["request_throughput"])
    assert found["output_throughput"] == pytest.approx(120 / found["duration"])
    assert found["p99_ttft_ms"] >= found["p50_ttft_ms"] == found["median_ttft_ms"] > 0
    assert found["mean_tpot_ms"] > 0 and found["mean_e2el_ms"] > found["mean_ttft_ms"]
    out = capsys.readouterr().out
    assert "Serving Benchmark Result" in out and "P99 TTFT (ms):" in out and "Request goodput (req/s):" in out


def test_bench_serve_counts_failures(live: Live, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [{"prompt": "fits"}, {"prompt": "x" * 100, "output_len": 1}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert bench(live, "--dataset-path", str(tmp_path / "data.jsonl"), "--num-warmups", "0", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["completed"], found["failed"]) == (10, 10)
    assert "maximum context length" in next(iter(found["errors"]))
    assert run("bench", "serve", "--base-url", live.url, "--api-key", "wrong") == 2
    assert run("bench", "serve", "--base-url", "127.0.0.1:1") == 2
    assert run("bench", "serve", "--base-url", live.url, "--goodput", "speed:1") == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_the_figures_are_what_they_say() -> None:
    """TPOT is (E2E - TTFT) / (n - 1); goodput counts who kept all limits; errors count for nothing else."""
    one = Outcome(sent=10.0, events=[10.1, 10.2, 10.4], ended=10.4, input_tokens=5, output_tokens=3)
    two = Outcome(sent=10.0, events=[10.5, 10.6], ended=10.6, input_tokens=7, output_tokens=2)
    bad = Outcome(sent=10.0, ended=10.1, error="500")
    load = ServeLoad("/v1/completions", [{}] * 3, goodput={"ttft": 200.0, "tpot": 160.0})
    found = summary(load, [one, two, bad], 2.0, [50, 100])
    assert (found["completed"], found["failed"], found["errors"]) == (2, 1, {"500": 1})
    assert found["mean_ttft_ms"] == pytest.approx(300) and found["p100_ttft_ms"] == pytest.approx(500)
    assert found["mean_tpot_ms"] == pytest.approx((150 + 100) / 2)
    assert found["mean_itl_ms"] == pytest.approx((100 + 200 + 100) / 3)
    assert found["request_goodput"] == 0.5 and found["request_throughput"] == 1.0
    assert found["total_token_throughput"] == 8.5 and found["max_concurrent_requests"] == 2


# ---- run-batch ----------------------------------------------------------------------------------------------------


def request(number: int, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": f"line {number}", "max_tokens": 40, "ignore_eos": True, "temperature": 0}
    item = {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/completions", "body": body}
    return {**item, **fields}


def test_a_killed_batch_goes_on(live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = 400
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(request(number)) + "\n" for number in range(count)))
    options = ["run-batch", "-i", str(source), "-o", str(target), "--base-url", live.url, "--api-key", KEY]
    options += ["--max-concurrency", "16"]
    command = [sys.executable, "-m", "jaxllm.cli", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while (not target.exists() or target.read_bytes().count(b"\n") < 20) and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    before = target.read_bytes()
    assert 20 <= before.count(b"\n") < count
    with target.open("ab") as file:  # as if it had been killed while it wrote
        file.write(b'{"id": "batch_req_1", "custom_id": "id-39')
    assert run(*options) == 0
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert target.read_bytes().startswith(before)
    assert sorted(answer["custom_id"] for answer in answers) == sorted(f"id-{number}" for number in range(count))
    assert all(answer["response"]["status_code"] == 200 and answer["error"] is None for answer in answers)
    texts = {answer["custom_id"]: answer["response"]["body"]["choices"][0]["text"] for answer in answers}
    assert texts["id-3"] == live.post("/v1/completions", request(3)["body"]).json()["choices"][0]["text"]
    assert run(*options) == 0 and len(target.read_text().splitlines()) == count
    assert "400 done before" in capsys.readouterr().err


def test_bad_lines_of_a_batch_are_answered(live: Live, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        request(0),
        request(1, method="GET"),
        request(2, url="/v1/embeddings"),
        request(3, body={"prompt": "x", "stream": True}),
        request(4, body={"prompt": "x", "temperature": 9}),
    ]
    source.write_text("\n\n".join(map(json.dumps, lines)))
    options = ["--base-url", live.url, "--api-key", KEY]
    assert run("run-batch", "-i", str(source), "-o", str(target), *options) == 0
    answers = {one["custom_id"]: one for one in map(json.loads, target.read_text().splitlines())}
    assert answers["id-0"]["response"]["status_code"] == 200
    assert all(answers[f"id-{number}"]["error"]["code"] == "invalid_request" for number in (1, 2, 3))
    assert answers["id-4"]["response"]["status_code"] == 400 and answers["id-4"]["error"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "custom_id"),
        ('{"custom_id": 1}', "custom_id"),
        ('{"custom_id": "a"}\n{"custom_id": "a"}', "comes twice"),
    ],
)
def test_a_bad_batch_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(text)
    assert run("run-batch", "-i", str(source), "-o", str(tmp_path / "o"), "--base-url", "http://127.0.0.1:1") == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_what_run_batch_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(request(0)))
    files = ["-i", str(source), "-o", str(target)]
    assert run("run-batch", *files) == 2
    assert run("run-batch", *files, "--model", "m", "--base-url", "http://x") == 2
    assert run("run-batch", "-i", str(tmp_path / "none"), "-o", str(target), "--base-url", "http://x") == 2
    target.write_text("something else\n")
    assert run("run-batch", *files, "--base-url", "http://127.0.0.1:1") == 2
    assert target.read_text() == "something else\n"
    assert len(capsys.readouterr().err.splitlines()) == 4
