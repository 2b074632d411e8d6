"""MXFP4: four-bit floats (e2m1) in blocks of 32 with a power of two for each.

OCP Microscaling Formats (MX) Specification 1.0. Two values to a byte, the first in the low half; the scale is an
exponent with a bias of 127.
"""

from __future__ import annotations

import numpy as np

BLOCK = 32
BLOCK_BYTES = BLOCK // 2
_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_NIBBLES = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
_PAIRS = np.stack([np.tile(_NIBBLES, 16), np.repeat(_NIBBLES, 16)], axis=1)
"""The two values of every byte, [256, 2]."""


def dequantise(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The values of blocks, uint8 [..., G, 16], with scales, uint8 [..., G]: float32 [..., 32 * G]."""
    values = _PAIRS[blocks].reshape(*blocks.shape[:-1], BLOCK)
    values = np.ldexp(values, scales.astype(np.int32)[..., None] - 127)
    return values.reshape(*blocks.shape[:-2], -1)
