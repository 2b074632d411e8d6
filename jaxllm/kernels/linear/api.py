"""Products of activations and weights: the first implementation that can do the job does it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.kernels.linear import cpu, cuda, narrow_cuda, packed, quantized, quantized_cuda, reference
from jaxllm.kernels.linear.blocks import ROWS
from jaxllm.kernels.linear.quantized import QuantizedWeight, Weight
from jaxllm.kernels.linear.reference import Norm

IMPLEMENTATIONS = (packed.matmul, cpu.matmul, narrow_cuda.matmul, cuda.matmul)


def matmul(x: jax.Array, weight_FD: Weight, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """`x[..., D] @ weight.T`, `[..., F]` in `dtype`, accumulated in float32 whatever the dtypes.

    The weight may be packed, or quantised.
    """
    if isinstance(weight_FD, QuantizedWeight):
        try:
            return quantized_cuda.matmul(x, weight_FD, dtype)
        except NotImplementedError:
            return quantized.matmul(x, weight_FD, dtype)
    reasons = []
    for implementation in IMPLEMENTATIONS:
        try:
            return implementation(x, weight_FD).astype(dtype)
        except NotImplementedError as reason:
            reasons.append(f"{implementation.__module__}: {reason}")
    if packed.is_packed(weight_FD):
        raise NotImplementedError("no implementation of matmul applies: " + "; ".join(reasons))
    return reference.matmul(x, weight_FD, dtype)


def linear(
    x_TD: jax.Array,
    weight_FD: Weight,
    *,
    norm: Norm | None = None,
    bias_F: jax.Array | None = None,
    activation: str | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """A product with what is before and after it, `[T, F]` in x's dtype; on a GPU in one kernel where that is faster.

    Args:
      norm: x is normed first, by this weight and epsilon.
      bias_F: is added to the product.
      activation: a name of `reference.ACTIVATIONS`; the result is act(first half) * second half, `[T, F / 2]`.
      residual: in x's dtype, is added at the end.
    """
    try:
        if bias_F is not None:
            raise NotImplementedError("no kernel has a bias")
        if isinstance(weight_FD, QuantizedWeight):
            return quantized_cuda.linear(x_TD, weight_FD, norm=norm, activation=activation, residual=residual)
        try:
            return narrow_cuda.linear(x_TD, weight_FD, norm=norm, activation=activation, residual_TF=residual)
        except NotImplementedError:
            return cuda.linear(x_TD, weight_FD, norm=norm, activation=activation, residual_TF=residual)
    except NotImplementedError:
        return reference.linear(
            x_TD, weight_FD, norm=norm, bias_F=bias_F, activation=activation, residual=residual, matmul=matmul
        )


def num_rows(weight_FD: Weight) -> int:
    """F of a plain, packed or quantised weight."""
    return weight_FD.shape[0] * (ROWS if packed.is_packed(weight_FD) else 1)


def take_rows(weight_FD: jax.Array, ids_T: jax.Array) -> jax.Array:
    """Rows of a plain or packed weight, `[T, D]`; ids must be in range."""
    return packed.take_rows(weight_FD, ids_T) if packed.is_packed(weight_FD) else weight_FD[ids_T]
