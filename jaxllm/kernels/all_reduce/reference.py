"""What a sum over ranks is, in plain jax.numpy, of the parts of all of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def all_reduce(part_RTD: jax.Array, residual_TD: jax.Array | None = None) -> jax.Array:
    """The residual plus the parts of R ranks, added up in their order in float32 and rounded once."""
    sum_TD = jnp.zeros(part_RTD.shape[1:], jnp.float32)
    for part_TD in part_RTD:
        sum_TD = sum_TD + part_TD.astype(jnp.float32)
    if residual_TD is not None:
        sum_TD = sum_TD + residual_TD.astype(jnp.float32)
    return sum_TD.astype(part_RTD.dtype)
