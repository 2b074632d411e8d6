"""The one device mesh, and the one table from logical axes to mesh axes.

Modules name logical axes only. Changing how the model is laid out means changing `LOGICAL_AXES`, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxllm.mapping import Mapping

AXES = ("pp", "cp", "ep", "tp")

# Dense weights shard over ep and tp together, so that a model without experts can use every device of a stage.
MODEL_AXES = ("ep", "tp")

LOGICAL_AXES: dict[str, str | tuple[str, ...]] = {
    "heads": MODEL_AXES,
    "ffn": MODEL_AXES,
    "vocab": MODEL_AXES,
    "pages": "cp",
}


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


def partition(axes: Sequence[str | None]) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions carry these logical axes."""
    return PartitionSpec(*(None if a is None else LOGICAL_AXES[a] for a in axes))


def sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """The NamedSharding of an array whose dimensions carry these logical axes."""
    return NamedSharding(mesh, partition(axes))


def axis_size(mesh: Mesh, logical: str) -> int:
    """The number of shards that a logical axis is split into."""
    names = LOGICAL_AXES[logical]
    return int(np.prod([mesh.shape[a] for a in ((names,) if isinstance(names, str) else names)]))
