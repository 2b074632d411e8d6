"""RING: prompt tokens and their keys and values striped over cp; the keys and values of a chunk go round.

Ring Attention (arXiv 2310.01889) over stripes (Striped Attention, arXiv 2311.09431). A prompt token is computed on the
rank that keeps its keys and values. Position p is on rank (p // stripe) % cp, so that under a causal mask all ranks
have the same work to within a stripe, and nothing moves when keys and values are stored.

    chunk    the keys and values of the chunk's tokens visit every rank, each time sent on before they are attended to;
             a visiting block is a small page pool whose pages are the tiles, laid out alike on all ranks
    context  what the pages held before the chunk (earlier chunks, a cached prefix) stays where it is, and the queries
             go to it: all_gather of q, attention over the rank's own pages, all_to_all of the results back
    decodes  every rank has all of them, and attends over its own pages; all_gather of the results
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.parallel.collectives import all_gather, all_to_all, ranks, rotate
from jaxllm.parallel.context import AttentionBatch, Kernel, KVPages, planes, write_pages
from jaxllm.parallel.merge import Partial, merge, merge_two, pack, unpack, unseen

CP = ("cp",)
START, TILE = 0, 1
"""Columns of `AttentionBatch.chunks_RC`: first position and first tile of a tile's chunk."""


def attention(
    q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array | None, kv: KVPages, batch: AttentionBatch, kernel: Kernel
) -> tuple[jax.Array, KVPages]:
    """The result of this rank's tokens, out_TNH, and the written pages."""
    D = batch.decodes
    stripes = kernel.stripes(kv, lax.axis_index("cp"))
    with jax.named_scope("kv_write"):
        kv = write_pages(kv, k_TKH, v_TKH, batch.positions_T, batch.pages_RW, batch.row_T, stripes)
    parts = []
    if D:
        parts.append(decode(q_TNH[:D], kv, batch, kernel))
    if batch.tiles:
        part = ring(q_TNH[D:], k_TKH[D:], None if v_TKH is None else v_TKH[D:], kv, batch, kernel)
        parts.append(kernel.finish(merge_two(part, context(q_TNH[D:], kv, batch, kernel))))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts), kv


def decode(q_DNH: jax.Array, kv: KVPages, batch: AttentionBatch, kernel: Kernel) -> jax.Array:
    """Decoding tokens, which every rank has, over the pages of all ranks."""
    D = batch.decodes
    with jax.named_scope("decode_attention"):
        visible = kernel.visible(batch.positions_T[:D], kernel.stripes(kv, lax.axis_index("cp")))
        part = kernel.rows(q_DNH, kv, batch.pages_RW[:D], *visible)
    with jax.named_scope("decode_merge"):
        return kernel.finish(merge(unpack(all_gather(pack(part), CP))))


def ring(
    q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array | None, kv: KVPages, batch: AttentionBatch, kernel: Kernel
) -> Partial:
    """Prompt tokens over the tokens of their own chunks on all ranks."""
    assert batch.chunks_RC is not None
    size, rank = ranks(CP), lax.axis_index("cp")
    positions_T = batch.positions_T[batch.decodes :]
    before_T = batch.chunk_T(START) - 1
    tiles_RW = jnp.minimum(batch.chunks_RC[:, TILE, None] + jnp.arange(batch.tiles), batch.tiles - 1)
    block = planes(k_TKH, v_TKH, kv.dtype)  # keys and values as pages, [R, Y, K, tile, H]
    block = jnp.moveaxis(block.reshape(batch.tiles, batch.tile, *block.shape[1:]), 1, 3)
    found: Partial | None = None
    for step in range(size):
        with jax.named_scope(f"ring_{step}"):
            following = rotate(block, "cp") if step + 1 < size else block
            stripes = kernel.stripes(kv, (rank - step) % size)
            earlier_T = stripes.count(before_T)
            last_T, first_T = kernel.visible(positions_T, stripes)
            last_T = jnp.where(positions_T >= 0, last_T - earlier_T, -1)
            first_T = None if first_T is None else jnp.maximum(first_T - earlier_T, 0)
            part = kernel.rows(q_TNH, block, tiles_RW, last_T, first_T)
            found = part if found is None else merge_two(found, part)
            block = following
    assert found is not None
    return found


def context(q_TNH: jax.Array, kv: KVPages, batch: AttentionBatch, kernel: Kernel) -> Partial:
    """Prompt tokens over what the pages of all ranks held before their chunks; nothing is sent when that is nothing."""
    assert batch.chunks_RC is not None and batch.prompts_CT is not None
    stripes = kernel.stripes(kv, lax.axis_index("cp"))
    last_CT = jnp.where(batch.prompts_CT >= 0, stripes.count(batch.chunk_T(START) - 1) - 1, -1)
    needed = (batch.chunks_RC[:, START] > 0).any()
    return lax.cond(needed, lambda: pass_queries(q_TNH, kv, batch, kernel, last_CT), lambda: unseen(q_TNH))


def pass_queries(q_TNH: jax.Array, kv: KVPages, batch: AttentionBatch, kernel: Kernel, last_CT: jax.Array) -> Partial:
    """Prompt tokens over the pages of all ranks: the queries go there, and the results come back.

    last_CT: the last key of this rank that each prompt token of every rank sees.
    """
    assert batch.prompts_CT is not None
    size, shape = ranks(CP), q_TNH.shape
    with jax.named_scope("pass_queries"):
        stripes = kernel.stripes(kv, lax.axis_index("cp"))
        first_CT = kernel.windowed(batch.prompts_CT, stripes)
        pages_RW = jnp.tile(batch.pages_RW[batch.decodes :], (size, 1))
        q_CTNH = all_gather(q_TNH, CP).reshape(-1, *shape[1:])
        part = pack(kernel.rows(q_CTNH, kv, pages_RW, last_CT, first_CT))
        return merge(unpack(all_to_all(part.reshape(size, *shape[:2], -1), CP)))
