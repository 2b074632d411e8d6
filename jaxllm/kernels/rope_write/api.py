"""What lies between the QKV projection and attention, in one pass over its result."""

from __future__ import annotations

from functools import partial

import jax
from jax import lax

from jaxllm.kernels.linear.product import Product
from jaxllm.kernels.rope_write import cuda, reference

finishes = cuda.finishes
"""Whether products of so many tokens may come to `rope_write` as they are; it takes all, but finishes some before."""


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
    """Rotates queries and keys by their positions and stores keys and values in their pages.

    Args:
      qkv: [T, C * H], the heads of T tokens: those of queries, then K of keys, then K of values.
      cos, sin: float32 [T, 1, H / 2].
      kv_PYKOH: the page pool of one layer, written in place where the caller gives it away.
      page_T, slot_T: int32, where each token's key and value go; different places, but for page 0, which is nobody's.
      q_norm_H, k_norm_H: float32, weights of a norm (with `eps`) of each head of queries and of keys before rotation.

    Returns:
      q_TNH in qkv's dtype, and the pool. To e4m3, what is larger than 448 becomes 448.
    """
    if not finishes(qkv.shape[0], scaled=qkv.token_scale is not None):
        qkv = Product.of(qkv.finish())
    arguments = (qkv, cos, sin, kv_PYKOH, page_T, slot_T, q_norm_H, k_norm_H)
    default = partial(reference.rope_write, eps=eps)
    try:
        kernel = cuda.choose(*arguments, eps=eps)
    except NotImplementedError:
        return default(*arguments)
    return lax.platform_dependent(*arguments, cuda=kernel, default=default)
