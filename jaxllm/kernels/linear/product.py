"""Products that are not finished, and quantised activations: what goes from one kernel to the next as it is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.tree_util.register_dataclass, data_fields=["sums", "token_scale", "column_scale"], meta_fields=["dtype"])
@dataclass(frozen=True, slots=True)
class Product:
    """A product [T, F] in `dtype`, which its consumer finishes in its own pass over it; `finish` says how.

    sums: [T, F] in `dtype`, or [S, T, F], sums over S parts of the inputs, in float32 or `dtype`. token_scale: float32
    [T, 1], and column_scale: float32 [F], of operands that were quantised; both or none.
    """

    sums: jax.Array
    token_scale: jax.Array | None
    column_scale: jax.Array | None
    dtype: jnp.dtype

    @classmethod
    def of(cls, y_TF: jax.Array) -> Product:
        """One that is finished."""
        return cls(y_TF, None, None, y_TF.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sums.shape[-2:]

    def finish(self) -> jax.Array:
        """The product, [T, F]."""
        y = self.sums if self.sums.ndim == 2 else self.sums.astype(jnp.float32).sum(axis=0)
        if self.token_scale is not None and self.column_scale is not None:
            y = y.astype(jnp.float32) * self.token_scale * self.column_scale
        return y.astype(self.dtype)


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=["dtype"])
@dataclass(frozen=True, slots=True)
class QuantizedTokens:
    """Activations [T, D] as e4m3 values and the float32 scale [T, 1] of each token; dtype: what they were in."""

    values: jax.Array
    scale: jax.Array
    dtype: jnp.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


@partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["tokens"])
@dataclass(frozen=True, slots=True)
class BlockedTokens:
    """Activations [T, D] as products have them in shared memory, for copies of bytes that lie together.

    values: [D / 64, P, 64], with P >= T rows, of which those beyond T hold anything: 64 inputs of all tokens after
    another, and of each row 8 pieces of 8 inputs, piece c kept at c ^ (row mod 8). tokens: T.
    """

    values: jax.Array
    tokens: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tokens, self.values.shape[0] * self.values.shape[2]

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype

    @classmethod
    def of(cls, x_TD: jax.Array, rows: int) -> BlockedTokens:
        """From activations, with so many rows, a multiple of 8."""
        T, D = x_TD.shape
        pieces = jnp.pad(x_TD, ((0, rows - T), (0, 0))).reshape(rows, D // 64, 8, 8)
        pieces = jnp.take_along_axis(pieces, _swizzle(rows), axis=2)
        return cls(pieces.transpose(1, 0, 2, 3).reshape(D // 64, rows, 64), T)

    def plain(self) -> jax.Array:
        """The activations, [T, D]."""
        panels, rows, _ = self.values.shape
        pieces = self.values.reshape(panels, rows, 8, 8).transpose(1, 0, 2, 3)
        return jnp.take_along_axis(pieces, _swizzle(rows), axis=2).reshape(rows, -1)[: self.tokens]


@partial(jax.tree_util.register_dataclass, data_fields=["values", "squares"], meta_fields=["eps"])
@dataclass(frozen=True, slots=True)
class ScaledTokens:
    """Activations of which an RMSNorm has been made but for one factor for each token, left to who multiplies them.

    values: [T, D], times the norm's weight; they may be blocked. squares: float32 [P, C] with C >= T, whose sums over P
    are those of the squares of the activations, before that; those beyond T hold anything. eps: of the norm.
    """

    values: jax.Array | BlockedTokens
    squares: jax.Array
    eps: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype

    @classmethod
    def of(
        cls, x_TD: jax.Array, weight_D: jax.Array, eps: float, parts: tuple[int, int], blocked: int = 0
    ) -> ScaledTokens:
        """From activations. parts: P and C. blocked: rows of the values' blocks; 0: they are not blocked."""
        T = x_TD.shape[0]
        wide = x_TD.astype(jnp.float32)
        squares = jnp.zeros(parts, jnp.float32).at[0, :T].set((wide * wide).sum(axis=1))
        values = (wide * weight_D).astype(x_TD.dtype)
        return cls(BlockedTokens.of(values, blocked) if blocked else values, squares, eps)

    def plain(self) -> jax.Array:
        """What the norm makes of the activations, [T, D]."""
        T, D = self.shape
        factor = jax.lax.rsqrt(self.squares.sum(axis=0)[:T] / D + self.eps)
        values = self.values.plain() if isinstance(self.values, BlockedTokens) else self.values
        return (values.astype(jnp.float32) * factor[:, None]).astype(self.dtype)


def _swizzle(rows: int) -> jax.Array:
    """Of which piece each is, its own inverse: [rows, 1, 8, 1]."""
    return (jnp.arange(8) ^ jnp.arange(rows)[:, None] % 8)[:, None, :, None]


Activations = jax.Array | QuantizedTokens | BlockedTokens | ScaledTokens
