"""A scheduled step as the device sees it: one packed int32 array, the only thing that crosses over each step.

    tokens_T      token ids; not of decodes, whose tokens the device has in `last_token`: there it is how many steps
                  the decode takes part in, where a step is repeated
    positions_T   absolute positions, -1 for padding
    slots_R       row of `last_token` that the sampled token is written to; the spare slot where none is wanted
    last_R        index into T of the token whose logits the row samples from; -1: another part has it
    pages_RW      pages of each row
    chunks_RC     of each tile: see `ChunkColumn`; only where context parallelism needs it

T is decodes + tiles * tile, R the sampled rows (see Bucket; pages_RW has decodes + tiles), and W the pages of the
longest context. The array is [lanes, parts, length]: a lane is a rank with requests of its own (attention data
parallelism), a part a rank with prompt tokens of its own (context parallelism); every part has all decodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from jaxllm.engine.buckets import Bucket
from jaxllm.engine.request import Sequence
from jaxllm.engine.step import Chunk, LaneSteps, Step
from jaxllm.parallel.layout import Layout


class ChunkColumn(IntEnum):
    """Columns of chunks_RC: what a tile knows of the prompt chunk that it belongs to."""

    START = 0
    """The chunk's first position; what comes before is in the pages already."""
    TILE = 1
    """The chunk's first tile."""
    QUERY = 2
    """First position of the prompt's query, which sees everything (star attention)."""


class Parts(NamedTuple):
    """The parts of a packed batch; see the module."""

    tokens_T: Any
    positions_T: Any
    slots_R: Any
    last_R: Any
    pages_RW: Any
    chunks_RC: Any


