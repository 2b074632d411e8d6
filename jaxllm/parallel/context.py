"""The context of a step as one rank sees it: its tokens, its pages, and which of its keys each query sees.

Keys and values of a sequence may be spread over ranks in stripes: `stripe` consecutive positions to a rank, then the
next rank's, round and round. Each rank keeps its own in order of position, so that what a query may see of them under
a causal mask is a run of them, whose ends are counts: attention over a part of the context is the same paged attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.parallel.layout import Layout
from jaxllm.parallel.merge import Partial, add_sink

KVPages = jax.Array
"""Keys and values of one layer, kv_PYKOH; with Y = 1 latents (MLA). Page 0 is nobody's and absorbs what padding writes.

One array and not two: each array that a program takes and gives back costs the host, and a page is one piece of memory.
"""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions_T", "pages_RW", "prompts_CT", "chunks_RC"],
    meta_fields=["decodes", "tile"],
)
@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where the tokens of a step stand: T = decodes + tiles * tile, R = decodes + tiles.

    positions_T: int32, absolute position of each token, -1 for padding.
    pages_RW: int32, the pages of each decoding request, then of each tile.
    prompts_CT: int32 [ranks, tiles * tile], positions of the prompt tokens of every rank that they are split over.
    chunks_RC: int32 [tiles, columns], see `engine.batch.ChunkColumn`; None where nobody needs it.
    """

    decodes: int
    tile: int
    positions_T: jax.Array
    pages_RW: jax.Array
    prompts_CT: jax.Array | None = None
    chunks_RC: jax.Array | None = None

    @property
    def tokens(self) -> int:
        return self.positions_T.shape[0]

    @property
    def tiles(self) -> int:
        return self.pages_RW.shape[0] - self.decodes

    @property
    def row_T(self) -> jax.Array:
        """The row of each token."""
        D = self.decodes
        return jnp.concatenate([jnp.arange(D), D + jnp.repeat(jnp.arange(self.tiles), self.tile)])

    def chunk_T(self, column: int) -> jax.Array:
        """A column of `chunks_RC` for each prompt token of this rank."""
        assert self.chunks_RC is not None
        return jnp.repeat(self.chunks_RC[:, column], self.tile)


