"""A scheduled step as the device sees it: one packed int32 array, the only thing that crosses over each step.

    tokens_T      token ids; those of decode rows are ignored, the device has them in `last_token`
    positions_T   absolute positions, -1 for padding
    slots_R       row of `last_token` that the sampled token is written to; the spare slot where none is wanted
    last_R        index into T of the token whose logits the row samples from
    pages_RW      pages of each row

T is decodes + tiles * tile, R the sampled rows (see Bucket; pages_RW has decodes + tiles), and W the pages of the
longest context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.engine.buckets import Bucket
from jaxllm.engine.request import Sequence
from jaxllm.engine.step import Step


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The sizes that fix how a batch is packed; the same on host and device."""

    bucket: Bucket
    tile: int
    width: int

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        T, R = self.bucket.tokens(self.tile), self.bucket.rows
        return (T, T, R, R, (self.bucket.decodes + self.bucket.tiles) * self.width)

    @property
    def length(self) -> int:
        return sum(self.sizes)

    def unpack(self, packed: Any) -> tuple[Any, ...]:
        """tokens_T, positions_T, slots_R, last_R, pages_RW of the packed array: jax arrays, or views on the host."""
        parts = []
        start = 0
        for size in self.sizes:
            parts.append(packed[start : start + size])
            start += size
        parts[-1] = parts[-1].reshape(-1, self.width)
        return tuple(parts)


@dataclass(frozen=True, slots=True)
class PackedStep:
    """A packed step, with where its results will be: `rows[i]` is the sampled row of result row i of the Step."""

    shape: BatchShape
    data: np.ndarray
    rows: np.ndarray


class Packer:
    """Packs steps; keeps each slot's page table up to date so that a step only writes the pages that are new.

    width: pages of the longest context. spare_slot: the slot that takes what nobody wants.
    """

    def __init__(self, *, tile: int, width: int, max_batch_size: int):
        self.tile = tile
        self.width = width
        self.spare_slot = max_batch_size
        self._table = np.zeros((max_batch_size + 1, width), np.int32)
        self._filled = [0] * (max_batch_size + 1)

    def tiles(self, step: Step) -> int:
        """Tiles that the prompt chunks of a step take."""
        return sum(-(-(c.stop - c.start) // self.tile) for c in step.prefills)

    def pack(self, step: Step, bucket: Bucket) -> PackedStep:
        shape = BatchShape(bucket, self.tile, self.width)
        packed = np.zeros(shape.length, np.int32)
        tokens, positions, slots, last, pages = shape.unpack(packed)
        positions[:] = -1
        slots[:] = self.spare_slot
        for seq in step.started:
            self._filled[seq.slot] = 0

        n = len(step.decodes)
        rows = np.arange(step.num_rows)
        if n:
            for seq in step.decodes:
                if len(seq.pages) != self._filled[seq.slot]:
                    self._extend(seq)
            decode_slots = [seq.slot for seq in step.decodes]
            positions[:n] = step.positions
            slots[:n] = decode_slots
            last[:n] = np.arange(n)
            np.take(self._table, decode_slots, axis=0, out=pages[:n])

        row, tile = bucket.decodes, self.tile
        for i, chunk in enumerate(step.prefills):
            self._extend(chunk.seq)
            length = chunk.stop - chunk.start
            tiles = -(-length // tile)
            start = bucket.decodes + (row - bucket.decodes) * tile
            tokens[start : start + length] = chunk.seq.tokens[chunk.start : chunk.stop]
            positions[start : start + length] = np.arange(chunk.start, chunk.stop)
            pages[row : row + tiles] = self._table[chunk.seq.slot]
            row += tiles
            sampled = rows[n + i] = bucket.decodes + i
            last[sampled] = start + length - 1
            if chunk.samples:
                slots[sampled] = chunk.seq.slot
        return PackedStep(shape, packed, rows)

    def _extend(self, seq: Sequence) -> None:
        filled, total = self._filled[seq.slot], len(seq.pages)
        if total != filled:
            self._table[seq.slot, filled:total] = seq.pages[filled:]
            self._filled[seq.slot] = total
