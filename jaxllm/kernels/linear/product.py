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

    sums: [T, F] in `dtype`, or float32 [S, T, F], sums over S parts of the inputs. token_scale: float32 [T, 1], and
    column_scale: float32 [F], of operands that were quantised; both or none.
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
        y = self.sums if self.sums.ndim == 2 else self.sums.sum(axis=0)
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


Activations = jax.Array | QuantizedTokens
