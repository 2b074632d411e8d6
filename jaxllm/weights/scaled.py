"""Checkpoints whose matrices are small values with scales beside them, seen as if they were plain: see `Storage`.

Each matrix has the name that it would have in a plain checkpoint, `...weight`, and reads as numbers, or as it is
quantised. What belongs to it (scales, zero points) and scales of activations have no names of their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from jaxllm.formats import Format, Storage, Stored
from jaxllm.kernels.linear.blocks import Blocks, Packing
from jaxllm.weights.source import CheckpointError, QuantizedRows, Source, TensorInfo, bounds

VALUES = {Storage.SCALED: "weight", Storage.PACKED: "weight_packed", Storage.AWQ: "qweight", Storage.GPTQ: "qweight"}
_BESIDE = re.compile(
    r"\.(?:weight_scale(?:_inv)?|weight_zero_point|weight_shape|weight_g_idx|scales|qzeros|g_idx|[kvq]_scale|prob_scale"
    r"|input_scale|output_scale|activation_scale)$"
)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which four bits of a word the first of its eight outputs is in, then the second, and so on."""


@dataclass(frozen=True, slots=True)
class _Matrix:
    """values, scale, zero: names in the file. format: the matrix's own, if its scale has another shape than most."""

    values: str
    scale: str
    zero: str | None
    shape: tuple[int, int]
    format: Format


