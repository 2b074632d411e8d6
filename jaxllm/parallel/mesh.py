"""The one device mesh, and shardings over its axes. `parallel/layout.py` says what lies along which of them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxllm.mapping import Mapping

AXES = ("pp", "cp", "ep", "tp")


def make_mesh(mapping: Mapping, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with all four axes over the first `mapping.world_size` devices.

    Raises ValueError when there are fewer devices than the mapping needs.
    """
    found = list(jax.devices() if devices is None else devices)
    need = mapping.world_size
    if need > len(found):
        sizes = " x ".join(f"{a}={n}" for a, n in zip(AXES, mapping.shape, strict=True) if n > 1)
        raise ValueError(
            f"the layout {sizes} needs {need} devices, but only {len(found)} {found[0].platform} device(s) "
            "are visible: "
            f"lower tensor_parallel_size, or make more devices visible (CUDA_VISIBLE_DEVICES; on a CPU, "
            f"JAX_NUM_CPU_DEVICES={need})"
        )
    grid = np.asarray(found[:need]).reshape(mapping.shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def stage_mesh(mesh: Mesh, stage: int) -> Mesh:
    """The devices of one pipeline stage, as a mesh with all four axes."""
    return Mesh(mesh.devices[stage : stage + 1], mesh.axis_names, axis_types=mesh.axis_types)


def partition(axes: Sequence[tuple[str, ...] | None]) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions are split over these mesh axes, the major one first."""
    return PartitionSpec(*(names or None for names in axes))


def sharding(mesh: Mesh, axes: Sequence[tuple[str, ...] | None]) -> NamedSharding:
    """The NamedSharding of an array whose dimensions are split over these mesh axes."""
    return NamedSharding(mesh, partition(axes))
