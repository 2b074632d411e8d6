"""HELIX: the context over cp for attention, and the same ranks tp * cp wide for everything else.

Helix Parallelism (arXiv 2507.07120). Every rank computes the queries of all tokens of a step and attends over its own
stripes of the context. One all-to-all then hands each rank the partial results of its share of the heads, which it
merges: those are the columns of the output projection that it holds. The FFN and the vocabulary are tp * cp wide too.
Tokens are the same on all ranks of cp, so that decodes and prompts go the same way.

    queries [T, N, H] on every rank -> partial results over the rank's stripes
    -> all_to_all [cp, T, N / cp, H + lse] -> merged [T, N / cp, H] -> output projection, all-reduce over tp * cp
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.parallel.collectives import all_to_all, ranks
from jaxllm.parallel.context import AttentionBatch, Kernel, KVPages, write_pages
from jaxllm.parallel.merge import merge, pack, unpack

CP = ("cp",)


def attention(
    q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array | None, kv: KVPages, batch: AttentionBatch, kernel: Kernel
) -> tuple[jax.Array, KVPages]:
    """This rank's heads of the result, [T, ceil(N / cp), H], and the written pages."""
    stripes = kernel.stripes(kv, lax.axis_index("cp"))
    with jax.named_scope("kv_write"):
        kv = write_pages(kv, k_TKH, v_TKH, batch.positions_T, batch.pages_RW, batch.row_T, stripes)
    with jax.named_scope("paged_attention"):
        part = kernel.step(q_TNH, kv, batch, *kernel.visible(batch.positions_T, stripes))
    with jax.named_scope("helix_exchange"):
        sent = pack(part)
        size, short = ranks(CP), -sent.shape[1] % ranks(CP)
        sent = jnp.pad(sent, ((0, 0), (0, short), (0, 0)))
        sent = jnp.moveaxis(sent.reshape(sent.shape[0], size, -1, sent.shape[2]), 1, 0)
        out_TNH = kernel.finish(merge(unpack(all_to_all(sent, CP))))
    return out_TNH, kv