@dataclass(frozen=True)
class BatchShape:
    """The sizes that fix how a batch is packed; the same on host and device."""

    bucket: Bucket
    tile: int
    width: int
    lanes: int = 1
    parts: int = 1
    chunk_columns: int = 0

    @cached_property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        T, R = self.bucket.tokens(self.tile), self.bucket.rows
        rows = self.bucket.decodes + self.bucket.tiles
        return (T, T, R, R, rows * self.width, self.bucket.tiles * self.chunk_columns)

    @cached_property
    def length(self) -> int:
        return sum(self.sizes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the packed array."""
        return (self.lanes, self.parts, self.length)

    def unpack(self, packed: Any) -> Parts:
        """The parts of a packed array [..., length]: jax arrays, or views on the host."""
        found = []
        start = 0
        for size in self.sizes:
            found.append(packed[..., start : start + size])
            start += size
        lead = packed.shape[:-1]
        tokens, positions, slots, last, pages, chunks = found
        return Parts(
            tokens,
            positions,
            slots,
            last,
            pages.reshape(*lead, -1, self.width),
            chunks.reshape(*lead, self.bucket.tiles, self.chunk_columns),
        )


@dataclass(frozen=True, slots=True)
class PackedStep:
    """A packed step, with where its results will be.

    rows: the sampled row of each result row of the step, counted through the lanes. starts: where the tokens of each
    chunk start in the hidden states of all lanes and parts.
    """

    shape: BatchShape
    data: np.ndarray
    rows: np.ndarray
    starts: list[int]

    def sampled(self) -> tuple[np.ndarray, np.ndarray]:
        """Slot and position of the input token of each sampled row, lane by lane."""
        parts = self.shape.unpack(self.data)
        at = np.take_along_axis(parts.positions_T, np.maximum(parts.last_R, 0), axis=-1)
        positions = np.where(parts.last_R >= 0, at, -1).max(axis=1)
        return parts.slots_R[:, 0].reshape(-1), positions.reshape(-1)


class Packer:
    """Packs steps; keeps each slot's page table up to date so that a step only writes the pages that are new.

    width: the scheduler's pages of the longest context. page_size: tokens of a page on the device. The spare slot,
    `max_batch_size`, takes what nobody wants.
    """

    def __init__(self, *, tile: int, width: int, max_batch_size: int, layout: Layout, page_size: int):
        # A page of the scheduler is this many on the device.
        self._group = layout.mapping.stripe(page_size) // page_size
        self.tile = tile
        self.width = width * self._group
        self.layout = layout
        self.spare_slot = max_batch_size
        self._page_size = page_size
        self._parts = layout.mapping.prompt_parts
        self._chunk_columns = len(ChunkColumn) if layout.needs_chunks else 0
        self._table = np.zeros((max_batch_size + 1, self.width), np.int32)
        self._filled = [0] * (max_batch_size + 1)
        self._shapes: dict[Bucket, BatchShape] = {}
        self._spare: np.ndarray | None = None
        self._last: tuple[list[Sequence], PackedStep] | None = None  # the step before, if it was nothing but decodes

    def shape(self, bucket: Bucket) -> BatchShape:
        """How steps of this bucket are packed."""
        shape = self._shapes.get(bucket)
        if shape is None:
            lanes = self.layout.size("requests")
            shape = BatchShape(bucket, self.tile, self.width, lanes, self._parts, self._chunk_columns)
            self._shapes[bucket] = shape
        return shape

    def needs(self, step: Step | LaneSteps) -> tuple[int, int]:
        """Decodes and tiles that the fullest rank has in a step."""
        lanes = step.lanes
        return max(len(lane.decodes) for lane in lanes), max(map(self.tiles, lanes))

    def tiles(self, step: Step) -> int:
        """Tiles that the prompt chunks of one lane take, on the rank that needs most."""
        return sum(-(-max(map(len, self._split(c))) // self.tile) for c in step.prefills)

    def _split(self, chunk: Chunk) -> list[np.ndarray]:
        """The positions of a chunk that each part computes."""
        if self._parts == 1:
            return [np.arange(chunk.start, chunk.stop)]
        return self.layout.split_prompt(chunk.start, chunk.stop, self.tile, self._page_size)

    def pack(self, step: Step | LaneSteps, bucket: Bucket) -> PackedStep:
        shape = self.shape(bucket)
        last, self._last = self._last, None
        decodes_alone = shape.lanes == shape.parts == 1 and not step.prefills
        if decodes_alone and last is not None and last[1].shape is shape and last[0] == step.decodes:
            packed = self._pack_again(step.lanes[0], last[1])
        else:
            packed = self._pack_lanes(step.lanes, shape)
        if decodes_alone:
            self._last = (step.decodes, packed)
        return packed

    def _pack_lanes(self, lanes: list[Step], shape: BatchShape) -> PackedStep:
        data = np.zeros(shape.shape, np.int32)
        rows, starts = [], []
        for index, lane in enumerate(lanes):
            lane_rows, lane_starts = self._pack_lane(lane, shape, data[index])
            rows.append(lane_rows + index * shape.bucket.rows)
            first = index * shape.parts * shape.bucket.tokens(self.tile)
            starts += [first + start for start in lane_starts]
        return PackedStep(shape, data, np.concatenate(rows), starts)

    def _pack_lane(self, step: Step, shape: BatchShape, packed: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Fills `packed`, [parts, length], and returns `rows` and `starts` of PackedStep."""
        bucket, parts = shape.bucket, [shape.unpack(part) for part in packed]
        first = parts[0]
        first.positions_T[:] = -1
        first.slots_R[:] = self.spare_slot
        for seq in step.started:
            self._filled[seq.slot] = 0

        n = len(step.decodes)
        rows = np.arange(step.num_rows)
        if n:
            for seq in step.decodes:
                if len(seq.pages) != self._filled[seq.slot]:
                    self._extend(seq)
            decode_slots = [seq.slot for seq in step.decodes]
            first.positions_T[:n] = step.positions
            if step.repeats > 1:
                first.tokens_T[:n] = step.counts
            first.slots_R[:n] = decode_slots
            first.last_R[:n] = np.arange(n)
            np.take(self._table, decode_slots, axis=0, out=first.pages_RW[:n])

        row, tile, starts = bucket.decodes, self.tile, []
        for i, chunk in enumerate(step.prefills):
            self._extend(chunk.seq)
            split = self._split(chunk)
            tiles = -(-max(map(len, split)) // tile)
            start = bucket.decodes + (row - bucket.decodes) * tile
            first.pages_RW[row : row + tiles] = self._table[chunk.seq.slot]
            if self._chunk_columns:
                star = self.layout.mapping.star
                query = 0 if star is None else star.query_start(chunk.seq.num_prompt)
                chunk_tile = row - bucket.decodes
                first.chunks_RC[chunk_tile : chunk_tile + tiles] = (chunk.start, chunk_tile, query)
            row += tiles
            sampled = rows[n + i] = bucket.decodes + i
            if chunk.samples:
                first.slots_R[sampled] = chunk.seq.slot
            starts.append(start)
            if len(parts) == 1:
                length = chunk.stop - chunk.start
                first.tokens_T[start : start + length] = chunk.seq.tokens[chunk.start : chunk.stop]
                first.positions_T[start : start + length] = split[0]
                first.last_R[sampled] = start + length - 1
        if len(parts) > 1:
            packed[1:] = packed[0]
            for part in parts[1:]:
                part.last_R[:] = -1
            self._split_chunks(step, parts, rows, starts)
        return rows, starts

    def _pack_again(self, step: Step, last: PackedStep) -> PackedStep:
        """Packs the decodes of the step before, now one position further."""
        packed, self._spare = self._spare, None
        if packed is None or packed.shape != last.data.shape:
            packed = last.data.copy()
        elif packed is not last.data:
            np.copyto(packed, last.data)
        at = last.shape.sizes[0]
        packed[0, 0, at : at + len(step.positions)] = step.positions
        if step.repeats > 1:
            packed[0, 0, : len(step.counts)] = step.counts
        if step.grown:
            pages_RW = last.shape.unpack(packed[0, 0]).pages_RW
            for row in step.grown:
                self._extend(step.decodes[row])
                pages_RW[row] = self._table[step.decodes[row].slot]
        return PackedStep(last.shape, packed, last.rows, last.starts)

    def recycle(self, packed: PackedStep) -> None:
        """Takes back the memory of a step that the devices are done with."""
        self._spare = packed.data

    def _split_chunks(self, step: Step, parts: list[Parts], rows: np.ndarray, starts: list[int]) -> None:
        """Gives each part its tokens of the prompt chunks."""
        for i, chunk in enumerate(step.prefills):
            tokens, start = np.asarray(chunk.seq.tokens[chunk.start : chunk.stop], np.int32), starts[i]
            sampled = rows[len(step.decodes) + i]
            for part, own in zip(parts, self._split(chunk), strict=True):
                part.tokens_T[start : start + len(own)] = tokens[own - chunk.start]
                part.positions_T[start : start + len(own)] = own
                found = len(own) > 0 and own[-1] == chunk.stop - 1
                part.last_R[sampled] = start + len(own) - 1 if found else -1

    def token_index(self, packed: PackedStep, chunk: Chunk, start: int) -> np.ndarray:
        """Where the tokens of a chunk that starts at `start` are in the hidden states, in order of position."""
        index = np.empty(chunk.stop - chunk.start, np.int32)
        for part, own in enumerate(self._split(chunk)):
            first = part * packed.shape.bucket.tokens(self.tile) + start
            index[own - chunk.start] = np.arange(first, first + len(own))
        return index

    def _extend(self, seq: Sequence) -> None:
        filled, total = self._filled[seq.slot], len(seq.pages)
        if total != filled:
            new = seq.pages[filled:]
            if self._group == 1:
                self._table[seq.slot, filled:total] = new
            else:
                pages = np.asarray(new)[:, None] * self._group + np.arange(self._group)
                self._table[seq.slot, filled * self._group : total * self._group] = pages.reshape(-1)
            self._filled[seq.slot] = total