@dataclass(frozen=True, slots=True)
class Stripes:
    """The positions that rank number `rank` of `ranks` keeps: `size` at a time."""

    size: int
    ranks: int
    rank: jax.Array | int

    def owns(self, position: jax.Array) -> jax.Array:
        return (position >= 0) & (position // self.size % self.ranks == self.rank)

    def count(self, position: jax.Array) -> jax.Array:
        """How many of the rank's keys are at `position` or before; none for a negative one."""
        if self.ranks == 1:
            return jnp.maximum(position + 1, 0)
        tokens, cycle = jnp.maximum(position + 1, 0), self.size * self.ranks
        return tokens // cycle * self.size + jnp.clip(tokens % cycle - self.rank * self.size, 0, self.size)

    def index(self, position: jax.Array) -> jax.Array:
        """Which of the rank's keys is at a position that it owns."""
        return position // (self.size * self.ranks) * self.size + position % self.size


@dataclass(frozen=True, slots=True)
class Kernel:
    """Paged attention of one layer. attend: as `kernels.paged_attention`, with the layer's scale and softcap.

    sink_N: float32, one for each head of which this rank has the result of the whole context in the end; or none.
    """

    attend: Callable[..., Partial]
    window: int | None
    layout: Layout
    sink_N: jax.Array | None = None

    def finish(self, part: Partial) -> jax.Array:
        """The result of tokens over the whole context, once all of its parts are merged."""
        return part[0] if self.sink_N is None else add_sink(part, self.sink_N)

    def stripes(self, kv: KVPages, rank: jax.Array | int = 0) -> Stripes:
        """The stripes of the keys and values that rank number `rank` of cp keeps."""
        mapping = self.layout.mapping
        return Stripes(mapping.stripe(kv.shape[3]), mapping.stripes, rank)

    def windowed(self, positions: jax.Array, stripes: Stripes) -> jax.Array | None:
        """The first of a rank's keys that is inside of the window of each query; None without a window."""
        if self.window is None:
            return None
        return positions - self.window + 1 if stripes.ranks == 1 else stripes.count(positions - self.window)

    def visible(self, positions: jax.Array, stripes: Stripes) -> tuple[jax.Array, jax.Array | None]:
        """The last and first of a rank's keys that queries at these positions see (-1: none)."""
        last = positions if stripes.ranks == 1 else stripes.count(positions) - 1
        return last, self.windowed(positions, stripes)

    def rows(
        self, q_TNH: jax.Array, kv: KVPages, pages_RW: jax.Array, last_T: jax.Array, first_T: jax.Array | None
    ) -> Partial:
        """Attention of T query tokens in R rows of equal length, each row over its own pages: out_TNH, lse_TN."""
        R, (T, N, H) = pages_RW.shape[0], q_TNH.shape
        out, lse = self.attend(
            q_TNH.reshape(R, T // R, N, H),
            kv,
            pages_RW,
            last_T.reshape(R, -1),
            first_RQ=None if first_T is None else first_T.reshape(R, -1),
        )
        return out.reshape(T, N, -1), lse.reshape(T, N)

    def step(
        self,
        q_TNH: jax.Array,
        kv: KVPages,
        batch: AttentionBatch,
        last_T: jax.Array,
        first_T: jax.Array | None,
    ) -> Partial:
        """Attention of the tokens of a step, decodes and tiles: out_TNH, lse_TN."""
        D = batch.decodes

        def rows(tokens: slice) -> Partial:
            first = None if first_T is None else first_T[tokens]
            return self.rows(q_TNH[tokens], kv, batch.pages_RW[tokens], last_T[tokens], first)

        if not D or not batch.tiles:
            return rows(slice(None))
        decodes, prompts = rows(slice(0, D)), slice(D, None)
        try:
            last, first = (None if x is None else x[prompts].reshape(batch.tiles, -1) for x in (last_T, first_T))
            whole = self.attend(q_TNH, kv, batch.pages_RW[prompts], last, first_RQ=first)
        except NotImplementedError:
            return join(decodes, rows(prompts))
        return whole[0].at[:D].set(decodes[0]), whole[1].at[:D].set(decodes[1])


def join(a: Partial, b: Partial) -> Partial:
    """The results of some tokens, and then those of others."""
    return jnp.concatenate([a[0], b[0]]), jnp.concatenate([a[1], b[1]])


def places(
    positions_T: jax.Array, pages_RW: jax.Array, row_T: jax.Array, page_size: int, stripes: Stripes
) -> tuple[jax.Array, jax.Array]:
    """The page of each token and its slot there; what is padding, or another rank's, goes to page 0."""
    index_T = jnp.maximum(positions_T, 0)
    own_T = positions_T >= 0
    if stripes.ranks > 1:
        own_T, index_T = stripes.owns(positions_T), stripes.index(index_T)
    return jnp.where(own_T, pages_RW[row_T, index_T // page_size], 0), index_T % page_size


def write_pages(
    kv: KVPages,
    k_TKH: jax.Array,
    v_TKH: jax.Array | None,
    positions_T: jax.Array,
    pages_RW: jax.Array,
    row_T: jax.Array,
    stripes: Stripes,
) -> KVPages:
    """Stores keys and values of tokens in their pages; None: the keys are the values (MLA)."""
    page_T, slot_T = places(positions_T, pages_RW, row_T, kv.shape[3], stripes)
    return kv.at[page_T, :, :, slot_T].set(planes(k_TKH, v_TKH, kv.dtype))


def planes(k_TKH: jax.Array, v_TKH: jax.Array | None, dtype: np.dtype) -> jax.Array:
    """Keys and values of tokens as pages of this dtype have them, [T, Y, K, H].

    To eight bits, what is too large becomes the largest, as `kernels.rope_write` has it.
    """
    kept = k_TKH[:, None] if v_TKH is None else jnp.stack([k_TKH, v_TKH], axis=1)
    if dtype.itemsize == 1:
        limit = float(jnp.finfo(dtype).max)
        kept = jnp.clip(kept, -limit, limit)
    return kept.astype(dtype)
