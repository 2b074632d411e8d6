"""Models, machines and settings that cannot be used: a one-line error with the value, the rule and the way out."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest

from jaxllm import LLM, ConfigError
from tests.one_line import check_message, cli
from tests.tiny_llm import MODEL, make_tokenizer

pytestmark = pytest.mark.timeout(300)


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
