"""Random weights (`load_format="dummy"`), made on the devices: for tests and benchmarks of models nobody downloaded.

A value depends only on the seed, the checkpoint tensor and its row there, not on how the parameter is fused, padded or
sharded, so that every layout of a dummy model computes the same function.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxllm.kernels.linear.quantized import nearest, pack
from jaxllm.parallel.mesh import sharding
from jaxllm.parallel.params import ParamSpec, Part


def dummy_params(specs: Mapping[str, ParamSpec], mesh: Mesh, seed: int = 0) -> dict[str, jax.Array]:
    """Parameters for `specs`, placed like those of a real checkpoint.

    Norm weights are 1 (after the spec's offset), biases small, matrices uniform with variance 1 / fan-in, so that
    activations and logits stay of order one at any depth. Padding is 0, as in a loaded model.
    """
    makers: dict[tuple[object, ...], jax.stages.Wrapped] = {}
    params = {}
    signature: tuple[object, ...]
    arguments: tuple[object, ...]
    for path, spec in specs.items():
        layout = sharding(mesh, spec.axes)
        make: Callable[..., jax.Array]
        if spec.part is not None and spec.part.name != "values":
            params[path] = _constant(path, spec, spec.part, layout)
            continue
        if spec.part is not None:
            signature, make, arguments = _quantized(spec, spec.part, seed)
        elif len(spec.shape) == 1 and (spec.axes == (None,) or "norm" in path) and "bias" not in path:
            make = partial(_ones, spec.shape, spec.dtype)
            signature = ("ones", spec.shape, spec.dtype, spec.axes)
            arguments = ()
        else:
            make = partial(_stack if spec.stacked else _uniform, spec.shape, spec.dtype, spec.axis)
            signature = ("uniform", spec.shape, spec.dtype, spec.axes, spec.axis, spec.stacked)
            arguments = (np.uint32(seed % 2**32), *_rows(spec), np.float32(_limit(path, spec)))
        if signature not in makers:
            makers[signature] = jax.jit(make, out_shardings=layout)
        params[path] = makers[signature](*arguments)
    return params


def _quantized(
    spec: ParamSpec, part: Part, seed: int
) -> tuple[tuple[object, ...], Callable[..., jax.Array], tuple[object, ...]]:
    """Signature, maker and arguments of the values of a quantised matrix: the numbers that it would have, rounded."""
    whole, kept = part.whole, part.format
    signature = ("values", kept, spec.shape, spec.axes, spec.axis, spec.stacked)
    numbers = partial(_stack if spec.stacked else _uniform, whole.shape, np.dtype(np.float32), whole.axis)
    arguments = (np.uint32(seed % 2**32), *_rows(whole), np.float32(kept.limit))
    return signature, lambda *rows: pack(nearest(numbers(*rows), kept), kept), arguments


def _constant(path: str, spec: ParamSpec, part: Part, layout: NamedSharding) -> jax.Array:
    """Zero points of a quantised matrix, or its scales: those of numbers that reach as far as their distribution."""
    value = _limit(path, part.whole) / part.format.limit if part.name == "scale" else 0.0
    shard = np.full(layout.shard_shape(spec.shape), value, spec.dtype)
    return jax.make_array_from_callback(spec.shape, layout, lambda index: shard)


def _rows(spec: ParamSpec) -> tuple[np.ndarray, np.ndarray]:
    """Per row along `spec.axis`: a number for its checkpoint tensor (0 for padding), and its row there.

    Of a stack, for each of its matrices: [matrices, rows].
    """
    tensors, rows = np.zeros((2, spec.matrices * spec.shape[spec.axis]), np.uint32)
    at = 0
    for segment in spec.segments:
        if segment.name is not None:
            tensors[at : at + segment.size] = zlib.crc32(segment.name.encode()) or 1
            rows[at : at + segment.size] = np.arange(segment.start, segment.stop)
        at += segment.size
    if spec.stacked:
        return tensors.reshape(spec.matrices, -1), rows.reshape(spec.matrices, -1)
    return tensors, rows


def _limit(path: str, spec: ParamSpec) -> float:
    """Half-width of the uniform distribution, from the fan-in of the unpadded tensor."""
    if len(spec.shape) == 1 or "bias" in path:
        return 0.02
    fan_in = spec.shape[-1]
    if spec.axis == len(spec.shape) - 1:
        fan_in = max((s.stop for s in spec.segments if s.name is not None), default=1)
    return float(np.sqrt(3.0 / fan_in))


def _ones(shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    return jnp.ones(shape, dtype)


def _uniform(
    shape: tuple[int, ...],
    dtype: np.dtype,
    axis: int,
    seed: jax.Array,
    tensors: jax.Array,
    rows: jax.Array,
    limit: jax.Array,
) -> jax.Array:
    others = shape[:axis] + shape[axis + 1 :]
    columns = jnp.arange(np.prod(others, dtype=np.int64), dtype=jnp.uint32).reshape(others)
    row_keys = _mix(_mix(_mix(tensors ^ seed) + rows)).reshape(-1, *[1] * len(others))
    bits = _mix(row_keys ^ _mix(columns))
    # 24 bits fit float32 exactly
    values = ((bits >> 8).astype(jnp.float32) * np.float32(2.0**-23) - 1.0) * limit
    values = jnp.where((tensors != 0).reshape(row_keys.shape), values, 0.0)
    return jnp.moveaxis(values, 0, axis).astype(dtype)


def _stack(
    shape: tuple[int, ...],
    dtype: np.dtype,
    axis: int,
    seed: jax.Array,
    tensors: jax.Array,
    rows: jax.Array,
    limit: jax.Array,
) -> jax.Array:
    """`_uniform` for each matrix of a stack."""
    make = partial(_uniform, shape[1:], dtype, axis - 1, seed)
    return jax.vmap(lambda matrix, row: make(matrix, row, limit))(tensors, rows)


def _mix(x: jax.Array) -> jax.Array:
    """A bijective 32-bit hash (https://github.com/skeeto/hash-prospector, lowbias32).

    Far cheaper than jax.random, whose quality is of no use here: billions of values are made before anything runs.
    """
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