class ScaledSource:
    """See the module.

    Raises:
        CheckpointError: scales are missing, or have other shapes than the matrices need. Lists them all.
    """

    def __init__(self, source: Source, stored: Stored) -> None:
        self.source = source
        self.stored = stored
        self.name = source.name
        self.tensors: dict[str, TensorInfo] = {}
        self._matrices: dict[str, _Matrix] = {}
        problems: list[str] = []
        for name, info in source.tensors.items():
            stem, _, leaf = name.rpartition(".")
            small = info.dtype.itemsize == 1 or info.dtype.kind == "i"
            if leaf == VALUES[stored.layout] and small and not info.problem:
                try:
                    matrix = self._matrix(stem, info)
                except CheckpointError as error:
                    problems += error.problems
                    continue
                self._matrices[f"{stem}.weight"] = matrix
                self.tensors[f"{stem}.weight"] = TensorInfo(matrix.shape, np.dtype(np.float32), info.nbytes)
            elif not _BESIDE.search(name):
                self.tensors[name] = info
        if problems:
            raise CheckpointError(source.name, problems)

    def _matrix(self, stem: str, info: TensorInfo) -> _Matrix:
        files, layout, format = self.source.tensors, self.stored.layout, self.stored.format
        per_word = 32 // (4 if format.kind == "int4" else 8)
        awq, gptq = layout is Storage.AWQ, layout is Storage.GPTQ
        if len(info.shape) != 2:
            raise CheckpointError(stem, f"{stem}: values of shape {list(info.shape)} are not those of a matrix")
        rows, columns = info.shape
        if layout is Storage.PACKED:
            columns *= per_word
        elif gptq:
            rows, columns = columns, rows * per_word
        elif awq:
            rows, columns = columns * per_word, rows
        names = ("scales",) if awq or gptq else ("weight_scale", "weight_scale_inv")
        scale = next((f"{stem}.{leaf}" for leaf in names if f"{stem}.{leaf}" in files), None)
        if scale is None:
            raise CheckpointError(stem, f"{stem}: quantised values, but no {' or '.join(names)}")
        zero = f"{stem}.qzeros" if awq or gptq else None
        if zero is not None and zero not in files:
            raise CheckpointError(stem, f"{stem}: quantised values, but no qzeros")
        if f"{stem}.weight_g_idx" in files:
            raise CheckpointError(stem, f"{stem}: groups of reordered inputs (weight_g_idx) are not supported")
        shape, groups = files[scale].shape, format.groups(columns)
        whole = layout is Storage.SCALED and (int(np.prod(shape)) == 1 or shape in ((rows,), (rows, 1)))
        wanted = (groups, rows) if awq or gptq else (-(-rows // self.stored.rows), groups)
        if whole:
            format = Format(format.kind)
        elif shape != wanted:
            raise CheckpointError(stem, f"{scale}: shape {list(shape)}, but {rows} x {columns} needs {list(wanted)}")
        return _Matrix(f"{stem}.{VALUES[layout]}", scale, zero, (rows, columns), format)

    def quantization(self, name: str) -> Format | None:
        matrix = self._matrices.get(name)
        return None if matrix is None else matrix.format

    def read_quantized(self, name: str, rows: slice, columns: slice) -> QuantizedRows:
        matrix = self._matrices[name]
        (first, last), (begin, end) = bounds((rows, columns), matrix.shape)
        values = self._values(matrix, first, last, begin, end)
        return QuantizedRows(values, *self._scales(name, matrix, first, last))

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        matrix = self._matrices.get(name)
        if matrix is None:
            return self.source.read(name, index)
        (rows, (begin, end)) = bounds(index, matrix.shape)
        found = self.read_quantized(name, slice(*rows), slice(begin, end))
        numbers = found.values.astype(np.float32)
        group = matrix.format.group or matrix.shape[1]
        of_column = np.arange(begin, end) // group
        if found.zero is not None:
            numbers -= found.zero.astype(np.float32)[:, of_column]
        return numbers * found.scale[:, of_column]

    def packing(self, name: str) -> Packing | None:
        return None

    def read_blocks(self, name: str, index: tuple[slice, slice]) -> Blocks:
        raise CheckpointError(name, "is not in blocks")

    def close(self) -> None:
        self.source.close()

    def _values(self, matrix: _Matrix, first: int, last: int, begin: int, end: int) -> np.ndarray:
        """Values [first, last) x [begin, end), one an element: e4m3 or int8."""
        read, layout = self.source.read, self.stored.layout
        if layout is Storage.SCALED:
            return read(matrix.values, (slice(first, last), slice(begin, end)))
        bits = 4 if matrix.format.kind == "int4" else 8
        per_word = 32 // bits
        if layout is Storage.AWQ:
            words = read(matrix.values, (slice(begin, end), _words(first, last, per_word)))
            numbers = _unpack(words, bits, AWQ_ORDER)[:, first % per_word :][:, : last - first].T
        elif layout is Storage.GPTQ:
            words = read(matrix.values, (_words(begin, end, per_word), slice(first, last)))
            numbers = _unpack(words.T, bits)[:, begin % per_word :][:, : end - begin]
        else:
            words = read(matrix.values, (slice(first, last), _words(begin, end, per_word)))
            numbers = _unpack(words, bits)[:, begin % per_word :][:, : end - begin]
        return np.ascontiguousarray(_signed(numbers, bits))

    def _scales(self, name: str, matrix: _Matrix, first: int, last: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Scales of rows, float32 [rows, G], and zero points less half of the range, int8, if the format has them."""
        read, layout, rows = self.source.read, self.stored.layout, matrix.shape[0]
        if layout in (Storage.AWQ, Storage.GPTQ):
            scale = read(matrix.scale, (slice(None), slice(first, last))).T.astype(np.float32)
            assert matrix.zero is not None
            bits = 4 if matrix.format.kind == "int4" else 8
            per_word = 32 // bits
            words = read(matrix.zero, (slice(None), _words(first, last, per_word)))
            order = AWQ_ORDER if layout is Storage.AWQ else None
            zero = _unpack(words, bits, order)[:, first % per_word :][:, : last - first].T.astype(np.int32)
            zero = (zero + self.stored.zero_offset) % (1 << bits) - (1 << bits - 1)
            if matrix.format.zeros:
                return np.ascontiguousarray(scale), np.ascontiguousarray(zero.astype(np.int8))
            if zero.any():
                raise CheckpointError(name, "has zero points, but the config says sym = true")
            return np.ascontiguousarray(scale), None
        shape = self.source.tensors[matrix.scale].shape
        if int(np.prod(shape)) == 1:
            one = read(matrix.scale, tuple(slice(None) for _ in shape)).astype(np.float32).reshape(1, 1)
            return np.broadcast_to(one, (last - first, 1)), None
        if matrix.format.group is None and shape in ((rows,), (rows, 1)):
            return read(matrix.scale, (slice(first, last),)).astype(np.float32).reshape(-1, 1), None
        size = self.stored.rows
        blocks = read(matrix.scale, (slice(first // size, -(-last // size)), slice(None))).astype(np.float32)
        return blocks[np.arange(first, last) // size - first // size], None


def _words(first: int, last: int, per_word: int) -> slice:
    return slice(first // per_word, -(-last // per_word))


def _unpack(words: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Unsigned numbers, uint8 [..., words * 32 / bits], from the low bits of each word up, or in `order`."""
    places = np.arange(32 // bits) if order is None else np.asarray(order)
    wide = np.ascontiguousarray(words).view(np.uint32)[..., None]
    numbers = (wide >> (places * bits).astype(np.uint32)) & np.uint32((1 << bits) - 1)
    return numbers.astype(np.uint8).reshape(*words.shape[:-1], -1)


def _signed(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Less half of their range, int8."""
    return (numbers.astype(np.int16) - (1 << bits - 1)).astype(np.int8)


def scaled(source: Source, stored: Stored | None) -> Source:
    """The source itself, unless its matrices are quantised."""
    return source if stored is None else ScaledSource(source, stored)
