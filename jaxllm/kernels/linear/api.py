"""Products of activations and weights: the first implementation that can do the job does it."""

from __future__ import annotations

import jax

from jaxllm.kernels.linear import cpu, reference

IMPLEMENTATIONS = (cpu.matmul, reference.matmul)


def matmul(x: jax.Array, weight_FD: jax.Array) -> jax.Array:
    """`x[..., D] @ weight.T`, `[..., F]` in float32 whatever the dtypes, accumulated in float32."""
    reasons = []
    for implementation in IMPLEMENTATIONS:
        try:
            return implementation(x, weight_FD)
        except NotImplementedError as reason:
            reasons.append(f"{implementation.__module__}: {reason}")
    raise NotImplementedError("no implementation of matmul applies: " + "; ".join(reasons))
