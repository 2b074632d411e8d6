"""Every kind of bad input gets its own one-line error: the value, the rule, the way out. Only the bad request fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest

import jaxllm.llm
from jaxllm import LLM, ConfigError, SamplingParams
from jaxllm.cli import main
from tests.tiny_llm import MAX_SEQ_LEN, MODEL, make_llm, make_tokenizer

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with make_llm(make_tokenizer(tmp_path_factory.mktemp("tokenizer"))) as engine:
        yield engine


def check_message(text: str, *parts: str) -> None:
    """One line that holds all of these regular expressions."""
    assert "\n" not in text.strip() and len(text) < 800, text
    for part in parts:
        assert re.search(part, text), f"{part!r} is not in: {text}"


def cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The error that the command line prints; it must leave with code 2."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:  # argparse
        code = error.code
    captured = capsys.readouterr()
    assert code == 2, captured.err
    lines = [line for line in captured.err.splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in captured.err, captured.err
    return lines[0]


# ---- a request ----------------------------------------------------------------------------------------------------

BAD_PROMPTS: list[tuple[Any, tuple[str, ...]]] = [
    ("", ("prompt is empty", "at least one")),
    ([[]], ("prompt is empty", "at least one token")),
    ({"prompt_token_ids": []}, ("prompt is empty", "at least one token")),
    ([[5] * MAX_SEQ_LEN], ("prompt has 64 tokens", "max_seq_len 64", "shorten it or raise")),
    ({"prompt_token_ids": [5] * 500}, ("prompt has 500 tokens", "shorten it")),
    ([[5, 203]], ("prompt token 203", "vocabulary", r"0\.\.202")),
    ([[5, -1]], ("prompt token -1", r"0\.\.202")),
    (b"abc", ("prompt b'abc' must be a str",)),
    ({"text": "a"}, ("unknown key in a prompt 'text'",)),
]


@pytest.mark.parametrize(("prompt", "parts"), BAD_PROMPTS, ids=lambda value: str(value)[:30])
def test_bad_prompt(llm: LLM, prompt: Any, parts: tuple[str, ...]) -> None:
    one = prompt[0] if isinstance(prompt, list) else prompt
    single = {"prompt_token_ids": one} if isinstance(one, list) else one
    with pytest.raises(ValueError) as caught:
        llm.generate(single, SamplingParams(max_tokens=2), use_tqdm=False)
    check_message(str(caught.value), *parts)
    with pytest.raises(ValueError) as caught:
        llm.generate_async(single, SamplingParams(max_tokens=2))
    check_message(str(caught.value), *parts)


def test_only_the_bad_requests_fail(llm: LLM) -> None:
    good = SamplingParams(max_tokens=4, ignore_eos=True)
    wanted = llm.generate("hello", good, use_tqdm=False).outputs[0].token_ids
    bad = [prompt[0] if isinstance(prompt, list) else prompt for prompt, _ in BAD_PROMPTS]
    inputs: list[Any] = []
    for prompt in bad:
        inputs += ["hello", prompt]
    params = [good] * len(inputs)
    inputs += ["hello", "hello"]
    params += [SamplingParams(max_tokens=4, bad_token_ids=[203]), good]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    for output in [*outputs[:-2:2], outputs[-1]]:
        assert output.error is None and output.outputs[0].token_ids == wanted
    for output, (_, parts) in zip(outputs[1:-2:2], BAD_PROMPTS, strict=True):
        assert output.outputs[0].finish_reason == "error"
        check_message(str(output.error), *parts)
    check_message(str(outputs[-2].error), "bad_token_ids names token 203", r"0\.\.202")
    stats = llm.get_stats()
    assert stats["pages_free"] == stats["pages"]


BAD_PARAMS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"max_tokens": 0}, ("max_tokens=0", ">= 1")),
    ({"max_tokens": -3}, ("max_tokens=-3", ">= 1")),
    ({"max_tokens": 2.5}, (r"max_tokens=2\.5", "integer")),
    ({"temperature": float("nan")}, ("temperature=nan", "finite", "0")),
    ({"temperature": float("inf")}, ("temperature=inf", "finite", "0")),
    ({"temperature": -0.1}, (r"temperature=-0\.1", "0")),
    ({"top_p": 0}, ("top_p=0", "0", "1")),
    ({"top_p": 0.0}, (r"top_p=0\.0", "1")),
    ({"top_p": 1.5}, (r"top_p=1\.5", "1")),
    ({"top_p": float("nan")}, ("top_p=nan",)),
    ({"n": 0}, ("n=0", r"1\.\.16384")),
    ({"max_new_tokens": 5}, ("'max_new_tokens'", "did you mean 'max_tokens'")),
    ({"temprature": 1}, ("'temprature'", "did you mean 'temperature'")),
    ({"use_beam_search": True}, ("beam search is not supported", "instead")),
    ({"logprobs": 21}, ("logprobs=21", r"0\.\.20")),
]


@pytest.mark.parametrize(("values", "parts"), BAD_PARAMS, ids=str)
def test_bad_sampling_params(llm: LLM, values: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        SamplingParams(**values)
    check_message(str(caught.value), *parts)
    (name, value), *_ = values.items()
    if name in SamplingParams.__dataclass_fields__:
        # changed after it was made: refused by generate, and in a batch for this request only
        params = SamplingParams(max_tokens=3)
        setattr(params, name, value)
        with pytest.raises(ValueError) as caught:
            llm.generate("hello", params, use_tqdm=False)
        check_message(str(caught.value), *parts)
        bad, good = llm.generate(["hello"] * 2, [params, SamplingParams(max_tokens=3)], use_tqdm=False)
        check_message(str(bad.error), *parts)
        assert good.error is None and good.outputs[0].token_ids


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"cache_salt": 5}, ("cache_salt 5", "valid Unicode", "leave it out")),
        ({"cache_salt": "a\ud800"}, (r"cache_salt 'a\\ud800'", "valid Unicode")),
        ({"priority": 10**400}, ("priority 1000", "finite")),
        ({"priority": "high"}, ("priority = 'high'", "number")),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_arguments_beside_the_prompt(llm: LLM, arguments: dict[str, Any], parts: tuple[str, ...]) -> None:
    """They are refused where they are given: the engine's thread, which names pages by the salt, goes on."""
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    for call in (llm.generate, llm.generate_async):
        with pytest.raises(ValueError) as caught:
            call("a prompt of more than a page", params, **arguments)
        check_message(str(caught.value), *parts)
    assert llm.generate("hello", params, use_tqdm=False, cache_salt="pepper").outputs[0].length == 8


