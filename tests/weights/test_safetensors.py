from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxllm.weights.safetensors import MAX_HEADER_BYTES, SafetensorsSource, canonical_name
from jaxllm.weights.source import CheckpointError

Files = tuple[list[Path], dict[str, np.ndarray]]


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Files:
    rng = np.random.default_rng(0)
    arrays = {
        "f32": rng.normal(size=(7, 5)).astype(np.float32),
        "f16": rng.normal(size=(3, 4, 2)).astype(np.float16),
        "f64": rng.normal(size=(6,)),
        "bf16": rng.normal(size=(9, 11)).astype(ml_dtypes.bfloat16),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    folder = tmp_path_factory.mktemp("st")
    bf16 = arrays["bf16"]  # the package's NumPy side does not know this dtype
    header = {"__metadata__": {"format": "pt"}, "bf16": entry("BF16", list(bf16.shape), 0, bf16.nbytes)}
    one = write(folder / "one.safetensors", header, bf16.tobytes())
    save_file({n: a for n, a in arrays.items() if n != "bf16"}, folder / "two.safetensors")
    return [one, folder / "two.safetensors"], arrays


def test_reads_what_the_package_wrote(file: Files) -> None:
    paths, arrays = file
    source = SafetensorsSource(paths)
    assert set(source.tensors) == set(arrays)
    for name, expected in arrays.items():
        got = source.read(name, ())
        assert got.dtype == expected.dtype and source.tensors[name].shape == expected.shape
        np.testing.assert_array_equal(got, expected)
        assert got.flags.owndata and got.flags.writeable
    source.close()


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_any_slice(file: Files, data: st.DataObject) -> None:
    paths, arrays = file
    name = data.draw(st.sampled_from(["f32", "f16", "f64", "bf16"]))
    index = []
    for size in arrays[name].shape[: data.draw(st.integers(0, arrays[name].ndim))]:
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size))))
    source = SafetensorsSource(paths)
    np.testing.assert_array_equal(source.read(name, tuple(index)), arrays[name][tuple(index)])
    source.close()


def test_two_files_are_one_source(tmp_path: Path) -> None:
    a, b = np.ones((2, 2), np.float32), np.zeros((3,), np.float32)
    save_file({"a": a}, tmp_path / "1.safetensors")
    save_file({"b": b}, tmp_path / "2.safetensors")
    source = SafetensorsSource([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    np.testing.assert_array_equal(source.read("a", ()), a)
    np.testing.assert_array_equal(source.read("b", ()), b)
    save_file({"a": b}, tmp_path / "2.safetensors")
    with pytest.raises(CheckpointError, match=r"a is in 1\.safetensors too"):
        SafetensorsSource([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few"),
        (b"\x01\x02", "2 bytes are too few"),
        (struct.pack("<Q", 2**63) + b"{}", "claims 9223372036854775808 bytes in a file of 10"),
        (struct.pack("<Q", MAX_HEADER_BYTES) + b"{}", "claims 100000000 bytes in a file of 10"),
        (struct.pack("<Q", 3) + b"{}", "claims 3 bytes in a file of 10"),
        (struct.pack("<Q", 2) + b"{x", "not JSON"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "not JSON"),
        (struct.pack("<Q", 2) + b"[]", "a JSON list, not an object"),
    ],
)
def test_corrupted_header(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsSource([path])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert peak < 4_000_000


def test_header_larger_than_the_format_allows_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(CheckpointError, match="claims 100000001"):
        SafetensorsSource([path])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (entry("F32", [2, 2], 0, 32), "cut off"),
        (entry("F32", [2, 2], 0, 8), "cannot be F32 of shape"),
        (entry("F8_E5M2", [4], 0, 4), "dtype 'F8_E5M2' is not supported"),
        (entry("U32", [4], 0, 16), "dtype 'U32' is not supported"),
        (entry("F32", [-1, -4], 0, 16), "bad shape"),
        (entry("F32", [True], 0, 4), "bad shape"),
        (entry("F32", [4], 16, 0), "bad shape"),
        (entry("F32", [2**62, 4], 0, 16), "cannot be F32"),
        ({"dtype": "F32"}, "bad shape None"),
        ("nothing", "not an object"),
    ],
)
def test_bad_tensor_is_reported_and_the_others_work(tmp_path: Path, bad: Any, message: str) -> None:
    if bad == entry("F32", [2, 2], 0, 32):
        bad = entry("F32", [2, 4], 0, 32)
    path = write(tmp_path / "x.safetensors", {"bad": bad, "good": entry("F32", [4], 0, 16)}, bytes(16))
    source = SafetensorsSource([path])
    assert message in source.tensors["bad"].problem
    with pytest.raises(CheckpointError, match="bad: "):
        source.read("bad", ())
    assert source.read("good", ()).shape == (4,)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        SafetensorsSource([tmp_path / "nope.safetensors"])


def test_multimodal_names() -> None:
    assert canonical_name("language_model.model.layers.0.x.weight") == "model.layers.0.x.weight"
    assert canonical_name("model.language_model.embed_tokens.weight") == "model.embed_tokens.weight"
    assert canonical_name("language_model.lm_head.weight") == "lm_head.weight"
    assert canonical_name("model.layers.0.x.weight") == "model.layers.0.x.weight"
    assert canonical_name("vision_tower.x") == "vision_tower.x"
