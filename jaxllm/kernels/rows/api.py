"""What lies between products, each in one pass over its rows: on a Hopper GPU by `cuda`, else as `reference` has it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import lax

from jaxllm.kernels.linear.product import Activations, BlockedTokens, Product, QuantizedTokens
from jaxllm.kernels.linear.reference import Norm, rms_norm
from jaxllm.kernels.rows import cuda, reference


def residual_norm(
    product: Product, residual_TD: jax.Array, norm: Norm, *, quantised: bool = False, blocked: int = 0
) -> tuple[jax.Array, Activations]:
    """The residual plus the product, [T, D] in the residual's dtype, and what a norm makes of that sum.

    quantised: the second as e4m3. blocked: the second as `BlockedTokens` of so many rows, where there is a kernel; 0:
    not so.
    """
    weight_D, eps = norm

    def plain(product: Product, residual_TD: jax.Array, weight_D: jax.Array) -> tuple[jax.Array, Activations]:
        return reference.residual_norm(product, residual_TD, (weight_D, eps), quantised=quantised)

    def plain_blocked(product: Product, residual_TD: jax.Array, weight_D: jax.Array) -> tuple[jax.Array, Activations]:
        x_TD, y_TD = plain(product, residual_TD, weight_D)
        assert isinstance(y_TD, jax.Array)
        return x_TD, BlockedTokens.of(y_TD, blocked)

    try:
        kernel = cuda.residual_norm(product, residual_TD, eps, quantised=quantised, blocked=blocked)
    except NotImplementedError:
        return plain(product, residual_TD, weight_D)
    if blocked:
        return lax.platform_dependent(product, residual_TD, weight_D, cuda=kernel, default=plain_blocked)
    return lax.platform_dependent(product, residual_TD, weight_D, cuda=kernel, default=plain)


def adds(residual_TD: jax.Array, *, quantised: bool) -> bool:
    """Whether `residual_norm` has a kernel for such residuals: then a sum had better wait for the norm after it.

    quantised: products of operands in e4m3.
    """
    try:
        cuda.require_residual_norm(residual_TD, quantised=quantised)
    except NotImplementedError:
        return False
    return True


def quantized_norm(x_TD: jax.Array, norm: Norm) -> QuantizedTokens:
    """x / rms(x) * weight over the rows of x, in e4m3; for bfloat16.

    A norm alone is XLA's, which makes it part of what is before.
    """
    weight_D, eps = norm

    def plain(x_TD: jax.Array, weight_D: jax.Array) -> QuantizedTokens:
        return reference.quantized_norm(x_TD, (weight_D, eps))

    try:
        kernel = cuda.quantized_norm(x_TD, eps)
    except NotImplementedError:
        return plain(x_TD, weight_D)
    return lax.platform_dependent(x_TD, weight_D, cuda=kernel, default=plain)


def blocked_norm(x_TD: jax.Array, norm: Norm, blocked: int) -> BlockedTokens:
    """x / rms(x) * weight over the rows of x, as `BlockedTokens` of so many rows; for bfloat16.

    Raises NotImplementedError where there is no kernel: what wants it so has none either.
    """
    weight_D, eps = norm

    def plain(x_TD: jax.Array, weight_D: jax.Array) -> BlockedTokens:
        return BlockedTokens.of(rms_norm(x_TD, (weight_D, eps)), blocked)

    return lax.platform_dependent(x_TD, weight_D, cuda=cuda.blocked_norm(x_TD, eps, blocked), default=plain)


def gate(product: Product, activation: str) -> jax.Array:
    """act(first half) * second half of the rows of a product, by a name of `linear.reference.gated`."""
    return _gate(product, activation, quantised=False)


def quantized_gate(product: Product, activation: str) -> QuantizedTokens:
    """`gate` in e4m3; for bfloat16."""
    return _gate(product, activation, quantised=True)


def _gate(product: Product, activation: str, *, quantised: bool) -> Any:
    plain = partial(reference.gate, activation=activation, quantised=quantised)
    try:
        kernel = cuda.gate(product, activation, quantised=quantised)
    except NotImplementedError:
        return plain(product)
    return lax.platform_dependent(product, cuda=kernel, default=plain)


def quantize(x_TD: jax.Array) -> QuantizedTokens:
    """Activations in e4m3, each token by its largest; for bfloat16."""
    try:
        kernel = cuda.quantize(x_TD)
    except NotImplementedError:
        return reference.quantize(x_TD)
    return lax.platform_dependent(x_TD, cuda=kernel, default=reference.quantize)
