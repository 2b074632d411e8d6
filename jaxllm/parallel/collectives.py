"""The collectives of the dense model, over the model axes; nothing on one rank, where XLA would keep each as a copy."""

from __future__ import annotations

import jax
from jax import lax

from jaxllm.parallel.mesh import MODEL_AXES


def ranks() -> int:
    """Number of model-parallel ranks; a Python int, known while tracing."""
    return lax.axis_size(MODEL_AXES)


def rank() -> jax.Array | int:
    """This rank's number."""
    return lax.axis_index(MODEL_AXES) if ranks() > 1 else 0


def all_reduce(x: jax.Array) -> jax.Array:
    """The sum of every rank's x, on every rank."""
    return lax.psum(x, MODEL_AXES) if ranks() > 1 else x


def all_gather(x: jax.Array) -> jax.Array:
    """Every rank's x, stacked along a new first axis."""
    return lax.all_gather(x, MODEL_AXES) if ranks() > 1 else x[None]
