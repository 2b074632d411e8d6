"""Matrix products by XLA, and what stands around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Norm = tuple[jax.Array, float]
"""Weight, float32 [D], and epsilon of an RMSNorm."""
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
SWIGLU_CLAMPED = "swiglu_clamped"
"""gpt-oss: (up + 1) * gate * sigmoid(ALPHA * gate), of a gate of at most LIMIT and an up of at most +-LIMIT."""
ALPHA, LIMIT = 1.702, 7.0


def gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    """act(gate) * up, of one of the `ACTIVATIONS` or `SWIGLU_CLAMPED`."""
    if activation == SWIGLU_CLAMPED:
        gate, up = jnp.minimum(gate, LIMIT), jnp.clip(up, -LIMIT, LIMIT)
        return (up + 1) * gate * jax.nn.sigmoid(ALPHA * gate)
    return ACTIVATIONS[activation](gate) * up


def matmul(x: jax.Array, weight_FD: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """See `api.matmul`."""
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x, weight_FD, contract, preferred_element_type=dtype)


def rms_norm(x: jax.Array, norm: Norm) -> jax.Array:
    """x / rms(x) * weight over the last axis, in float32, in x's dtype (https://arxiv.org/abs/1910.07467)."""
    weight, eps = norm
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * weight).astype(x.dtype)


def linear(
    x: jax.Array,
    weight_FD: Any,
    *,
    norm: Norm | None = None,
    bias_F: jax.Array | None = None,
    activation: str | None = None,
    residual: jax.Array | None = None,
    matmul: Callable[[jax.Array, Any, jax.typing.DTypeLike], jax.Array] = matmul,
) -> jax.Array:
    """See `api.linear`; step by step, with this `matmul`, and a weight that it takes."""
    y = x if norm is None else rms_norm(x, norm)
    # Not float32 that is rounded afterwards: XLA may write a large result to memory first, which costs a step of 8,192
    # tokens on an H200 5 %.
    y = matmul(y, weight_FD, x.dtype)
    if bias_F is not None:
        y = y + bias_F
    if activation is not None:
        gate, up = jnp.split(y, 2, axis=-1)
        y = gated(gate, up, activation)
    return y if residual is None else residual + y
