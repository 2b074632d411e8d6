"""Paged attention in plain jax.numpy: right everywhere, and what the CPU runs.

Walks the context in blocks of a few pages with an online softmax, so that its memory does not grow with the context and
its work follows the longest row present instead of the longest row allowed: one compiled program serves every length.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

BLOCK_TOKENS = 64
"""Tokens per step of the walk. Measured on CPU at 32, 64 and 128: gathered blocks of 64 still fit the second cache."""

Carry = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

MASKED = -1e30
"""Finite, so that a block with no visible token gives no NaN; the first visible one wipes what it left."""


def first_visible(positions_RQ: jax.Array, window: int | None, first_RQ: jax.Array | None) -> jax.Array | None:
    """The first key that each query sees, from `window` or `first_RQ`; None when that is the start of the context."""
    return first_RQ if window is None else positions_RQ - window + 1


def attend(
    q_RQNH: jax.Array,
    kv_PYKOH: jax.Array,
    pages_RW: jax.Array,
    positions_RQ: jax.Array,
    first_RQ: jax.Array | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    values: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.paged_attention`. M is the query rows of one KV head: its G query heads times Q tokens."""
    R, Q, N, H = q_RQNH.shape
    _, _, K, O, _ = kv_PYKOH.shape
    G = N // K
    M = G * Q
    per_block = max(1, min(BLOCK_TOKENS // O, pages_RW.shape[1]))
    block = per_block * O
    short = -pages_RW.shape[1] % per_block
    pages_RW = jnp.pad(pages_RW, ((0, 0), (0, short)))

    q_RKMH = q_RQNH.reshape(R, Q, K, G, H).transpose(0, 2, 3, 1, 4).reshape(R, K, M, H) * scale

    def of_rows(x_RQ: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x_RQ[:, None, :], (R, G, Q)).reshape(R, M)

    positions_RM = of_rows(positions_RQ)
    first = jnp.int32(0)
    if first_RQ is not None:
        oldest = jnp.where(positions_RQ >= first_RQ, first_RQ, jnp.iinfo(jnp.int32).max).min()
        first = jnp.maximum(oldest, 0) // block
        first_RM = of_rows(first_RQ)
    last = (positions_RQ.max() + block) // block

    def pages_of(ids: jax.Array) -> jax.Array:
        pages = kv_PYKOH[ids].transpose(2, 0, 3, 1, 4, 5).reshape(-1, R, K, block, H)
        # Weights rounded to eight bits would lose more than the pages did.
        return pages if kv_PYKOH.dtype.itemsize > 1 else pages.astype(q_RQNH.dtype)

    def step(carry: Carry) -> Carry:
        i, max_RKM, sum_RKM, out_RKMH = carry
        ids = lax.dynamic_slice_in_dim(pages_RW, i * per_block, per_block, axis=1)
        pages = pages_of(ids)
        k_RKSH, v_RKSH = pages[0], pages[-1][..., :values]
        scores = lax.dot_general(
            q_RKMH, k_RKSH, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
        )  # R K M S
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        key_S = i * block + jnp.arange(block, dtype=jnp.int32)
        visible = key_S <= positions_RM[:, :, None]
        if first_RQ is not None:
            visible &= key_S >= first_RM[:, :, None]
        scores = jnp.where(visible[:, None], scores, MASKED)
        new_max = jnp.maximum(max_RKM, scores.max(-1))
        probs = jnp.exp(scores - new_max[..., None])
        keep = jnp.exp(max_RKM - new_max)
        part = lax.dot_general(
            probs.astype(v_RKSH.dtype), v_RKSH, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
        )
        return i + 1, new_max, sum_RKM * keep + probs.sum(-1), out_RKMH * keep[..., None] + part

    zero = jnp.zeros((R, K, M), jnp.float32)
    carry = (first, zero + MASKED, zero, jnp.zeros((R, K, M, values or H), jnp.float32))
    _, max_RKM, sum_RKM, out_RKMH = lax.while_loop(lambda c: c[0] < last, step, carry)

    total = jnp.maximum(sum_RKM, jnp.finfo(jnp.float32).tiny)
    out_RQNH = (out_RKMH / total[..., None]).reshape(R, K, G, Q, -1).transpose(0, 3, 1, 2, 4).reshape(R, Q, N, -1)
    lse_RQN = (max_RKM + jnp.log(total)).reshape(R, K, G, Q).transpose(0, 3, 1, 2).reshape(R, Q, N)
    return out_RQNH.astype(q_RQNH.dtype), lse_RQN