@pytest.mark.parametrize("value", [1e39, -1e39, 1e300, 1e-300])
def test_penalties_beyond_float32_are_as_strong_as_they_can_be(llm: LLM, value: float) -> None:
    """An infinite penalty on what was not said would be no number, and every token the first of the vocabulary."""
    common = {"max_tokens": 12, "ignore_eos": True}
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        if name == "repetition_penalty":
            value = abs(value)
        bounded = min(max(value, -1e30), 1e30) if name != "repetition_penalty" else min(max(value, 1e-30), 1e30)
        many = [SamplingParams(**common, **{name: penalty}) for penalty in (value, bounded)]
        extreme, strong = (o.outputs[0].token_ids for o in llm.generate(["hello"] * 2, many, use_tqdm=False))
        assert extreme == strong and set(extreme) != {0}
    biased = SamplingParams(**common, temperature=1.0, seed=1, logit_bias={7: 1e300, 9: 1e300})
    assert set(llm.generate("hello", biased, use_tqdm=False).outputs[0].token_ids) == {7, 9}


def test_what_needs_the_tokenizer(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm._engine, "tokenizer", None)
    for prompt, params in (("hello", None), ([5], SamplingParams(stop="x"))):
        with pytest.raises(ValueError) as caught:
            llm.generate(prompt, params, use_tqdm=False)
        check_message(str(caught.value), "no(ne| tokenizer)", "skip_tokenizer_init=True", "token ids|stop_token_ids")


