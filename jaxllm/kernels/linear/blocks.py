"""Weights that stay quantised in memory, in blocks of 32 inputs, and their product with activations on the CPU.

A weight is `scale * q + low` with one scale (and, for 4 bits, one low) per row and block, both float16. The arithmetic
is that of a weight expanded to float32: `scale * q` is exact and the sum is rounded once, whether a loader or a
register does it. What is saved is memory, and the time to read it.

`[F, D]` is kept as uint8 `[F / 16, D / 32, bytes]`: sixteen rows side by side, because that is how they
lie in the lanes of a vector when they are used. The bytes are 16 scales, 16 lows (4 bits only), and 32-bit words
`[bits, 16]`, the first input in the lowest bits. 8-bit values are stored plus 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

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
