"""Checkpoints with all experts of a layer in one tensor, seen as if each expert had tensors of its own.

transformers 5 keeps experts as `mlp.experts.gate_up_proj` [E, 2 * F, D] and `mlp.experts.down_proj` [E, D, F], and
writes them so with `save_original_format=False`; published checkpoints have a matrix for each.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from jaxllm.weights.interleaved import InterleavedExperts
from jaxllm.weights.source import Source, TensorInfo, Unquantised, bounds

_STACK = re.compile(r"(.*)\.mlp\.experts\.(gate_up_proj|down_proj)$")
_ROUTER = re.compile(r"(.*)\.mlp\.gate\.weight$")


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows [start, stop) of a matrix of a stack; a whole tensor without `expert`."""

    stack: str
    expert: int | None = None
    start: int = 0
    stop: int = 0


class SplitExperts(Unquantised):
    """A source of stacked experts as a source of single ones.

    module, gate, up, down: what the model calls the layer's part and the matrices of an expert.
    """

    def __init__(self, source: Source, module: str, gate: str, up: str, down: str) -> None:
        self.source = source
        self.name = source.name
        self.tensors: dict[str, TensorInfo] = {}
        self._parts: dict[str, _Part] = {}
        for name, info in source.tensors.items():
            router = _ROUTER.match(name)
            stack = _STACK.match(name) if len(info.shape) == 3 and not info.problem else None
            if stack is None:
                self._add(f"{router[1]}.{module}.gate.weight" if router else name, info, _Part(name))
                continue
            E, rows, columns = info.shape
            names = ((gate, 0, rows // 2), (up, rows // 2, rows)) if stack[2] == "gate_up_proj" else ((down, 0, rows),)
            for expert in range(E):
                for part, start, stop in names:
                    shape = (stop - start, columns)
                    one = TensorInfo(shape, info.dtype, math.prod(shape) * info.dtype.itemsize)
                    self._add(
                        f"{stack[1]}.{module}.experts.{expert}.{part}.weight", one, _Part(name, expert, start, stop)
                    )

    def _add(self, name: str, info: TensorInfo, part: _Part) -> None:
        self.tensors[name], self._parts[name] = info, part

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        part = self._parts[name]
        if part.expert is None:
            return self.source.read(part.stack, index)
        (first, last), columns = bounds(index, self.tensors[name].shape)
        rows = slice(part.start + first, part.start + last)
        return self.source.read(part.stack, (slice(part.expert, part.expert + 1), rows, slice(*columns)))[0]

    def close(self) -> None:
        self.source.close()


def split_experts(source: Source, module: str, gate: str, up: str, down: str, *, interleaved: bool = False) -> Source:
    """The source itself, unless it has stacks of experts; see `SplitExperts` and, if interleaved, that class."""
    if interleaved:
        return InterleavedExperts(source, module, gate, up, down)
    stacked = any(_STACK.match(name) for name in source.tensors)
    return SplitExperts(source, module, gate, up, down) if stacked else source
