"""ULYSSES: prompt tokens split over cp outside of attention, heads split over cp inside.

DeepSpeed-Ulysses (arXiv 2309.14509). Each rank computes queries, keys and values of its own tokens for all heads of its
tensor-parallel rank; an all-to-all turns that into all tokens for the rank's share of the heads, and another one turns
the results back. The pages hold that share of the KV heads for the whole context, padded and replicated as for tensor
parallelism where heads do not divide. Decodes are on every rank: each attends with its own heads, and one all_gather
puts the heads together.

    q, k, v of own tokens [T, cp, N + 2K, H] -> all_to_all -> all tokens [cp * T, N + 2K, H]
    -> attention over pages [P, 2, K, O, H] -> [cp, T, N, H] -> all_to_all -> own tokens [T, cp * N, H]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.parallel.collectives import all_gather, all_to_all, ranks
from jaxllm.parallel.context import AttentionBatch, Kernel, KVPages, write_pages

CP = ("cp",)


def attention(
    q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array | None, kv: KVPages, batch: AttentionBatch, kernel: Kernel
) -> tuple[jax.Array, KVPages]:
    """The result of this rank's tokens for all heads, out_TNH, and the written pages of this rank's heads.

    Heads of q, k and v are those of the first cp rank, then those of the second, and so on.
    """
    assert batch.prompts_CT is not None
    size, D, H = ranks(CP), batch.decodes, q_TNH.shape[2]
    N, K = q_TNH.shape[1] // size, k_TKH.shape[1] // size

    kept = [k_TKH] if v_TKH is None else [k_TKH, v_TKH]
    qkv = jnp.concatenate([x.reshape(len(x), size, -1, H) for x in (q_TNH, *kept)], axis=2)
    with jax.named_scope("tokens_to_heads"):
        rows = [qkv[:D, lax.axis_index("cp")]]
        if batch.tiles:
            rows.append(all_to_all(qkv[D:].swapaxes(0, 1), CP).reshape(-1, *qkv.shape[2:]))
        qkv = jnp.concatenate(rows)
    # The step as this rank attends to it: the decodes, then the tiles of every rank.
    whole = AttentionBatch(
        D,
        batch.tile,
        jnp.concatenate([batch.positions_T[:D], batch.prompts_CT.reshape(-1)]),
        jnp.concatenate([batch.pages_RW[:D], jnp.tile(batch.pages_RW[D:], (size, 1))]),
    )
    stripes = kernel.stripes(kv)
    with jax.named_scope("kv_write"):
        k, v = qkv[:, N : N + K], None if v_TKH is None else qkv[:, N + K :]
        kv = write_pages(kv, k, v, whole.positions_T, whole.pages_RW, whole.row_T, stripes)
    with jax.named_scope("paged_attention"):
        out = kernel.finish(kernel.step(qkv[:, :N], kv, whole, *kernel.visible(whole.positions_T, stripes)))
    with jax.named_scope("heads_to_tokens"):
        parts = []
        if D:
            parts.append(all_gather(out[:D], CP))
        if batch.tiles:
            parts.append(all_to_all(out[D:].reshape(size, -1, N, H), CP))
        heads = jnp.concatenate(parts, axis=1)  # [cp, T, N, H]
    return heads.swapaxes(0, 1).reshape(-1, size * N, H), kv
