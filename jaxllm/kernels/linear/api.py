"""Products of activations and weights: the first implementation that can do the job does it."""

from __future__ import annotations

import jax

from jaxllm.kernels.linear import cpu, packed, reference
from jaxllm.kernels.linear.blocks import ROWS

IMPLEMENTATIONS = (packed.matmul, cpu.matmul, reference.matmul)


def matmul(x: jax.Array, weight_FD: jax.Array) -> jax.Array:
    """`x[..., D] @ weight.T`, `[..., F]` in float32 whatever the dtypes, accumulated in float32; or a packed weight."""
    reasons = []
    for implementation in IMPLEMENTATIONS:
        try:
            return implementation(x, weight_FD)
        except NotImplementedError as reason:
            reasons.append(f"{implementation.__module__}: {reason}")
    raise NotImplementedError("no implementation of matmul applies: " + "; ".join(reasons))


def num_rows(weight_FD: jax.Array) -> int:
    """F of a plain or packed weight."""
    return weight_FD.shape[0] * (ROWS if packed.is_packed(weight_FD) else 1)


def take_rows(weight_FD: jax.Array, ids_T: jax.Array) -> jax.Array:
    """Rows of a plain or packed weight, `[T, D]`; ids must be in range."""
    return packed.take_rows(weight_FD, ids_T) if packed.is_packed(weight_FD) else weight_FD[ids_T]
