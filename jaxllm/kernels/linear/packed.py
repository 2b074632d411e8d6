"""Weights that stay quantised in memory, in blocks of 32 inputs, and their product with activations on the CPU.

A weight is `scale * q + low` with one scale (and, for 4 bits, one low) per row and block, both float16. The arithmetic
is that of a weight expanded to float32: `scale * q` is exact and the sum is rounded once, whether a loader or a
register does it. What is saved is memory, and the time to read it.

`[F, D]` is kept as uint8 `[F / 16, D / 32, bytes]`: sixteen rows side by side, because that is how they
lie in the lanes of a vector when they are used. The bytes are 16 scales, 16 lows (4 bits only), and 32-bit words
`[bits, 16]`, the first input in the lowest bits. 8-bit values are stored plus 128.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.kernels.native import build

ROWS = 16
BLOCK = 32


class Packing(Enum):
    """Bits of a value."""

    Q4 = 4
    Q8 = 8

    @property
    def head_bytes(self) -> int:
        """Bytes of the scales (and lows) of a block of 16 rows."""
        return ROWS * (4 if self is Packing.Q4 else 2)

    @property
    def block_bytes(self) -> int:
        return self.head_bytes + ROWS * BLOCK * self.value // 8

    def shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        """The packed shape of a matrix; rows must be a multiple of 16, columns of 32."""
        return rows // ROWS, columns // BLOCK, self.block_bytes


@dataclass(frozen=True, slots=True)
class Blocks:
    """Quantised rows as read from a checkpoint: q uint8 `[rows, columns]`; scale, low float16 `[rows, columns / 32]`.

    8-bit values are plus 128, and have no low.
    """

    q: np.ndarray
    scale: np.ndarray
    low: np.ndarray | None = None


def is_packed(weight: jax.Array) -> bool:
    """Whether a weight is packed; no other weight is uint8."""
    return bool(weight.dtype == jnp.uint8)


def available() -> bool:
    """Whether products with packed weights can be computed here."""
    return build.available("packed_linear", check)


def pack(packing: Packing, blocks: Blocks) -> np.ndarray:
    """The packed form, uint8 `[F / 16, D / 32, bytes]`."""
    groups, count, width = packing.shape(*blocks.q.shape)
    out = np.empty((groups, count, width), np.uint8)
    heads = [blocks.scale] if blocks.low is None else [blocks.scale, blocks.low]
    for i, head in enumerate(heads):
        lanes = head.astype(np.float16).reshape(groups, ROWS, count).transpose(0, 2, 1)
        out[..., i * 2 * ROWS : (i + 1) * 2 * ROWS] = np.ascontiguousarray(lanes).view(np.uint8)
    per_byte = 8 // packing.value
    q = blocks.q.reshape(groups, ROWS, count, packing.value, 4, per_byte)
    byte = q[..., 0] if per_byte == 1 else q[..., 0] | q[..., 1] << 4
    out[..., packing.head_bytes :] = byte.transpose(0, 2, 3, 1, 4).reshape(groups, count, -1)
    return out


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
