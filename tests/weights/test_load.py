from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxllm.mapping import CpType, Mapping
from jaxllm.parallel.heads import split_segments
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.params import ParamSpec, Segment
from jaxllm.weights.load import load_params
from jaxllm.weights.source import CheckpointError, TensorInfo

TP = ("ep", "tp")
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
RNG = np.random.default_rng(0)
ARRAYS: dict[str, np.ndarray] = {
    "q": RNG.normal(size=(12, 16)).astype(F32),
    "k": RNG.normal(size=(4, 16)).astype(F32),
    "v": RNG.normal(size=(4, 16)).astype(F32),
    "o": RNG.normal(size=(16, 12)).astype(F32),
    "norm": RNG.normal(size=(16,)).astype(BF16),
    "up": RNG.normal(size=(32, 16)).astype(BF16),
}
SHAPES = {n: a.shape for n, a in ARRAYS.items()}


def fused_specs(tp: int, dtype: np.dtype = F32) -> dict[str, ParamSpec]:
    """Heads of 4 rows: 3 query heads padded to a multiple of tp, one KV head replicated for each shard."""
    heads = -(-3 // tp) * tp
    qkv, o = [], []
    for shard in range(tp):
        for head in range(shard * heads // tp, (shard + 1) * heads // tp):
            qkv.append(Segment("q" if head < 3 else None, head * 4 % 12, head * 4 % 12 + 4))
            o.append(qkv[-1])
        qkv += [Segment("k", 0, 4), Segment("v", 0, 4)]
    o = [Segment(s.name and "o", s.start, s.stop) for s in o]
    return {
        "qkv": ParamSpec((sum(s.size for s in qkv), 16), dtype, (TP, None), tuple(qkv)),
        "o": ParamSpec((16, sum(s.size for s in o)), dtype, (None, TP), tuple(o), axis=1),
        "norm": ParamSpec((16,), F32, (None,), (Segment("norm", 0, 16),), offset=1.0),
        "up": ParamSpec((32, 16), dtype, (TP, None), (Segment("up", 0, 32),)),
    }


def build(spec: ParamSpec) -> np.ndarray:
    """The plain way: every segment whole, laid end to end."""
    parts = []
    for s in spec.segments:
        shape = [s.size if i == spec.axis else n for i, n in enumerate(spec.shape)]
        index = [slice(None)] * len(spec.shape)
        index[spec.axis] = slice(s.start, s.stop)
        part = np.zeros(shape, F32) if s.name is None else ARRAYS[s.name][tuple(index)].astype(F32) + spec.offset
        parts.append(part.astype(spec.dtype))
    return np.concatenate(parts, spec.axis)


def expert_arrays(count: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {"gate": (5, 16), "up": (5, 16), "down": (16, 5)}
    return {f"{n}{e}": rng.normal(size=s).astype(F32) for e in range(count) for n, s in shapes.items()}


def expert_specs(tp: int, count: int = 4) -> dict[str, ParamSpec]:
    """Stacks of experts, 5 columns each, cut over tp ranks and padded."""
    up, down = [], []
    for expert in range(count):
        for rank in range(tp):
            up += [s for n in ("gate", "up") for s in split_segments(f"{n}{expert}", 5, tp, rank)]
            down += split_segments(f"down{expert}", 5, tp, rank)
    F = -(-5 // tp) * tp
    return {
        "gate_up": ParamSpec((count, 2 * F, 16), F32, (("ep",), ("tp",), None), tuple(up), axis=1, stacked=True),
        "down": ParamSpec((count, 16, F), F32, (("ep",), None, ("tp",)), tuple(down), axis=2, stacked=True),
    }


@pytest.mark.parametrize(("ep", "tp"), [(1, 1), (4, 2), (2, 3)])
def test_experts(memory_source: Any, ep: int, tp: int) -> None:
    arrays = expert_arrays()
    source = memory_source(arrays)
    mesh = make_mesh(Mapping(ep=ep, tp=tp))
    params = load_params(expert_specs(tp), {n: a.shape for n, a in arrays.items()}, source, mesh)
    part = -(-5 // tp)
    for index, device in np.ndenumerate(mesh.devices[0, 0]):
        (found_up,) = (s.data for s in params["gate_up"].addressable_shards if s.device == device)
        (found_down,) = (s.data for s in params["down"].addressable_shards if s.device == device)
        for local in range(4 // ep):
            expert, columns = index[0] * 4 // ep + local, slice(index[1] * part, (index[1] + 1) * part)
            padding = ((0, part * tp - 5), (0, 0))
            gate, up = (np.pad(arrays[f"{n}{expert}"], padding)[columns] for n in ("gate", "up"))
            np.testing.assert_array_equal(found_up[local], np.concatenate([gate, up]))
            np.testing.assert_array_equal(found_down[local], np.pad(arrays[f"down{expert}"].T, padding)[columns].T)


def test_a_stack_must_be_covered() -> None:
    segments = (Segment("a", 0, 4), Segment("b", 0, 3))
    with pytest.raises(ValueError, match="segments cover 7 rows of 8 along axis 1"):
        ParamSpec((2, 4, 8), F32, (None, None, None), segments, axis=1, stacked=True)
    with pytest.raises(ValueError, match="are not cut along the axis that counts them"):
        ParamSpec((2, 4, 8), F32, (None, None, None), segments, stacked=True)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
def test_every_layout(memory_source: Any, mesh_of: Callable[[int], Mesh], tp: int, dtype: np.dtype) -> None:
    specs = fused_specs(tp, dtype)
    if tp == 3:
        del specs["up"]  # 32 rows do not divide
    source = memory_source({n: ARRAYS[n] for spec in specs.values() for n in spec.names()})
    mesh = mesh_of(tp)
    params = load_params(specs, {n: SHAPES[n] for n in source.arrays}, source, mesh)
    assert set(params) == set(specs)
    for path, spec in specs.items():
        assert params[path].dtype == spec.dtype and params[path].shape == spec.shape
        assert len(params[path].sharding.device_set) == tp
        np.testing.assert_array_equal(np.asarray(params[path]), build(spec))
        for shard in params[path].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), build(spec)[shard.index])


def test_reads_no_more_than_the_devices_hold(memory_source: Any, mesh_of: Callable[[int], Mesh]) -> None:
    specs = fused_specs(4)
    source = memory_source(ARRAYS)
    load_params(specs, SHAPES, source, mesh_of(4))
    # the norm is replicated on four devices, and still read once
    rows = sum(s.size for s in specs["qkv"].segments if s.name) + 12
    assert source.bytes_read == rows * 16 * 4 + ARRAYS["norm"].nbytes + ARRAYS["up"].nbytes
    assert max(i[0].stop - i[0].start for n, i in source.reads if n == "up") == 8


def test_replicas_are_read_once(memory_source: Any, mesh_of: Callable[[int], Mesh]) -> None:
    mesh_of(4)  # skips when there are too few devices
    source = memory_source({"up": ARRAYS["up"]})
    specs = {"up": ParamSpec((32, 16), BF16, (TP, None), (Segment("up", 0, 32),))}
    params = load_params(specs, {"up": (32, 16)}, source, make_mesh(Mapping(tp=2, cp=2, cp_type=CpType.RING)))
    assert len(params["up"].addressable_shards) == 4 and source.bytes_read == ARRAYS["up"].nbytes


def test_parameters_in_flight_are_bounded(
    memory_source: Any, mesh_of: Callable[[int], Mesh], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small parameters are read side by side, but never more at once than the largest one takes."""
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    active, most, lock = 0, 0, threading.Lock()

    class Slow(memory_source):  # type: ignore[misc]
        def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
            nonlocal active, most
            with lock:
                active += self.tensors[name].nbytes
                most = max(most, active)
            time.sleep(0.02)
            with lock:
                active -= self.tensors[name].nbytes
            return super().read(name, index)

    rows = {"large1": 64, "large2": 64, "large3": 64, **{f"small{i}": 16 for i in range(8)}}
    specs = {n: ParamSpec((r, 4), F32, (TP, None), (Segment(n, 0, r),)) for n, r in rows.items()}
    arrays = {n: np.ones((r, 4), F32) for n, r in rows.items()}
    load_params(specs, {n: a.shape for n, a in arrays.items()}, Slow(arrays), mesh_of(1))
    assert most <= arrays["large1"].nbytes
    alone = {n: s for n, s in specs.items() if n != "large2" and n != "large3"}
    most = 0
    arrays = {n: arrays[n] for n in reversed(alone)}
    load_params(dict(reversed(alone.items())), {n: a.shape for n, a in arrays.items()}, Slow(arrays), mesh_of(1))
    assert 2 * 16 * 16 <= most <= 64 * 16


def test_all_problems_in_one_error(memory_source: Any, mesh_of: Callable[[int], Mesh]) -> None:
    source = memory_source({**ARRAYS, "surplus": ARRAYS["o"], "rotary_emb.inv_freq": ARRAYS["norm"]})
    del source.tensors["k"]
    source.tensors["v"] = TensorInfo((5, 16), F32, 320)
    source.tensors["up"] = TensorInfo((32, 16), BF16, 1024, "cut off: ends at byte 9 of a file of 8")
    with pytest.raises(CheckpointError) as caught:
        load_params(fused_specs(1), SHAPES, source, mesh_of(1))
    assert caught.value.problems == [
        "k: missing (the model needs it)",
        "surplus: unknown to this model",
        "v: shape [5, 16], but the model needs [4, 16]",
        "up: cut off: ends at byte 9 of a file of 8",
    ]
    assert "memory does not fit the model: 4 problems" in str(caught.value)
    assert not source.reads


def test_ignored_tensors(memory_source: Any, mesh_of: Callable[[int], Mesh]) -> None:
    source = memory_source({**ARRAYS, "surplus": ARRAYS["o"]})
    assert load_params(fused_specs(1), SHAPES, source, mesh_of(1), ignore=(r"^surplus$",))
    with pytest.raises(CheckpointError, match="surplus: unknown"):
        load_params(fused_specs(1), SHAPES, source, mesh_of(1), ignore=(r"^other$",))


def test_an_error_while_reading_gets_out(memory_source: Any, mesh_of: Callable[[int], Mesh]) -> None:
    class Failing(memory_source):  # type: ignore[misc]
        def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
            if name == "o":
                raise CheckpointError("file", "o: gone")
            return super().read(name, index)

    with pytest.raises(CheckpointError, match="o: gone"):
        load_params(fused_specs(2), SHAPES, Failing(ARRAYS), mesh_of(2))


def test_progress_needs_no_terminal(memory_source: Any, mesh_of: Callable[[int], Mesh], capsys: Any) -> None:
    load_params(fused_specs(1), SHAPES, memory_source(ARRAYS), mesh_of(1), progress=True)
    assert capsys.readouterr().err == ""


_PEAK = """
import sys, resource
import jax, numpy as np, ml_dtypes
from safetensors.numpy import save_file
from jaxllm.mapping import CpType, Mapping
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.params import ParamSpec, Segment
from jaxllm.weights.load import load_params
from jaxllm.weights.safetensors import SafetensorsSource

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

tensors, rows, columns, path = 32, 2048, 1024, sys.argv[1]
names = [f"t{i}" for i in range(tensors)]
bf16 = np.dtype(ml_dtypes.bfloat16)
specs = {n: ParamSpec((rows, columns), bf16, (("ep", "tp"), None), (Segment(n, 0, rows),)) for n in names}
shapes = {n: (rows, columns) for n in names}
mesh = make_mesh(Mapping())
jax.block_until_ready(jax.numpy.ones((rows, columns), bf16) + 1)
source = SafetensorsSource([path])
before = peak()
params = load_params(specs, shapes, source, mesh)
growth = peak() - before
total = sum(p.nbytes for p in params.values())
print((growth - total) / (rows * columns * 4), growth / total)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_host_memory_is_bounded_by_the_largest_tensor(tmp_path: Any) -> None:
    """A float32 checkpoint of 256 MB, loaded as bfloat16: on top of the 128 MB of parameters (on a CPU the host holds
    those too) there may be a few tensors of 8 MB, not the file's pages and not a copy of the model."""
    from safetensors.numpy import save_file

    save_file({f"t{i}": np.full((2048, 1024), i, np.float32) for i in range(32)}, tmp_path / "m.safetensors")
    command = [sys.executable, "-c", _PEAK, str(tmp_path / "m.safetensors")]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    extra_tensors = float(out.split()[0])
    assert extra_tensors < 6, f"{extra_tensors:.1f} tensors of extra memory"


def test_params_do_not_alias_the_checkpoint(memory_source: Any, mesh_of: Callable[[int], Mesh]) -> None:
    source = memory_source({"up": ARRAYS["up"].copy()})
    specs = {"up": ParamSpec((32, 16), BF16, (TP, None), (Segment("up", 0, 32),))}
    params = load_params(specs, {"up": (32, 16)}, source, mesh_of(1))
    source.arrays["up"][...] = 0
    np.testing.assert_array_equal(np.asarray(params["up"]), ARRAYS["up"])
    assert isinstance(params["up"], jax.Array)
