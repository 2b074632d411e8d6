"""gpt-oss's stacks of experts, seen as if each expert had tensors of its own.

A layer has `mlp.experts.gate_up_proj`, in whose rows gate and up take turns, and `mlp.experts.down_proj`, each with a
`_bias`. In MXFP4 they are `_blocks` [E, rows, columns / 32, 16] with `_scales` [E, rows, columns / 32], and are made
floats expert by expert as they are read; otherwise one tensor [E, columns, rows], the other way round.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxllm.weights.mxfp4 import BLOCK, BLOCK_BYTES, dequantise
from jaxllm.weights.source import Source, TensorInfo, Unquantised, bounds

_STACK = re.compile(r"(.*)\.mlp\.experts\.(gate_up_proj|down_proj)(_bias|_blocks|_scales)?$")
_DIMENSIONS = {"": 3, "_bias": 2, "_blocks": 4}


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows first, first + step, ... of one expert of a stack; a whole tensor without `expert`."""

    stack: str
    kind: str = ""
    expert: int | None = None
    first: int = 0
    step: int = 1


class InterleavedExperts(Unquantised):
    """A source of gpt-oss's stacks as a source of single experts, which it calls gate, up and down."""

    def __init__(self, source: Source, module: str, gate: str, up: str, down: str) -> None:
        self.source = source
        self.name = source.name
        self.tensors: dict[str, TensorInfo] = {}
        self._parts: dict[str, _Part] = {}
        for name, info in source.tensors.items():
            match = _STACK.match(name)
            kind = "" if match is None else match[3] or ""
            if match is None or info.problem:
                self.tensors[name], self._parts[name] = info, _Part(name)
            elif kind == "_scales":
                if f"{name.removesuffix('_scales')}_blocks" not in source.tensors:
                    self.tensors[name], self._parts[name] = info, _Part(name)
            else:
                parts = ((gate, 0, 2), (up, 1, 2)) if match[2] == "gate_up_proj" else ((down, 0, 1),)
                self._add(f"{match[1]}.{module}.experts", name, kind, info, parts)

    def _add(
        self, prefix: str, stack: str, kind: str, info: TensorInfo, parts: tuple[tuple[str, int, int], ...]
    ) -> None:
        problem = _problem(stack, kind, info, self.source.tensors, rows_of=len(parts))
        shape = info.shape if not problem else (0, 0, 0, 0)
        rows = shape[2] if kind == "" else shape[1]
        columns = {"": shape[1], "_bias": 0, "_blocks": shape[-2] * BLOCK}[kind]
        suffix = "bias" if kind == "_bias" else "weight"
        dtype = np.dtype(np.float32) if kind == "_blocks" else info.dtype
        for expert in range(shape[0] if not problem else 1):
            for part, first, step in parts:
                one = (rows // step,) if kind == "_bias" else (rows // step, columns)
                name = f"{prefix}.{expert}.{part}.{suffix}"
                self.tensors[name] = TensorInfo(one, dtype, math.prod(one) * dtype.itemsize, problem)
                self._parts[name] = _Part(stack, kind, expert, first, step)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        part = self._parts[name]
        if part.expert is None:
            return self.source.read(part.stack, index)
        (start, stop), *rest = bounds(index, self.tensors[name].shape)
        expert = slice(part.expert, part.expert + 1)
        rows = slice(start * part.step, stop * part.step)
        own = slice(part.first, None, part.step)
        if part.kind == "_bias":
            return self.source.read(part.stack, (expert, rows))[0, own]
        ((left, right),) = rest
        if part.kind == "":
            return self.source.read(part.stack, (expert, slice(left, right), rows))[0, :, own].T
        groups = slice(left // BLOCK, -(-right // BLOCK))
        blocks = self.source.read(part.stack, (expert, rows, groups))[0, own]
        scales = self.source.read(f"{part.stack.removesuffix('_blocks')}_scales", (expert, rows, groups))[0, own]
        return dequantise(blocks, scales)[:, left - groups.start * BLOCK : right - groups.start * BLOCK]

    def close(self) -> None:
        self.source.close()


def _problem(stack: str, kind: str, info: TensorInfo, tensors: Mapping[str, TensorInfo], rows_of: int) -> str:
    """What is wrong with a stack; nothing: the empty string."""
    shape = list(info.shape)
    if len(shape) != _DIMENSIONS[kind] or (shape[2] if kind == "" else shape[1]) % rows_of:
        return f"{stack} has the shape {shape}, which is none of a stack of experts"
    if kind != "_blocks":
        return ""
    scales = tensors.get(f"{stack.removesuffix('_blocks')}_scales")
    if scales is None:
        return f"{stack} has no scales beside it"
    if info.dtype != np.uint8 or scales.dtype != np.uint8 or shape[3] != BLOCK_BYTES or scales.shape != info.shape[:3]:
        return f"{stack}: {info.dtype} {shape} with scales {scales.dtype} {list(scales.shape)} is not MXFP4"
    return scales.problem
