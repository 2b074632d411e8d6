"""Checkpoint blocks that stay quantised: which parameters can, and how their parts are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jax.sharding import NamedSharding

from jaxllm.kernels.linear.blocks import BLOCK, ROWS, Blocks, Packing, pack
from jaxllm.parallel.params import ParamSpec
from jaxllm.weights.source import Source


def choose_packings(
    specs: Mapping[str, ParamSpec], layouts: Mapping[str, NamedSharding], source: Source
) -> dict[str, Packing]:
    """The matrices that can stay quantised, by path.

    Every tensor that one reads has the same kind of blocks, and no device's part cuts a block or a group of rows.
    """
    chosen = {}
    for path, spec in specs.items():
        names = [name for name in spec.names() if name in source.tensors]
        kinds = {source.packing(name) for name in names}
        kind = kinds.pop() if len(kinds) == 1 else None
        plain = spec.part is None and len(spec.shape) == 2 and spec.dtype == np.float32 and not spec.offset
        if kind is not None and plain:
            rows, columns = layouts[path].shard_shape(spec.shape)
            edges = [edge for s in spec.segments for edge in (s.start, s.stop)] if spec.axis == 1 else []
            if not rows % ROWS and not columns % BLOCK and not any(edge % BLOCK for edge in edges):
                chosen[path] = kind
    return chosen


def unpacked_ranges(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of a part of a packed array."""
    (first, last), (begin, end), _ = ranges
    return (first * ROWS, last * ROWS), (begin * BLOCK, end * BLOCK)


def read_packed(spec: ParamSpec, packing: Packing, ranges: Sequence[tuple[int, int]], source: Source) -> np.ndarray:
    """The part `ranges` (rows, columns) of a parameter, packed."""
    rows, columns = (stop - start for start, stop in ranges)
    start, stop = ranges[spec.axis]
    # Padding has scale 0.
    q = np.zeros((rows, columns), np.uint8)
    scale, low = np.zeros((2, rows, columns // BLOCK), np.float16)
    at = 0
    for segment in spec.segments:
        first, last = max(start, at), min(stop, at + segment.size)
        if first < last and segment.name is not None:
            taken = slice(segment.start + first - at, segment.start + last - at)
            here = slice(first - start, last - start)
            if spec.axis == 0:
                blocks = source.read_blocks(segment.name, (taken, slice(*ranges[1])))
                to, heads = (here, slice(None)), (here, slice(None))
            else:
                blocks = source.read_blocks(segment.name, (slice(*ranges[0]), taken))
                to, heads = (slice(None), here), (slice(None), slice(here.start // BLOCK, here.stop // BLOCK))
            q[to], scale[heads] = blocks.q, blocks.scale
            if blocks.low is not None:
                low[heads] = blocks.low
        at += segment.size
    return pack(packing, Blocks(q, scale, low if packing is Packing.Q4 else None))
