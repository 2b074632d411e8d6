"""How one parameter of the model is declared: its shape, its place on the mesh, and the checkpoint rows that fill it.

A parameter is often not one tensor of the checkpoint. Q, K and V are fused, heads are padded and replicated so that any
tensor-parallel size works, and the vocabulary is rounded up. A `ParamSpec` says all of that as data, so that the loader
needs no knowledge of any model: it reads, for each device, only the segments that this device owns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from jaxllm.formats import SMALLEST_GROUP, Format


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `[start, stop)` of checkpoint tensor `name` along the spec's `axis`; `name=None` means that many zeros."""

    name: str | None
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Part:
    """What one array of a quantised parameter is.

    whole: the parameter as it would be if it were not quantised. format: how it is kept; its group is a part of
    `origin`, that of the checkpoint or of the quantiser, where what a device has does not end between groups.
    """

    name: Literal["values", "scale", "zero"]
    whole: ParamSpec
    format: Format
    origin: Format


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter: `shape` is global and padded, `axes` has the mesh axes (or None) that split each dimension.

    The `segments`, laid end to end along dimension `axis`, cover it exactly. `offset` is added to every value read from
    the checkpoint (Gemma stores its norm weights minus one), never to padding.

    With `stacked`, the first dimension counts matrices (experts), each of which has segments of its own: those of the
    first matrix come first, and as many rows along `axis` as the shape has belong to each.

    With `part`, it is one array of a quantised parameter, whose segments it has; see `quantize`. `rounded`: its
    numbers are those that it would have if it were kept in this format.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[tuple[str, ...] | None, ...]
    segments: tuple[Segment, ...]
    axis: int = 0
    offset: float = 0.0
    stacked: bool = False
    part: Part | None = None
    rounded: Format | None = None

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape):
            raise ValueError(f"axes {self.axes} do not match the shape {self.shape}")
        if self.stacked and self.axis == 0:
            raise ValueError("the matrices of a stack are not cut along the axis that counts them")
        if self.part is not None:
            return
        covered, rows = sum(s.size for s in self.segments), self.matrices * self.shape[self.axis]
        if covered != rows:
            raise ValueError(f"segments cover {covered} rows of {rows} along axis {self.axis}")

    @property
    def matrices(self) -> int:
        """The matrices of a stack; 1 without."""
        return self.shape[0] if self.stacked else 1

    def unstack(self) -> list[ParamSpec]:
        """The matrices of a stack, each as a parameter of its own."""
        rows, out = self.shape[self.axis], []
        segments = iter(self.segments)
        for _ in range(self.matrices):
            taken: list[Segment] = []
            while sum(s.size for s in taken) < rows:
                taken.append(next(segments))
            axes, axis = self.axes[1:], self.axis - 1
            out.append(
                ParamSpec(self.shape[1:], self.dtype, axes, tuple(taken), axis, self.offset, rounded=self.rounded)
            )
        return out

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def names(self) -> Iterable[str]:
        """The checkpoint tensors that this parameter reads."""
        return dict.fromkeys(s.name for s in self.segments if s.name is not None)

    def quantize(self, format: Format, shards: int) -> dict[str, ParamSpec] | ParamSpec:
        """The arrays that keep this matrix, or stack of them, quantised; where that cannot be, it is only `rounded`.

        shards: of its columns.
        """
        *rows, columns = self.shape
        kept = self._kept(format, shards)
        if kept is None or columns % (shards * kept.per_byte):
            return replace(self, rounded=format)
        *row_axes, column_axis = self.axes
        groups = (kept.groups(columns),)
        # One scale for a whole row is on every rank that has a part of the row.
        grouped = (column_axis,) if kept.group is not None else (None,)

        def one(name: Literal["values", "scale", "zero"], last: tuple[int, ...], dtype: object) -> ParamSpec:
            part = Part(name, self, kept, format)
            axes = (*row_axes, *((column_axis,) if name == "values" else grouped))
            return replace(self, shape=(*rows, *last), dtype=np.dtype(dtype), axes=axes, part=part)  # type: ignore[call-overload]

        parts = {"values": one("values", (columns // kept.per_byte,), kept.dtype)}
        parts["scale"] = one("scale", groups, np.float32)
        if kept.zeros:
            parts["zero"] = one("zero", groups, np.int8)
        return parts

    def _kept(self, format: Format, shards: int) -> Format | None:
        """The format with the largest groups that no edge between segments or shards cuts; None if they are small."""
        if format.group is None:
            return format
        edges = [self.shape[-1] // shards] if shards > 1 else []
        if self.axis == len(self.shape) - 1:
            at = 0
            for s in self.segments:
                edges += [] if s.name is None else [at, s.start]
                at = (at + s.size) % self.shape[-1]
        group = math.gcd(format.group, *edges)
        return replace(format, group=group) if group >= min(format.group, SMALLEST_GROUP) else None
