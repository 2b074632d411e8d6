"""STAR: blocks of the context that see themselves and an anchor; only the query and what is generated see everything.

Star Attention (arXiv 2411.17116), approximate by design. A prompt is cut into blocks of `block_size` tokens. A token of
a context block sees the first `anchor_size` tokens of the prompt and its own block up to itself; the last block (the
query) and all generated tokens see everything before them. On one rank that is a mask, and the definition that the
ranks of cp must agree with; what it saves there is work, not communication.

On cp ranks block b is kept and computed on rank b % cp, and phase 1, the context, needs nothing from other ranks but
the anchor, which rank 0 sends to all. Phase 2, the query, goes to all ranks and the results are merged by lse, as the
queries of RING go to its context. A step computes on all ranks when it covers a block of each: `max_num_tokens` should
be at least cp * block_size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.mapping import StarConfig
from jaxllm.parallel import ring
from jaxllm.parallel.collectives import all_reduce, ranks
from jaxllm.parallel.context import AttentionBatch, Kernel, KVPages, Stripes, write_pages
from jaxllm.parallel.merge import Partial, merge_two, unseen

CP = ("cp",)
TILE, QUERY = 1, 2
"""Columns of `AttentionBatch.chunks_RC`: first tile of a tile's chunk, first position of the prompt's query."""


def attention(
    q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array | None, kv: KVPages, batch: AttentionBatch, kernel: Kernel
) -> tuple[jax.Array, KVPages]:
    """The result of this rank's tokens, out_TNH, and the written pages."""
    D = batch.decodes
    alone = ranks(CP) == 1
    stripes = kernel.stripes(kv, 0 if alone else lax.axis_index("cp"))
    with jax.named_scope("kv_write"):
        kv = write_pages(kv, k_TKH, v_TKH, batch.positions_T, batch.pages_RW, batch.row_T, stripes)
    parts = []
    if D and alone:
        visible = kernel.visible(batch.positions_T[:D], stripes)
        parts.append(kernel.finish(kernel.rows(q_TNH[:D], kv, batch.pages_RW[:D], *visible)))
    elif D:
        parts.append(ring.decode(q_TNH[:D], kv, batch, kernel))
    if batch.tiles:
        parts.append(prompt(q_TNH[D:], kv, batch, kernel, stripes))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts), kv


def prompt(q_TNH: jax.Array, kv: KVPages, batch: AttentionBatch, kernel: Kernel, stripes: Stripes) -> jax.Array:
    """Prompt tokens of this rank: their own blocks, the anchor, and everything for those of the query."""
    star = kernel.layout.mapping.star
    assert star is not None
    position_T, query_T = batch.positions_T[batch.decodes :], batch.chunk_T(QUERY)
    pages_RW = batch.pages_RW[batch.decodes :]
    in_query = position_T >= query_T
    block_T = position_T // star.block_size * star.block_size

    with jax.named_scope("star_block"):
        # On one rank the query's own context is at hand, too.
        alone = stripes.ranks == 1
        here = position_T >= 0 if alone else (position_T >= 0) & ~in_query
        last_T = jnp.where(here, stripes.count(position_T) - 1, -1)
        first_T = jnp.where(in_query, 0, stripes.count(block_T - 1))
        window_T = kernel.windowed(position_T, stripes)
        first_T = first_T if window_T is None else jnp.maximum(first_T, window_T)
        found = kernel.rows(q_TNH, kv, pages_RW, last_T, first_T)

    sees_anchor = (position_T >= star.block_size) & ~in_query
    found = merge_two(found, anchor(q_TNH, kv, batch, kernel, star, sees_anchor))
    if alone:
        return kernel.finish(found)

    assert batch.prompts_CT is not None
    in_query_CT = (batch.prompts_CT >= 0) & (batch.prompts_CT >= query_T)
    last_CT = jnp.where(in_query_CT, stripes.count(batch.prompts_CT) - 1, -1)
    with jax.named_scope("star_query"):
        query = lax.cond(
            in_query_CT.any(), lambda: ring.pass_queries(q_TNH, kv, batch, kernel, last_CT), lambda: unseen(q_TNH)
        )
    return kernel.finish(merge_two(found, query))


def anchor(
    q_TNH: jax.Array, kv: KVPages, batch: AttentionBatch, kernel: Kernel, star: StarConfig, sees_T: jax.Array
) -> Partial:
    """Prompt tokens over the anchors of their prompts, which rank 0 sends to all, one prompt after the other."""
    assert batch.chunks_RC is not None and batch.prompts_CT is not None
    tile_T, query_T = batch.chunk_T(TILE), batch.chunk_T(QUERY)
    pages_RW = batch.pages_RW[batch.decodes :]
    page_size = kv.shape[3]
    width = -(-star.anchor_size // page_size)
    position_T = batch.positions_T[batch.decodes :]
    first_T = None if kernel.window is None else jnp.maximum(position_T - kernel.window + 1, 0)
    # The first tiles of the chunks in which any rank has a token that sees the anchor.
    seeing_T = ((batch.prompts_CT >= star.block_size) & (batch.prompts_CT < query_T)).any(axis=0)
    chunk_R = jnp.zeros(batch.tiles, bool).at[tile_T].max(seeing_T)
    chunks = jnp.argsort(~chunk_R, stable=True)

    def step(carry: tuple[jax.Array, Partial]) -> tuple[jax.Array, Partial]:
        i, found = carry
        tile = chunks[i]
        pages = kv[pages_RW[tile, :width]]
        if ranks(CP) > 1:
            pages = all_reduce(jnp.where(lax.axis_index("cp") == 0, pages, 0), CP)
        table_RW = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch.tiles, width))
        last_T = jnp.where(sees_T & (tile_T == tile), star.anchor_size - 1, -1)
        return i + 1, merge_two(found, kernel.rows(q_TNH, pages, table_RW, last_T, first_T))

    with jax.named_scope("star_anchor"):
        return lax.while_loop(lambda carry: carry[0] < chunk_R.sum(), step, (jnp.int32(0), unseen(q_TNH)))[1]