class Borrowed:
    """The running engine for a command that would start and stop its own."""

    def __init__(self, llm: LLM) -> None:
        self._engine = llm._engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def shutdown(self) -> None:
        pass


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([""], ("prompt is empty", "at least one character")),
        (["z" * 100], ("prompt has 100 tokens", "shorten it or raise")),
        (["hi", "--max-tokens", "0"], ("max_tokens=0", ">= 1")),
        (["hi", "-n", "-1"], ("max_tokens=-1", ">= 1")),
        (["hi", "--temperature", "nan"], ("temperature=nan", "finite")),
        (["hi", "--temperature", "inf"], ("temperature=inf", "finite")),
        (["hi", "--top-p", "0"], (r"top_p=0\.0", "1")),
        (["hi", "--top-q", "0"], ("--top-q", "did you mean --top-[pk]")),
        ([], ("no prompt", "--file")),
    ],
    ids=str,
)
def test_bad_request_on_the_command_line(
    llm: LLM,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    parts: tuple[str, ...],
) -> None:
    monkeypatch.setattr(jaxllm.llm, "_start_engine", lambda config: Borrowed(llm))
    check_message(cli(capsys, "generate", MODEL, *arguments), *parts)


# ---- a model ------------------------------------------------------------------------------------------------------


def copy(tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(MODEL, target)
    (target / "expected.npz").unlink()
    return make_tokenizer(target)


def unknown_directory(tmp_path: Path) -> Path:
    return tmp_path / "nowhere"


def without_weights(tmp_path: Path) -> Path:
    model = copy(tmp_path)
    (model / "model.safetensors").unlink()
    return model


def without_config(tmp_path: Path) -> Path:
    model = copy(tmp_path)
    (model / "config.json").unlink()
    return model


def unknown_architecture(tmp_path: Path) -> Path:
    model = copy(tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["Mamba"], "model_type": "mamba"}))
    return model


def corrupted_header(tmp_path: Path) -> Path:
    file = copy(tmp_path) / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"\xff" * 40 + data[48:])
    return file.parent


def huge_header(tmp_path: Path) -> Path:
    file = copy(tmp_path) / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:])
    return file.parent


def truncated_weights(tmp_path: Path) -> Path:
    file = copy(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return file.parent


def half_a_gguf(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(8)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*map(chr, range(33, 127)), "<end>"])
    writer.add_token_types([1] * 94 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(94)
    for i in range(8):
        writer.add_tensor(f"blk.{i}.attn_q.weight", np.ones((64, 64), np.float32))
    writer.add_tensor("token_embd.weight", np.ones((95, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def without_tokenizer(tmp_path: Path) -> Path:
    model = copy(tmp_path)
    (model / "tokenizer.json").unlink()
    return model


BAD_MODELS: list[tuple[Callable[[Path], Path], tuple[str, ...]]] = [
    (unknown_directory, ("nowhere", "no such directory")),
    (without_weights, ("model", "no weights here", "expected")),
    (without_config, ("model", r"no config\.json here")),
    (unknown_architecture, ("mamba|Mamba", "supported|llama")),
    (corrupted_header, (r"model\.safetensors", "header|JSON", "download|again")),
    (huge_header, (r"model\.safetensors", "claims 1152921504606846976 bytes")),
    (truncated_weights, (r"model\.safetensors", "truncated|cut|bytes")),
    (half_a_gguf, (r"model\.gguf", "truncated|cut|bytes|end")),
    (without_tokenizer, ("model", "no tokenizer here", "skip_tokenizer_init=True")),
]


@pytest.mark.parametrize(("make", "parts"), BAD_MODELS, ids=lambda value: getattr(value, "__name__", ""))
def test_bad_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Path], parts: tuple[str, ...]
) -> None:
    model = make(tmp_path)
    with pytest.raises(ValueError) as caught:
        LLM(model, progress=False)
    # Tensors are listed one a line, each with its own reason.
    summary, *tensors = str(caught.value).split("\n")
    assert all(re.fullmatch(r"  [\w.]+: .+", line) for line in tensors)
    check_message(summary + "".join(tensors), *parts)
    check_message(cli(capsys, "generate", model, "hello", "--quiet"), *parts)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (AssertionError(), "the platform is not installed"),
        (RuntimeError("Unable to initialize\nbackend"), "initialize backend"),
    ],
    ids=repr,
)
def test_no_devices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, error: Exception, why: str
) -> None:
    def devices() -> list[jax.Device]:
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    line = cli(capsys, "generate", MODEL, "hello", "--tokenizer", make_tokenizer(tmp_path))
    check_message(line, "JAX finds no devices", "JAX_PLATFORMS", why, r"jaxllm\[cuda13\]", "JAX_PLATFORMS=cpu")


