"""Random operands of the kernels that take a token through whole layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


class Draws:
    """The arrays of a layer, at most `count`, of a size that keeps what is added near what is there."""

    def __init__(self, key: jax.Array, count: int) -> None:
        self._keys = iter(jax.random.split(key, count))

    def bf16(self, *shape: int, scale: float = 1.0) -> jax.Array:
        """Normal, in bfloat16."""
        return jax.random.normal(next(self._keys), shape, jnp.bfloat16) * scale

    def uniform(self, size: int, low: float = 0.0, high: float = 1.0) -> jax.Array:
        """In [low, high), float32."""
        return jax.random.uniform(next(self._keys), (size,), jnp.float32, low, high)

    def norm(self, size: int) -> jax.Array:
        """Weights of a norm, around 1."""
        return self.uniform(size, 0.5, 1.5)


def random_place(
    key: jax.Array, tokens: int, *, H: int, page: int, seed: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Where the last of `tokens` tokens is: cos, sin, page, slot, pages_RW and position, as these kernels take them.

    The pages are any of the first W + 2 after the dummy one, where W of them hold the tokens. No token is at -1.
    """
    W, last = max(1, -(-tokens // page)), max(tokens - 1, 0)
    pages = np.random.default_rng(seed).permutation(W + 2)[:W].astype(np.int32) + 1
    angle = jax.random.uniform(key, (1, 1, H // 2), jnp.float32, 0.0, 6.0)
    return (
        jnp.cos(angle),
        jnp.sin(angle),
        jnp.asarray([pages[last // page] if tokens else 0], jnp.int32),
        jnp.asarray([last % page], jnp.int32),
        jnp.asarray(pages[None]),
        jnp.asarray([tokens - 1], jnp.int32),
    )
