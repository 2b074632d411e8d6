"""GGUF files for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

RNG = np.random.default_rng(0)


def write(path: Path, arch: str, fill: Callable[[gguf.GGUFWriter], None]) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(kind: Type, rows: int, columns: int) -> np.ndarray:
    """Raw bytes of random quantised rows, without scales that are infinite or NaN."""
    block, width = gguf.GGML_QUANT_SIZES[kind]
    raw = RNG.integers(0, 256, (rows, columns // block, width), np.uint8)
    with np.errstate(invalid="ignore"):
        values = gguf.quants.dequantize(raw.reshape(rows, -1), kind).reshape(rows, columns // block, block)
    raw[~np.isfinite(values).all(-1)] = 0
    return raw.reshape(rows, -1)