@pytest.mark.parametrize("value", ["abc", "", "2.5", "0", "-2"])
@pytest.mark.parametrize("command", [("generate", MODEL, "hello"), ("plan", "Llama-3.1-8B")], ids=lambda c: c[0])
def test_no_number_of_cpu_devices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: tuple[str, ...], value: str
) -> None:
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", value)
    parts = (f"JAX_NUM_CPU_DEVICES = {value!r} is not a number of devices", "8 for example", "unset")
    check_message(cli(capsys, *command), *parts)
    with pytest.raises(ConfigError) as caught:
        LLM(MODEL, skip_tokenizer_init=True, progress=False)
    check_message(str(caught.value), *parts)


def test_what_jax_cannot_take_from_the_environment_is_one_line() -> None:
    environment = os.environ | {"JAX_ENABLE_X64": "maybe", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxllm", "generate", "smollm2-135m", "hello"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    check_message(done.stderr, "jaxllm: error:", "maybe", "JAX_ENABLE_X64")


def test_more_ranks_than_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    have = len(jax.devices())
    parts = (f"tp={have * 2}", f"needs {have * 2} devices", f"{have} cpu device", "lower tensor_parallel_size")
    with pytest.raises(ValueError) as caught:
        LLM(MODEL, skip_tokenizer_init=True, tensor_parallel_size=have * 2)
    check_message(str(caught.value), *parts)
    arguments = ("generate", MODEL, "hello", "--tokenizer", make_tokenizer(tmp_path), "--tp", have * 2)
    check_message(cli(capsys, *arguments), *parts)


def test_more_ranks_than_heads() -> None:
    if len(jax.devices()) < 7:
        pytest.skip("needs 7 devices")
    with pytest.raises(ValueError) as caught:
        LLM(MODEL, skip_tokenizer_init=True, tensor_parallel_size=7)
    check_message(str(caught.value), "7 tensor-parallel ranks", "6 attention heads", "at most tensor_parallel_size=6")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"max_seq_len": 100_000}, ("max_seq_len = 100000", "context of 256", "lower it")),
        ({"max_batch_size": 64, "max_num_tokens": 32}, ("max_num_tokens = 32", "max_batch_size = 64", "raise|lower")),
        ({"max_batch_size": 10**8}, ("max_batch_size = 100000000", "less than or equal to 65536")),
        ({"max_num_tokens": 10**9}, ("max_num_tokens = 1000000000", "less than or equal to 1048576")),
        ({"max_batch_size": 0}, ("max_batch_size = 0", "greater than or equal to 1")),
        ({"max_batchsize": 4}, ("'max_batchsize'", "did you mean 'max_batch_size'")),
        ({"dtype": "float8"}, ("dtype = 'float8'", "float32")),
        ({"pipeline_parallel_size": 3}, ("pipeline_parallel_size = 3 is more than the model's 2 layers",)),
        ({"context_parallel_size": 16}, ("cp=16 needs 16 devices", "what fits: cp=8")),
        (
            {"kv_cache_config": {"free_gpu_memory_fraction": 0.0}},
            (r"free_gpu_memory_fraction = 0\.0", "greater than 0"),
        ),
        ({"tensor_parallel_size": 0}, ("tensor_parallel_size = 0", "greater than or equal to 1")),
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        LLM(MODEL, skip_tokenizer_init=True, progress=False, **settings)
    check_message(str(caught.value), *parts)
