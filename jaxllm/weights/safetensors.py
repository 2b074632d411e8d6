"""Safetensors files, read through memory maps so that a slice costs only its own pages.

The format (https://github.com/huggingface/safetensors#format) is 8 bytes of header length, a JSON header, and the data.
The safetensors package cannot give bfloat16 to NumPy, and trusts the file to stay as long as it was; hence our own.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from jaxllm.weights.source import CheckpointError, TensorInfo, Unquantised, bounds, prefetch, release

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; a larger length is a corrupted file, and must not be allocated."""

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}

# Multimodal checkpoints keep the language model one level down; its tensors get the names of a text-only checkpoint.
_NESTED = re.compile(r"^(?:language_model\.model|model\.language_model)\.|^language_model\.(?=lm_head\.)")


def canonical_name(name: str) -> str:
    """The name that a text-only checkpoint gives this tensor."""
    match = _NESTED.match(name)
    if match is None:
        return name
    return ("" if name.startswith("lm_head.", match.end()) else "model.") + name[match.end() :]


@dataclass(frozen=True, slots=True)
class _Place:
    file: int
    start: int  # in bytes from the start of the file
    info: TensorInfo


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header (without `__metadata__`) and the offset of the data.

    Raises:
        CheckpointError: the file is not safetensors, or its header is damaged.
    """
    again = "download or convert it again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(path, f"{size} bytes are too few for a safetensors file: {again}")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES or 8 + length > size:
                raise CheckpointError(
                    path,
                    f"the safetensors header claims {length} bytes in a file of {size}: corrupted or cut off, {again}",
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(path, f"the safetensors header is not JSON ({error}): {again}") from error
    if not isinstance(header, dict):
        raise CheckpointError(path, f"the safetensors header is a JSON {type(header).__name__}, not an object: {again}")
    header.pop("__metadata__", None)
    return header, 8 + length


class SafetensorsSource(Unquantised):
    """One or many safetensors files as one `Source`.

    Raises:
        CheckpointError: a file is missing, not safetensors, or two files hold the same tensor.
    """

    def __init__(self, files: Iterable[str | os.PathLike[str]]) -> None:
        self.files = [Path(f) for f in files]
        self._maps: list[mmap.mmap] = []
        self._places: dict[str, _Place] = {}
        try:
            for i, path in enumerate(self.files):
                self._add(i, path)
        except BaseException:
            self.close()
            raise
        self.tensors = {name: place.info for name, place in self._places.items()}

    @property
    def name(self) -> str:
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)

    def _add(self, number: int, path: Path) -> None:
        header, data = read_header(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        for raw_name, entry in header.items():
            name = canonical_name(raw_name)
            if name in self._places:
                other = self.files[self._places[name].file]
                raise CheckpointError(path, f"{name} is in {other.name} too: keep only the files that the index names")
            start, info = _parse(entry, data, size)
            self._places[name] = _Place(number, start, info)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        place = self._places[name]
        info = place.info
        if info.problem:
            raise CheckpointError(self.files[place.file], f"{name}: {info.problem}")
        pages = self._maps[place.file]
        ranges = bounds(index, info.shape)
        row = info.nbytes // max(info.shape[0], 1) if info.shape else info.nbytes
        first, last = (place.start + row * r for r in ranges[0]) if info.shape else (place.start, place.start + row)
        prefetch(pages, first, last)
        whole = np.frombuffer(pages, info.dtype, math.prod(info.shape), place.start).reshape(info.shape)
        out = np.array(whole[tuple(slice(a, b) for a, b in ranges)], order="C")
        del whole  # a view of the map would keep it from closing
        release(pages, first, last)
        return out

    def close(self) -> None:
        for pages in self._maps:
            pages.close()
        self._maps = []


def _parse(entry: Any, data: int, size: int) -> tuple[int, TensorInfo]:
    """Where a tensor starts, and what it is; anything wrong with it becomes its `problem`."""
    nothing = np.dtype(np.float32)
    if not isinstance(entry, dict):
        return 0, TensorInfo((), nothing, 0, "its entry in the header is not an object")
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return 0, TensorInfo((), nothing, 0, f"bad shape {shape!r} or data_offsets {offsets!r} in the header")
    nbytes, start, stop = offsets[1] - offsets[0], data + offsets[0], data + offsets[1]
    if code not in DTYPES:
        problem = f"dtype {code!r} is not supported, only {', '.join(DTYPES)} are"
        return start, TensorInfo(tuple(shape), nothing, nbytes, problem)
    dtype, problem = DTYPES[code], ""
    if math.prod(shape) * dtype.itemsize != nbytes:
        problem = f"{nbytes} bytes in the header cannot be {code} of shape {shape}"
    elif stop > size:
        problem = f"cut off: ends at byte {stop} of a file of {size}"
    return start, TensorInfo(tuple(shape), dtype, nbytes, problem)


def _naturals(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
