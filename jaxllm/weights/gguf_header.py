"""The header of a GGUF file: metadata and where each tensor lies (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

The gguf package's reader makes several NumPy arrays per token of the vocabulary, which takes seconds for a real model.
This one takes a tenth of a second, and checks every length against the file before it believes it.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.weights.source import CheckpointError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_U64 = struct.Struct("<Q").unpack_from


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor as stored: llama.cpp's name, shape in NumPy order, GGML type number, and its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Metadata as Python values (arrays as lists), and the tensors by llama.cpp's names."""

    path: Path
    size: int
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


class _Cut(Exception):
    """The file ends, or makes no sense, at this byte."""


class _Cursor:
    """Reads values one after another, never past the end."""

    def __init__(self, pages: mmap.mmap) -> None:
        self.pages = pages
        self.size = len(pages)
        self.at = 0

    def scalar(self, code: str) -> Any:
        end = self.at + struct.calcsize(code)
        if end > self.size:
            raise _Cut(f"it ends inside the header (byte {self.size})")
        (value,) = struct.unpack_from(code, self.pages, self.at)
        self.at = end
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        end = self.at + length
        if end > self.size:
            raise _Cut(f"a string at byte {self.at} claims {length} bytes of a file of {self.size}")
        text = self.pages[self.at : end].decode("utf-8", "replace")
        self.at = end
        return text

    def strings(self, count: int) -> list[str]:
        """The same as `string` in a loop, written out: vocabularies have 100,000 of them."""
        pages, size, at, out = self.pages, self.size, self.at, []
        for _ in range(count):
            if at + 8 > size:
                raise _Cut(f"it ends inside the header (byte {size})")
            end = at + 8 + _U64(pages, at)[0]
            if end > size:
                raise _Cut(f"a string at byte {at} claims {end - at - 8} bytes of a file of {size}")
            out.append(str(pages[at + 8 : end], "utf-8", "replace"))
            at = end
        self.at = at
        return out

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise _Cut(f"unknown value type {kind} at byte {self.at}")
        item, count = self.scalar("<I"), self.scalar("<Q")
        smallest = 8 if item == _STRING else struct.calcsize(_SCALARS.get(item, "<Q"))
        if count * smallest > self.size - self.at:
            raise _Cut(f"an array at byte {self.at} claims {count} items in a file of {self.size} bytes")
        if item == _STRING:
            return self.strings(count)
        if item in _SCALARS:
            raw = np.frombuffer(self.pages, np.dtype(_SCALARS[item]), count, self.at).tolist()
            self.at += count * smallest
            return raw
        raise _Cut(f"unsupported array of type {item} at byte {self.at}")


def read_gguf_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Parses the header; the data is not read, and may be cut off (see `GGUFTensor.start`, `nbytes`).

    Raises:
        CheckpointError: not a GGUF file, a version without support, or a damaged header.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            magic = file.read(8)
            if len(magic) < 8 or magic[:4] != b"GGUF":
                raise CheckpointError(path, f"not a GGUF file (it starts with {magic[:4]!r}): check the path")
            (version,) = struct.unpack("<I", magic[4:])
            if version not in (2, 3):
                raise CheckpointError(path, f"GGUF version {version} is not supported, only little-endian 2 and 3 are")
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error
    with pages:
        try:
            return _parse(path, _Cursor(pages))
        except _Cut as error:
            raise CheckpointError(path, f"damaged or cut off GGUF, {error}: download or convert it again") from error


def _parse(path: Path, cursor: _Cursor) -> GGUFHeader:
    from gguf.constants import GGML_QUANT_SIZES

    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    cursor.at = 8
    tensor_count, entry_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("<I"))
    if metadata.get("split.count", 1) > 1:
        raise CheckpointError(
            path, f"one of {metadata['split.count']} parts: merge them with `llama-gguf-split --merge` first"
        )
    found = []
    for _ in range(tensor_count):
        name, dims = cursor.string(), cursor.scalar("<I")
        if dims > 8:
            raise _Cut(f"tensor {name!r} claims {dims} dimensions")
        shape = tuple(reversed([cursor.scalar("<Q") for _ in range(dims)]))
        found.append((name, shape, cursor.scalar("<I"), cursor.scalar("<Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _Cut(f"general.alignment {alignment!r} is not a power of two")
    data = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in found:
        if name in tensors:
            raise _Cut(f"tensor {name!r} is there twice")
        block, width = sizes.get(kind, (1, 0))
        tensors[name] = GGUFTensor(name, shape, kind, data + offset, math.prod(shape) // block * width)
    return GGUFHeader(path, cursor.size, metadata, tensors)
