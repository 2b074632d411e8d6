"""Each kind of context parallelism against exact attention, step by step: chunks, a cached prefix, decodes.

A token's id is its row in tables of random queries, keys and values, so that what attention gives for each token can be
compared with attention in float64 over the same tables, whichever rank computed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxllm.engine.batch import Packer
from jaxllm.engine.buckets import Bucket
from jaxllm.engine.request import Request, Sequence
from jaxllm.engine.step import Chunk, Step
from jaxllm.kernels.paged_attention.api import paged_attention
from jaxllm.layers.attention import METHODS
from jaxllm.mapping import CpType, Mapping, StarConfig
from jaxllm.parallel.context import AttentionBatch, Kernel, Stripes
from jaxllm.parallel.layout import Layout
from jaxllm.parallel.mesh import make_mesh
from jaxllm.sampling_params import SamplingParams

pytestmark = pytest.mark.quick

PAGE, TILE, WIDTH, SLOTS, POOL = 4, 8, 24, 4, 200
TILES = 10
G, H = 3, 8
STAR = StarConfig(block_size=16, anchor_size=6)
KINDS = [kind.name for kind in CpType]


class Context:
    """Sequences under one layout: computes steps and keeps what attention gave for each token."""

    def __init__(self, kind: str, cp: int, window: int | None, kv_heads: int, lengths: Iterable[int]) -> None:
        star = STAR if kind == "STAR" else None
        self.mapping = Mapping(cp=cp, cp_type=CpType[kind], star=star)
        self.layout = Layout(self.mapping, np.dtype(np.float32))
        self.mesh = make_mesh(self.mapping)
        self.window = window
        rng = np.random.default_rng(cp)
        lengths = list(lengths)
        self.N, self.K, total = kv_heads * G, kv_heads, sum(lengths) + 1
        self.q = rng.standard_normal((total, self.N, H), np.float32)
        self.k, self.v = rng.standard_normal((2, total, self.K, H), np.float32)
        # gpt-oss has both sinks and windows
        self.sinks = None if window is None else rng.standard_normal(self.N).astype(np.float32) + 1
        self.packer = Packer(tile=TILE, width=WIDTH, max_batch_size=SLOTS, layout=self.layout, page_size=PAGE)
        span = self.mapping.page_span(PAGE)
        each = self.mapping.stripe(PAGE) // PAGE
        shape = (POOL * each * self.layout.size("pages"), 2, self.K, PAGE, H)
        self.kv = jax.device_put(jnp.zeros(shape), self.layout.sharding(self.mesh, "pages", None, "kv_heads"))
        self.programs: dict[Bucket, Callable[..., tuple]] = {}
        self.sequences: list[Sequence] = []
        first, free = 1, rng.permutation(np.arange(1, POOL)).tolist()
        for slot, length in enumerate(lengths):
            request = Request(slot, list(range(first, first + length)), SamplingParams())
            seq = request.sequences[0]
            seq.slot, seq.pages = slot, [free.pop() for _ in range(-(-length // span))]
            self.sequences.append(seq)
            first += length
        self.out = np.full((total, self.N, H), np.nan, np.float32)

    def run(self, decodes: list[tuple[int, int]], chunks: list[tuple[int, int, int]]) -> None:
        """One step: decodes as (sequence, position), prompt chunks as (sequence, start, stop)."""
        step = Step([self.sequences[i] for i, _ in decodes], [position for _, position in decodes])
        step.prefills = [Chunk(self.sequences[i], start, stop, True) for i, start, stop in chunks]
        bucket = Bucket(SLOTS + 1 if decodes else 0, TILES, SLOTS)
        assert self.packer.tiles(step) < TILES  # there is padding
        packed = self.packer.pack(step, bucket)
        parts = packed.shape.unpack(packed.data[0])
        for row, (i, position) in enumerate(decodes):
            parts.tokens_T[:, row] = self.sequences[i].tokens[position]
        if bucket not in self.programs:
            self.programs[bucket] = self._attention(packed.shape)
        sinks = np.zeros(self.N) if self.sinks is None else self.sinks
        sinks = np.pad(sinks, (0, -self.N % self.mapping.cp))  # as the heads of HELIX
        out, self.kv = self.programs[bucket](self.kv, packed.data[0], self.q, self.k, self.v, sinks)
        out = np.asarray(out)
        if self.mapping.cp_type is CpType.HELIX:
            out = out[:, : self.N]  # heads of all ranks, then padding
        tokens, real = parts.tokens_T.reshape(-1), parts.positions_T.reshape(-1) >= 0
        self.out[tokens[real]] = np.nan
        for at in np.flatnonzero(real):
            known = self.out[tokens[at]]
            assert np.isnan(known).all() or np.array_equal(known, out[at]), "ranks agree on decodes"
            self.out[tokens[at]] = out[at]

    def _attention(self, shape):
        attend = partial(paged_attention, scale=H**-0.5, softcap=None)

        def step(kv, packed, q, k, v, sinks):
            kernel = Kernel(attend, self.window, self.layout, None if self.sinks is None else sinks)
            whole = shape.unpack(packed)
            batch = whole if len(packed) == 1 else shape.unpack(packed[jax.lax.axis_index("cp")][None])
            batch = type(batch)(*(part[0] for part in batch))
            decodes = shape.bucket.decodes
            attention = AttentionBatch(
                decodes,
                TILE,
                batch.positions_T,
                batch.pages_RW,
                whole.positions_T[:, decodes:],
                batch.chunks_RC if shape.chunk_columns else None,
            )
            rows = (table[batch.tokens_T] for table in (q, k, v))
            return METHODS[self.mapping.cp_type](*rows, kv, attention, kernel)

        pages = self.layout.partition("pages", None, "kv_heads")
        cp = self.layout.partition("tokens") if self.mapping.prompt_parts > 1 else PartitionSpec(None, "cp")
        none = PartitionSpec()
        return jax.jit(
            jax.shard_map(
                step,
                mesh=self.mesh,
                in_specs=(pages, none, none, none, none, self.layout.partition("sinks")),
                out_specs=(cp, pages),
                check_vma=False,
            )
        )

    def check(self, i: int, positions: Iterable[int]) -> None:
        seq = self.sequences[i]
        for position in positions:
            seen = [seq.tokens[p] for p in visible(seq, position, self.window, self.mapping.star)]
            for head in range(self.N):
                keys, values = self.k[seen, head // G].astype(np.float64), self.v[seen, head // G]
                scores = keys @ self.q[seq.tokens[position], head] * H**-0.5
                weights = np.exp(scores - scores.max())
                sink = 0.0 if self.sinks is None else np.exp(self.sinks[head] - scores.max())
                wanted = weights @ values / (weights.sum() + sink)
                found = self.out[seq.tokens[position], head]
                np.testing.assert_allclose(found, wanted, atol=1e-5, err_msg=f"position {position} head {head}")


def visible(seq: Sequence, position: int, window: int | None, star: StarConfig | None) -> list[int]:
    """The positions that a token attends to, written down as plainly as possible."""
    seen = []
    for p in range(position + 1):
        same_block = star is None or p // star.block_size == position // star.block_size
        in_anchor = star is not None and p < star.anchor_size
        in_query = star is not None and position >= (seq.num_prompt - 1) // star.block_size * star.block_size
        if (same_block or in_anchor or in_query) and (window is None or p > position - window):
            seen.append(p)
    return seen


CASES = [(kind, *case) for kind in KINDS for case in ((2, None), (2, 11), (3, 11), (8, None))]


@pytest.mark.parametrize("kind,cp,window", [("STAR", 1, None), ("STAR", 1, 11), *CASES])
def test_steps(kind: str, cp: int, window: int | None) -> None:
    if len(jax.devices()) < cp:
        pytest.skip(f"needs {cp} devices")
    heads = cp if kind == "ULYSSES" else 2  # what does not divide is padded by the layers above
    context = Context(kind, cp, window, heads, [70, 33, 9, 3])
    context.run([], [(0, 0, 21), (1, 0, 5)])
    context.run([], [(0, 21, 46), (1, 5, 33), (2, 0, 2)])  # chunks that start anywhere, with what came before
    context.run([(1, 32)], [(0, 46, 47), (2, 2, 9), (3, 0, 3)])  # the last of 33 again, now as a decode
    context.run([], [(0, 47, 70)])
    for i, length in enumerate((70, 33, 9, 3)):
        context.check(i, range(length))
    context.out[:] = np.nan
    ends = [(i, seq.num_prompt - 1) for i, seq in enumerate(context.sequences)]
    context.run(ends, [])
    for i, position in ends:
        context.check(i, [position])


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_stripes_partition_the_positions(size: int, ranks: int) -> None:
    positions = np.arange(-2, 300)
    stripes = [Stripes(size, ranks, rank) for rank in range(ranks)]
    owned = np.stack([np.asarray(s.owns(jnp.asarray(positions))) for s in stripes])
    assert (owned.sum(0) == (positions >= 0)).all(), "each on one rank"
    for s, own in zip(stripes, owned, strict=True):
        counts = np.asarray(s.count(jnp.asarray(positions)))
        np.testing.assert_array_equal(counts, np.cumsum(own))
        index = np.asarray(s.index(jnp.asarray(positions)))[own]
        np.testing.assert_array_equal(index, np.arange(own.sum()), err_msg="in order, without holes")
        # shards are balanced to within a stripe, however long the sequence is
        assert (np.abs(counts * ranks - np.maximum(positions + 1, 0)) <= size * ranks).all()


@pytest.mark.parametrize("start,stop", [(0, 4096), (0, 1000), (777, 3333), (4090, 4100)])
@pytest.mark.parametrize("cp", [2, 4, 8])
def test_the_causal_work_of_a_ring_is_balanced(cp: int, start: int, stop: int) -> None:
    """Scores of a chunk that each rank computes, from the positions alone: the same to within one stripe of queries."""
    layout = Layout(Mapping(cp=cp, cp_type=CpType.RING), np.dtype(np.float32))
    own = layout.split_prompt(start, stop, TILE, PAGE)
    assert sorted(np.concatenate(own)) == list(range(start, stop))
    work = [int((positions + 1).sum()) for positions in own]
    assert max(work) - min(work) <= PAGE * stop
    if stop - start == 4096:
        assert max(work) / (sum(work) / cp) < 1.01
        halves = [int((half + 1).sum()) for half in np.split(np.arange(start, stop), cp)]
        assert max(halves) / (sum(halves) / cp) > 1.4, "contiguous parts would not be"


@pytest.mark.parametrize("tile", [4, 8, 12])
@pytest.mark.parametrize("cp", [2, 3, 8])
def test_a_chunk_takes_no_more_tiles_than_scheduled(cp: int, tile: int) -> None:
    """The scheduler counts a tile for every cp * tile tokens; no rank may need more, wherever the chunk starts."""
    for kind in (CpType.RING, CpType.ULYSSES):
        layout = Layout(Mapping(cp=cp, cp_type=kind), np.dtype(np.float32))
        for start in range(0, 3 * cp * PAGE):
            for count in range(1, 3 * cp * tile):
                longest = max(map(len, layout.split_prompt(start, start + count, tile, PAGE)))
                assert -(-longest // tile) <= -(-count // (cp * tile))
