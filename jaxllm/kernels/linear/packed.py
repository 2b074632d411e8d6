"""Products with weights that stay quantised in memory (see `blocks`), by `native/packed_linear.cc` on the CPU."""

from __future__ import annotations

import math
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.kernels.linear.blocks import BLOCK, ROWS, Blocks, Packing, pack
from jaxllm.kernels.linear.quantized import Weight
from jaxllm.kernels.native import build


def is_packed(weight: Weight) -> TypeGuard[jax.Array]:
    """Whether a weight is packed; no other weight is uint8."""
    return bool(weight.dtype == jnp.uint8)


def available() -> bool:
    """Whether products with packed weights can be computed here."""
    return build.available("packed_linear", check)


def take_rows(weight: jax.Array, ids_T: jax.Array) -> jax.Array:
    """Rows of a packed matrix, float32 `[T, D]`; ids must be in range."""
    packing = next(p for p in Packing if p.block_bytes == weight.shape[-1])
    blocks = weight[ids_T // ROWS]  # T, D / 32, bytes
    T, count, _ = blocks.shape
    lane = (ids_T % ROWS)[:, None, None]

    def head(at: int) -> jax.Array:
        halves = lax.bitcast_convert_type(blocks[..., at : at + 2 * ROWS].reshape(T, count, ROWS, 2), jnp.float16)
        return jnp.take_along_axis(halves, lane, axis=2).astype(jnp.float32)

    words = blocks[..., packing.head_bytes :].reshape(T, count, packing.value, ROWS, 4)
    byte = jnp.take_along_axis(words, lane[..., None, None], axis=3).reshape(T, count, -1)
    scale = head(0)
    if packing is Packing.Q4:
        q = jnp.stack([byte & 15, byte >> 4], axis=-1).reshape(T, count, BLOCK).astype(jnp.float32)
        rows = scale * q + head(2 * ROWS)
    else:
        rows = scale * (byte.astype(jnp.float32) - 128)
    return rows.reshape(T, count * BLOCK)


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """See `api.matmul`. Raises NotImplementedError for weights that are not packed."""
    if not is_packed(weight):
        raise NotImplementedError("the weights are not packed")
    if x.dtype != jnp.float32 or not available():
        raise NotImplementedError("packed weights need float32 activations and the native CPU kernel")
    tokens, F = math.prod(x.shape[:-1]), weight.shape[0] * ROWS
    call = jax.ffi.ffi_call("jaxllm_packed_linear", jax.ShapeDtypeStruct((tokens, F), jnp.float32))
    return call(x.reshape(tokens, x.shape[-1]), weight).reshape(*x.shape[:-1], F)


def check(target: str) -> None:
    """Raises ArithmeticError if the kernel is wrong on a small input."""
    rng = np.random.default_rng(0)
    for packing, T, F, D in ((Packing.Q4, 1, 48, 64), (Packing.Q8, 5, 32, 288), (Packing.Q4, 37, 48, 320)):
        q = rng.integers(0, 1 << packing.value, (F, D), np.uint8)
        scale, low = rng.uniform(0.01, 0.02, (2, F, D // BLOCK)).astype(np.float16)
        weight = pack(packing, Blocks(q, scale, low if packing is Packing.Q4 else None))
        x = rng.standard_normal((T, D), np.float32)
        out = np.asarray(jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((T, F), jnp.float32))(x, weight))
        offset = low.astype(np.float64) if packing is Packing.Q4 else -128.0 * scale.astype(np.float64)
        wide = np.repeat(scale.astype(np.float64), BLOCK, 1) * q + np.repeat(offset, BLOCK, 1)
        error = np.abs(out - x.astype(np.float64) @ wide.T).max()
        if not error < 1e-3:
            raise ArithmeticError(f"{target} is wrong by {error:.1e} at {packing} T={T} D={D} F={F}")
