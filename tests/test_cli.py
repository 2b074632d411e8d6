"""The command line against a fake engine: output, exit codes, and errors of one line."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys

import pytest

import jaxllm.llm
import jaxllm.requests
from jaxllm.cli import main
from tests.fake_engine import FakeDecoder, FakeEngine


@pytest.fixture
def fake(monkeypatch):
    started = []

    def start(config):
        started.append(FakeEngine(config))
        return started[-1]

    monkeypatch.setattr(jaxllm.llm, "_start_engine", start)
    monkeypatch.setattr(jaxllm.requests, "_decoder_maker", lambda tokenizer, params: lambda: FakeDecoder(tokenizer))
    return started


def run(*argv):
    """Exit code of the command line, however it ends."""
    try:
        return main(list(argv))
    except SystemExit as end:
        return end.code


def test_generate_streams_one_prompt(fake, capsys):
    assert run("generate", "m", "abc", "-n", "3") == 0
    out, err = capsys.readouterr()
    assert out == "def\n" and "tok/s" in err and "ready" in err
    assert fake[0].stopped


def test_generate_quiet(fake, capsys):
    assert run("generate", "m", "abc", "-n", "3", "-q") == 0
    assert capsys.readouterr() == ("def\n", "")


def test_prompts_may_follow_options(fake, capsys):
    assert run("generate", "m", "-n", "1", "abc", "x", "--json", "-q") == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == ["d", "y"]


def test_generate_from_file_and_stdin(fake, capsys, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("abc\n\nx\n")
    assert run("generate", "m", "--file", str(tmp_path / "p.txt"), "-n", "1", "--json", "-q") == 0
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["abc", "x"]
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n"))
    assert run("generate", "m", "-", "-n", "1", "-q") == 0
    assert capsys.readouterr().out == "d\n"


def test_only_the_bad_prompt_fails(fake, capsys):
    assert run("generate", "m", "abc", "x" * 300, "-n", "1", "--json", "-q") == 2
    good, bad = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert good["text"] == "d" and "300 tokens" in bad["error"]


def test_chat_template(fake, capsys):
    assert run("generate", "m", "Hi", "--chat", "--system", "S", "-n", "1", "--json", "-q") == 0
    assert json.loads(capsys.readouterr().out)["text"] == "?"  # the byte after ">"


def test_options_reach_the_engine(fake, tmp_path):
    (tmp_path / "c.yml").write_text("max_batch_size: 4\nkv_cache_config: {tokens_per_block: 16}\n")
    options = ["--config", str(tmp_path / "c.yml"), "--tp_size", "2", "--max_num_tokens", "64", "--no-block-reuse"]
    options += ["--backend", "pytorch"]  # TensorRT-LLM's runtime stands for what there is
    options += ["--kv_cache_free_gpu_memory_fraction=0.5", "--no-overlap", "--capacity-policy", "GUARANTEED_NO_EVICT"]
    assert run("generate", "m", "abc", "-n", "1", *options) == 0
    config = fake[0].config
    assert (config.tensor_parallel_size, config.max_batch_size, config.max_num_tokens) == (2, 4, 64)
    kv = config.kv_cache_config
    assert (kv.tokens_per_block, kv.free_gpu_memory_fraction, kv.enable_block_reuse) == (16, 0.5, False)
    assert config.disable_overlap_scheduler
    assert config.scheduler_config.capacity_scheduler_policy == "GUARANTEED_NO_EVICT"
    assert run("generate", "m", "abc", "-n", "1", "--extra_llm_api_options", str(tmp_path / "c.yml")) == 0
    assert fake[1].config.max_batch_size == 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "m"], "no prompt"),
        (["generate", "m", ""], "prompt is empty"),
        (["generate", "m", "a", "--max-tokens", "0"], "max_tokens"),
        (["generate", "m", "a", "--temperature", "nan"], "temperature"),
        (["generate", "m", "a", "--top-p", "0"], "top_p"),
        (["generate", "m", "a", "--temprature", "1"], "did you mean --temperature"),
        (["generate", "m", "a", "--tp", "0"], "must be an integer above 0"),
        (["generate", "m", "a", "--system", "x"], "add --chat"),
        (["generate", "m", "--file", "/nonexistent"], "cannot read the prompts"),
        (["generate", "m", "a", "--config", "/nonexistent.yml"], "cannot read the config file"),
        (["generate", "m", "a", "--backend", "tensorrt"], "backend = 'tensorrt': choosing another runtime"),
        (["serve", "disaggregated", "-c", "disagg-config.yml"], "disaggregated serving is not supported yet"),
        (["generate"], "required"),
        (["genrate", "m"], "genrate"),
        (["bench", "latency", "m", "--input-len", "0"], "--input-len"),
        (["bench", "latency", "m", "--input-len", "9:3"], "LOW:HIGH"),
        (["bench", "latency", "m", "--compare", "vlm"], "vlm"),
        (["bench", "latency", "m", "extra"], "unknown argument 'extra'"),
        (["bench", "latency", "m", "--json", "/nonexistent/x.json"], "'/nonexistent/x.json' cannot be written"),
        (["bench", "layouts", "m", "--layouts", "1", "--json", "/nonexistent/x.json"], "cannot be written"),
        (["bench", "comm", "--tp", "2", "--json", "/"], "'/' cannot be written"),
        (["bench", "serve", "--json", "/nonexistent/x.json"], "name a file in a directory that exists"),
        (["bench", "latency", "m", "--batch-size", "4", "--max-batch-size", "2"], "max_batch_size"),
        (["convert", "/nonexistent/model", "/tmp/never-written"], "/nonexistent/model"),
        ([], "COMMAND"),
    ],
)
def test_errors_are_one_line_and_exit_2(fake, capsys, argv, message):
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("[")]
    assert out == "" and len(lines) == 1 and message in lines[0] and "Traceback" not in err
    assert lines[0].startswith("jaxllm")


def test_an_engine_failure_is_no_usage_error(fake, capsys):
    assert run("generate", "m", "a!", "-q") == 1
    assert "RuntimeError: the engine broke" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        main(["generate", "m", "a!", "--debug"])


@pytest.mark.parametrize("becomes", [None, ImportError("numpy failed to import")], ids=["lost", "import-error"])
def test_an_interrupt_that_an_import_swallows_ends_the_command(monkeypatch, capsys, becomes):
    started = []

    def swallow():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if becomes is not None:
                raise becomes from None

    monkeypatch.setattr("jaxllm.engine.devices.look_early", swallow)
    monkeypatch.setattr("jaxllm.engine.engine.Engine", started.append)
    assert run("generate", "m", "abc") == 130
    assert not started and capsys.readouterr() == ("", "")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run("generate", "m") == 2, "and the next command starts anew"


def test_chat_keeps_the_conversation(fake, capsys, monkeypatch):
    seen = []
    original = jaxllm.llm.LLM.chat_prompt

    def spy(self, messages, *args, **kwargs):
        seen.append([message["content"] for message in messages])
        return original(self, messages, *args, **kwargs)

    monkeypatch.setattr(jaxllm.llm.LLM, "chat_prompt", spy)
    lines = "one\ntwo\n\n/wrong\n/help\n/reset\nthree\n" + "x" * 300 + "\nfour\n/exit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert run("chat", "m", "-n", "1", "--system", "S", "-q") == 0
    assert seen == [
        ["S", "one"],
        ["S", "one", "?", "two"],
        ["S", "three"],
        ["S", "three", "?", "x" * 300],
        ["S", "three", "?", "four"],
    ]
    out, err = capsys.readouterr()
    assert out.count("?\n") == 4 and "unknown command '/wrong'" in out
    assert "300" in err or "tokens" in err


def test_help_is_fast_and_imports_no_jax():
    code = (
        "import sys\nfrom jaxllm.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "assert not [m for m in ('jax', 'torch', 'transformers', 'numpy') if m in sys.modules]"
    )
    for command in ([], ["generate"], ["chat"], ["convert"], ["bench"], ["bench", "throughput"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, timeout=60, check=True
        )
        assert "usage:" in done.stdout


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "jaxllm", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.startswith("jaxllm ")


def test_bench_latency_and_json(fake, capsys, tmp_path):
    path = tmp_path / "r.json"
    options = ["--batch-size", "2", "--input-len", "4", "--output-len", "16", "--repeat", "2", "--host-profile"]
    assert run("bench", "latency", "m", *options, "--json", str(path)) == 0
    out = capsys.readouterr().out
    assert "out tok/s" in out and "TTFT" in out and "host cost" in out and "schedule" in out
    report = json.loads(path.read_text())
    assert len(report["rows"][0]["runs"]) == 2 and report["rows"][0]["median"]["output_tok_s"] > 0
    host = report["host_ms_per_step"]
    assert host["schedule"] == pytest.approx(0.1)
    assert host["host total"] == pytest.approx(1.0) == host["host total, wall"]
    assert fake[0].config.max_batch_size == 2 and fake[0].stopped


def test_bench_throughput(fake, capsys):
    options = ["--num-requests", "5", "--input-len", "2:6", "--output-len", "1:9", "--repeat", "1", "--json", "-"]
    assert run("bench", "throughput", "m", *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["load"]["output tokens"] == "1:9" and report["rows"][0]["name"] == "jaxllm"


def test_bench_host(fake, capsys):
    assert run("bench", "host", "m", "-b", "1", "--output-len", "150", "--repeat", "1") == 0
    assert "host total" in capsys.readouterr().out
