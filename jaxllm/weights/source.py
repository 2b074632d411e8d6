"""What every kind of checkpoint looks like to the loader: named tensors that can be read slice by slice."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxllm.formats import Format
from jaxllm.kernels.linear.blocks import Blocks, Packing


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the file or tensor, the rule, and what to do.

    `problems` holds one line for each defect found.
    """

    def __init__(self, where: object, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            text = f"{where}: {self.problems[0]}"
        else:
            text = f"{where}: {len(self.problems)} problems:" + "".join(f"\n  {p}" for p in self.problems)
        super().__init__(text)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype of a tensor as `Source.read` returns it, and the bytes that it takes in the checkpoint.

    `problem` says why the tensor cannot be read (cut off, a dtype without support); empty when it can.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Rows of a quantised matrix: values [rows, columns] in e4m3 or int8, one an element; scale float32 and zero int8
    [rows, G], those of all groups of the row, whatever the columns."""

    values: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None = None


class Source(Protocol):
    """A checkpoint. Tensor names are Hugging Face's, matrices are [out, in]. Reading is thread-safe."""

    @property
    def name(self) -> str:
        """Where the checkpoint lies, for messages."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the checkpoint, known without reading any data."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A fresh array with `tensor[index]`, reading no more than that needs; slices have step 1.

        Raises:
            CheckpointError: the tensor cannot be read.
        """

    def packing(self, name: str) -> Packing | None:
        """How `read_blocks` returns this tensor; None where it only reads as values."""

    def read_blocks(self, name: str, index: tuple[slice, slice]) -> Blocks:
        """`tensor[index]` as it is quantised; columns start and end between blocks. Only if `packing` is not None."""

    def quantization(self, name: str) -> Format | None:
        """How `read_quantized` returns this tensor; None where it only reads as numbers."""

    def read_quantized(self, name: str, rows: slice, columns: slice) -> QuantizedRows:
        """`tensor[rows, columns]` as it is quantised. Only if `quantization` is not None."""

    def close(self) -> None:
        """Releases files and mappings; the source cannot be used afterwards."""


class NoScales:
    """What a source has that knows nothing of matrices with scales beside them."""

    def quantization(self, name: str) -> Format | None:
        return None

    def read_quantized(self, name: str, rows: slice, columns: slice) -> QuantizedRows:
        raise CheckpointError(name, "is not quantised")


class Unquantised(NoScales):
    """What a source whose tensors are all plain arrays has in place of blocks."""

    def packing(self, name: str) -> Packing | None:
        return None

    def read_blocks(self, name: str, index: tuple[slice, slice]) -> Blocks:
        raise CheckpointError(name, "is not quantised")


def bounds(index: Sequence[slice], shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """`(start, stop)` of each dimension; dimensions that `index` leaves out are taken whole."""
    full = [*index, *[slice(None)] * (len(shape) - len(index))]
    return tuple(s.indices(n)[:2] for s, n in zip(full, shape, strict=True))


def release(pages: mmap.mmap, start: int, stop: int) -> None:
    """Drops the mapped pages of `[start, stop)` from this process, so that what was read stops counting as its memory.

    The page cache keeps them, and touching them again maps them again.
    """
    if hasattr(pages, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
        start -= start % mmap.PAGESIZE
        pages.madvise(mmap.MADV_DONTNEED, start, min(stop, len(pages)) - start)


def prefetch(pages: mmap.mmap, start: int, stop: int) -> None:
    """Asks for `[start, stop)` in large reads instead of page by page; returns at once."""
    if hasattr(pages, "madvise") and hasattr(mmap, "MADV_WILLNEED") and stop > start:
        start -= start % mmap.PAGESIZE
        pages.madvise(mmap.MADV_WILLNEED, start, min(stop, len(pages)) - start)


def check_truncated(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Raises CheckpointError listing the tensors that cannot be read, if there are any."""
    broken = unreadable(tensors, tensors)
    if broken:
        raise CheckpointError(path, broken)


def unreadable(tensors: Mapping[str, TensorInfo], names: Iterable[str]) -> list[str]:
    """One line for each of these tensors that cannot be read."""
    return [f"{name}: {tensors[name].problem}" for name in names if name in tensors and tensors[name].problem]
