"""Fixtures for checkpoints: eight fake CPU devices, and a source that lives in memory and counts what is read."""

from __future__ import annotations

import os
from collections.abc import Callable

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxllm.mapping import Mapping
from jaxllm.parallel.mesh import make_mesh
from jaxllm.weights.source import TensorInfo

if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", "") and "JAX_NUM_CPU_DEVICES" not in os.environ:
    jax.config.update("jax_num_cpu_devices", 8)


class MemorySource:
    """A `Source` over arrays that records every read."""

    name = "memory"

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self.tensors = {k: TensorInfo(v.shape, v.dtype, v.nbytes) for k, v in arrays.items()}
        self.reads: list[tuple[str, tuple[slice, ...]]] = []
        self.bytes_read = 0

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        out = self.arrays[name][index].copy()
        self.reads.append((name, index))
        self.bytes_read += out.nbytes
        return out

    def close(self) -> None:
        pass


@pytest.fixture
def memory_source() -> type[MemorySource]:
    return MemorySource


@pytest.fixture
def mesh_of() -> Callable[[int], Mesh]:
    def make(tp: int) -> Mesh:
        if len(jax.devices()) < tp:
            pytest.skip(f"needs {tp} devices")
        return make_mesh(Mapping(tp=tp))

    return make
