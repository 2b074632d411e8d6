from __future__ import annotations

import json
import logging
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh

from jaxllm.parallel.params import ParamSpec, Segment
from jaxllm.weights.load import load_params
from jaxllm.weights.orbax import OrbaxSource, convert
from jaxllm.weights.resolve import resolve_model
from jaxllm.weights.source import CheckpointError, TensorInfo

RNG = np.random.default_rng(0)
ARRAYS: dict[str, np.ndarray] = {
    "model.layers.0.mlp.up_proj.weight": RNG.normal(size=(24, 40)).astype(ml_dtypes.bfloat16),
    "model.layers.10.self_attn.o_proj.weight": RNG.normal(size=(40, 24)).astype(np.float32),
    "model.norm.weight": RNG.normal(size=(40,)).astype(np.float16),
    "zeros": np.zeros((8, 8), np.float32),
}


@pytest.fixture
def converted(tmp_path: Path, memory_source: Any) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return convert(memory_source(ARRAYS), [tmp_path / "config.json"], tmp_path / "out" / "model")


def test_round_trip(converted: Path) -> None:
    files = resolve_model(converted)
    assert files.kind == "orbax" and files.config == {"model_type": "llama"}
    source = files.open()
    assert {n: (t.shape, t.dtype) for n, t in source.tensors.items()} == {
        n: (a.shape, a.dtype) for n, a in ARRAYS.items()
    }
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(source.read(name, ()), array)
        np.testing.assert_array_equal(source.read(name, (slice(3, 7),)), array[3:7])
    name = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(source.read(name, (slice(5, 24), slice(9, 9))), ARRAYS[name][5:24, 9:9])
    np.testing.assert_array_equal(source.read(name, (slice(0, 1), slice(39, 40))), ARRAYS[name][:1, 39:])


def test_orbax_itself_restores_it(converted: Path) -> None:
    restored = ocp.PyTreeCheckpointer().restore(converted / "orbax")
    assert set(restored) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(restored[name], array)


def test_restores_onto_any_mesh(converted: Path, mesh_of: Callable[[int], Mesh]) -> None:
    specs = {
        n: ParamSpec(a.shape, a.dtype, (("ep", "tp"), *[None] * (a.ndim - 1)), (Segment(n, 0, a.shape[0]),))
        for n, a in ARRAYS.items()
    }
    for tp in (1, 2, 8):
        source = OrbaxSource(converted / "orbax")
        params = load_params(specs, {n: a.shape for n, a in ARRAYS.items()}, source, mesh_of(tp))
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(np.asarray(params[name]), array)
            assert len(params[name].sharding.device_set) == tp


def test_large_tensors_are_chunked(tmp_path: Path, memory_source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxllm.weights.orbax.CHUNK_BYTES", 1 << 12)
    big = RNG.normal(size=(64, 64)).astype(np.float32)
    convert(memory_source({"w": big}), [], tmp_path / "m")
    source = OrbaxSource(tmp_path / "m" / "orbax")
    assert np.prod(source._arrays["w"].chunk_layout.read_chunk.shape) * 4 <= 1 << 12
    np.testing.assert_array_equal(source.read("w", (slice(1, 63), slice(30, 33))), big[1:63, 30:33])


def test_one_tensor_at_a_time(tmp_path: Path, memory_source: Any) -> None:
    alive: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()
    most = 0

    class Counting(memory_source):  # type: ignore[misc]
        def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
            nonlocal most
            out = super().read(name, index)
            alive[len(self.reads)] = out
            most = max(most, len(alive))
            return out

    source = Counting({f"t{i}": np.full((64, 64), i, np.float32) for i in range(20)})
    convert(source, [], tmp_path / "m")
    assert len(source.reads) == 20 and most <= 3


def test_gguf_metadata_goes_along(tmp_path: Path, memory_source: Any) -> None:
    metadata = {"general.architecture": "llama", "tokenizer.ggml.tokens": ["a", "\u2581"], "x": 0.1}
    convert(memory_source(ARRAYS), [], tmp_path / "m", metadata=metadata)
    files = resolve_model(tmp_path / "m")
    assert files.metadata == metadata and files.config is None
    assert files.tokenizer == tmp_path / "m" / "gguf.json"


def test_destination_with_content_is_refused(converted: Path, memory_source: Any) -> None:
    before = sorted(converted.rglob("*"))
    with pytest.raises(CheckpointError, match="exists and is not an empty directory"):
        convert(memory_source(ARRAYS), [], converted)
    with pytest.raises(CheckpointError, match="exists and is not an empty directory"):
        convert(memory_source(ARRAYS), [], converted / "config.json")
    assert sorted(converted.rglob("*")) == before


def test_destination_that_cannot_be_made(tmp_path: Path, memory_source: Any) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be made \(Not a directory\): name another"):
        convert(memory_source(ARRAYS), [], tmp_path / "file" / "model")


def test_no_warnings_that_say_nothing(tmp_path: Path, memory_source: Any) -> None:
    absl = logging.getLogger("absl")
    heard: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    absl.addHandler(listener)
    level = absl.level
    try:
        convert(memory_source(ARRAYS), [], tmp_path / "model")
    finally:
        absl.removeHandler(listener)
    assert heard == [] and absl.level == level


def test_damaged_source_writes_nothing(tmp_path: Path, memory_source: Any) -> None:
    source = memory_source(dict(ARRAYS))
    source.tensors["zeros"] = TensorInfo((8, 8), np.dtype(np.float32), 256, "cut off: somewhere")
    with pytest.raises(CheckpointError, match="zeros: cut off"):
        convert(source, [], tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("damage", ["_CHECKPOINT_METADATA", "manifest.ocdbt", "d"])
def test_damaged_checkpoint(converted: Path, damage: str) -> None:
    victim = converted / "orbax" / damage
    if damage == "manifest.ocdbt":
        victim.write_bytes(b"garbage")
    elif victim.is_dir():
        shutil.rmtree(victim)
    else:
        victim.unlink()
    with pytest.raises(CheckpointError, match="convert it again") as caught:
        source = OrbaxSource(converted / "orbax")
        for name in ARRAYS:
            source.read(name, ())
    assert "\n" not in str(caught.value)


def test_names_stay_flat(converted: Path) -> None:
    tree = json.loads((converted / "orbax" / "_METADATA").read_text())["tree_metadata"]
    assert len(tree) == len(ARRAYS)
