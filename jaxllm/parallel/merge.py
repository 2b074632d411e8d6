"""Attention over parts of a context, put together by the log of the sum of exponentiated scores (lse).

Softmax over a whole is the mean of the softmaxes over its parts, weighted by exp(lse). A part in which a query sees
nothing has an lse of about -1e30, and so no weight.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Partial = tuple[jax.Array, jax.Array]
"""Result [..., H] of a part of the context, and its lse [...], float32."""

MASKED = -1e30


def unseen(q: jax.Array) -> Partial:
    """What queries [..., H] get from a part of the context in which they see nothing."""
    return jnp.zeros_like(q), jnp.full(q.shape[:-1], MASKED, jnp.float32)


def merge(parts: Partial) -> Partial:
    """Parts stacked along the first axis, as one: out[..., H] in the dtype of the parts, and lse[...]."""
    out_C, lse_C = parts
    top = lse_C.max(axis=0)
    weight_C = jnp.exp(lse_C - top)
    total = weight_C.sum(axis=0)
    out = (out_C.astype(jnp.float32) * weight_C[..., None]).sum(axis=0) / total[..., None]
    return out.astype(out_C.dtype), top + jnp.log(total)


def merge_two(a: Partial, b: Partial) -> Partial:
    """Two parts as one."""
    return merge((jnp.stack([a[0], b[0]]), jnp.stack([a[1], b[1]])))


def add_sink(part: Partial, sink_N: jax.Array) -> jax.Array:
    """The result of a whole context, [..., N, H], of heads that give a score to no key at all, too.

    The sink of gpt-oss: one more part of the context, of that lse and a result of zero. To be added once, to the whole.
    """
    out, lse = part
    return (out.astype(jnp.float32) * jax.nn.sigmoid(lse - sink_N)[..., None]).astype(out.dtype)


def pack(part: Partial) -> jax.Array:
    """Result and lse, bit by bit, in one array [..., H + 1] (16 bits: [..., H + 2]): one message carries both."""
    out, lse = part
    bits = lax.bitcast_convert_type(lse, out.dtype)
    return jnp.concatenate([out, bits.reshape(*lse.shape, -1)], axis=-1)


def unpack(packed: jax.Array) -> Partial:
    """What `pack` put together."""
    width = 4 // packed.dtype.itemsize
    bits = packed[..., -width:]
    lse = lax.bitcast_convert_type(bits if width > 1 else bits[..., 0], jnp.float32)
    return packed[..., :-width], lse
