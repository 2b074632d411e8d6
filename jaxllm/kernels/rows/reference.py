"""Residual, norm, act(gate) * up and their quantisation in plain jax.numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.kernels.linear.product import Activations, Product, QuantizedTokens
from jaxllm.kernels.linear.quantized import quantize_tokens
from jaxllm.kernels.linear.reference import Norm, gated, rms_norm


def residual_norm(
    product: Product, residual_TD: jax.Array, norm: Norm, *, quantised: bool = False
) -> tuple[jax.Array, Activations]:
    """See `api.residual_norm`. The sum is rounded to its dtype, and the norm is that of the rounded sum."""
    sum_TD = residual_TD + product.finish()
    return sum_TD, quantized_norm(sum_TD, norm) if quantised else rms_norm(sum_TD, norm)


def quantized_norm(x_TD: jax.Array, norm: Norm) -> QuantizedTokens:
    """See `api.quantized_norm`."""
    return quantize(rms_norm(x_TD, norm))


def gate(product: Product, activation: str, *, quantised: bool = False) -> Activations:
    """See `api.gate`."""
    first, second = jnp.split(product.finish(), 2, axis=-1)
    y_TF = gated(first, second, activation)
    return quantize(y_TF) if quantised else y_TF


def quantize(x_TD: jax.Array) -> QuantizedTokens:
    """See `api.quantize`."""
    return QuantizedTokens(*quantize_tokens(x_TD), x_TD.dtype)
