"""Rotation and page writes in plain jax.numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.kernels.linear.product import Product
from jaxllm.kernels.linear.reference import rms_norm


def rotate(x_TNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates every head of every token by its position, in float32: the halves of a head against each other."""
    a, b = jnp.split(x_TNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_TNH.dtype)


def write(kv_PYKOH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, page_T: jax.Array, slot_T: jax.Array) -> jax.Array:
    """The pool with keys and values of tokens in their places; to eight bits, what is too large becomes the largest."""
    new = jnp.stack([k_TKH, v_TKH], axis=1)
    if kv_PYKOH.dtype.itemsize == 1:
        limit = float(jnp.finfo(kv_PYKOH.dtype).max)
        new = jnp.clip(new, -limit, limit)
    return kv_PYKOH.at[page_T, :, :, slot_T].set(new.astype(kv_PYKOH.dtype))


def rope_write(
    qkv: Product,
    cos: jax.Array,
    sin: jax.Array,
    kv_PYKOH: jax.Array,
    page_T: jax.Array,
    slot_T: jax.Array,
    q_norm_H: jax.Array | None = None,
    k_norm_H: jax.Array | None = None,
    *,
    eps: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """See `api.rope_write`."""
    K, H = kv_PYKOH.shape[2], kv_PYKOH.shape[4]
    qkv_TCH = qkv.finish().reshape(qkv.shape[0], -1, H)
    N = qkv_TCH.shape[1] - 2 * K
    q_TNH, k_TKH, v_TKH = qkv_TCH[:, :N], qkv_TCH[:, N : N + K], qkv_TCH[:, N + K :]
    if q_norm_H is not None and k_norm_H is not None:
        q_TNH, k_TKH = rms_norm(q_TNH, (q_norm_H, eps)), rms_norm(k_TKH, (k_norm_H, eps))
    return rotate(q_TNH, cos, sin), write(kv_PYKOH, rotate(k_TKH, cos, sin), v_TKH, page_T, slot_T)
