"""How one parameter of the model is declared: its shape, its place on the mesh, and the checkpoint rows that fill it.

A parameter is often not one tensor of the checkpoint. Q, K and V are fused, heads are padded and replicated so that any
tensor-parallel size works, and the vocabulary is rounded up. A `ParamSpec` says all of that as data, so that the loader
needs no knowledge of any model: it reads, for each device, only the segments that this device owns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


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
class ParamSpec:
    """One parameter: `shape` is global and padded, `axes` has the mesh axes (or None) that split each dimension.

    The `segments`, laid end to end along dimension `axis`, cover it exactly. `offset` is added to every value read from
    the checkpoint (Gemma stores its norm weights minus one), never to padding.

    With `stacked`, the first dimension counts matrices (experts), each of which has segments of its own: those of the
    first matrix come first, and as many rows along `axis` as the shape has belong to each.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[tuple[str, ...] | None, ...]
    segments: tuple[Segment, ...]
    axis: int = 0
    offset: float = 0.0
    stacked: bool = False

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape):
            raise ValueError(f"axes {self.axes} do not match the shape {self.shape}")
        if self.stacked and self.axis == 0:
            raise ValueError("the matrices of a stack are not cut along the axis that counts them")
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
            out.append(ParamSpec(self.shape[1:], self.dtype, self.axes[1:], tuple(taken), self.axis - 1, self.offset))
        return out

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def names(self) -> Iterable[str]:
        """The checkpoint tensors that this parameter reads."""
        return dict.fromkeys(s.name for s in self.segments if s.name is not None)
