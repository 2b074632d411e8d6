"""Products of activations and weights: the first implementation that can do the job does it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.kernels.linear import (
    cpu,
    cuda,
    fp8_cuda,
    narrow_cuda,
    packed,
    quantized,
    quantized_cuda,
    reference,
    tall_cuda,
    wide_cuda,
)
from jaxllm.kernels.linear.blocks import ROWS
from jaxllm.kernels.linear.parts import dtype_of, partial_sums
from jaxllm.kernels.linear.product import Activations, BlockedTokens, Product, QuantizedTokens, ScaledTokens
from jaxllm.kernels.linear.quantized import QuantizedWeight, Weight
from jaxllm.kernels.linear.reference import Norm
from jaxllm.kernels.rows import api as rows

IMPLEMENTATIONS = (packed.matmul, cpu.matmul, narrow_cuda.matmul, cuda.matmul)


def matmul(x: jax.Array, weight_FD: Weight, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """`x[..., D] @ weight.T`, `[..., F]` in `dtype`, accumulated in float32 whatever the dtypes.

    The weight may be packed, or quantised.
    """
    if isinstance(weight_FD, QuantizedWeight):
        for of_quantised in (fp8_cuda.matmul, quantized_cuda.matmul):
            try:
                return of_quantised(x, weight_FD, dtype)
            except NotImplementedError:
                pass
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
    x_TD: Activations,
    weight_FD: Weight,
    *,
    norm: Norm | None = None,
    bias_F: jax.Array | None = None,
    activation: str | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """A product with what is before and after it, `[T, F]` in x's dtype; on a GPU in as few kernels as is fast.

    Args:
      norm: x is normed first, by this weight and epsilon.
      bias_F: is added to the product.
      activation: a name of `reference.ACTIVATIONS`; the result is act(first half) * second half, `[T, F / 2]`.
      residual: in x's dtype, is added at the end.
    """
    try:
        return fused(x_TD, weight_FD, norm=norm, bias_F=bias_F, activation=activation, residual=residual)
    except NotImplementedError:
        made = product(x_TD, weight_FD, norm=norm, bias_F=bias_F)
    y = made.finish() if activation is None else rows.gate(made, activation)
    return y if residual is None else residual + y


def gated(
    x_TD: Activations,
    weight_FD: Weight,
    activation: str,
    *,
    norm: Norm | None = None,
    bias_F: jax.Array | None = None,
    quantised: bool = False,
) -> Activations:
    """`linear` with an activation. quantised: the result may be e4m3."""
    try:
        return fused(x_TD, weight_FD, norm=norm, bias_F=bias_F, activation=activation)
    except NotImplementedError:
        made = product(x_TD, weight_FD, norm=norm, bias_F=bias_F)
    return rows.quantized_gate(made, activation) if quantised else rows.gate(made, activation)


def fused(
    x_TD: Activations,
    weight_FD: Weight,
    *,
    norm: Norm | None = None,
    bias_F: jax.Array | None = None,
    activation: str | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """`linear` in one kernel. Raises NotImplementedError where there is none that is faster than several."""
    if bias_F is not None:
        raise NotImplementedError("no kernel has a bias")
    if isinstance(x_TD, QuantizedTokens):
        raise NotImplementedError("no kernel has e4m3 activations")
    if isinstance(x_TD, BlockedTokens):
        if isinstance(weight_FD, QuantizedWeight) or norm is not None or activation is None or residual is not None:
            raise NotImplementedError("only gated products have activations in blocks")
        return wide_cuda.gated(x_TD, weight_FD, activation)
    if isinstance(x_TD, ScaledTokens):
        if isinstance(weight_FD, QuantizedWeight):
            raise NotImplementedError("no kernel norms what it multiplies with quantised weights")
        if isinstance(x_TD.values, BlockedTokens):
            if activation is None or residual is not None:
                raise NotImplementedError("only gated products have activations in blocks")
            return wide_cuda.gated(x_TD, weight_FD, activation)
        return narrow_cuda.linear(x_TD, weight_FD, norm=norm, activation=activation, residual_TF=residual)
    if isinstance(weight_FD, QuantizedWeight):
        kernel = fp8_cuda.linear if fp8_cuda.is_chosen(x_TD, weight_FD) else quantized_cuda.linear
        return kernel(x_TD, weight_FD, norm=norm, activation=activation, residual=residual)
    if activation is not None and residual is None:
        try:
            return tall_cuda.gated(x_TD, weight_FD, activation, norm)
        except NotImplementedError:
            pass
    if norm and activation and residual is None and takes_blocks(x_TD, weight_FD, activation):
        blocked = rows.blocked_norm(x_TD, norm, wide_cuda.rows_for(x_TD.shape[0]))
        return wide_cuda.gated(blocked, weight_FD, activation)
    try:
        return narrow_cuda.linear(x_TD, weight_FD, norm=norm, activation=activation, residual_TF=residual)
    except NotImplementedError:
        return cuda.linear(x_TD, weight_FD, norm=norm, activation=activation, residual_TF=residual)


def product(
    x_TD: Activations,
    weight_FD: Weight,
    *,
    norm: Norm | None = None,
    bias_F: jax.Array | None = None,
    parts: int = 1,
) -> Product:
    """The product of x, normed, that its consumer finishes; of as many parts of the inputs, see `parts_of`."""
    if isinstance(x_TD, BlockedTokens | ScaledTokens):
        x_TD = x_TD.plain()
    if not isinstance(x_TD, QuantizedTokens):
        eight = multiplies_e4m3(x_TD, weight_FD)
        if norm is not None:
            x_TD = rows.quantized_norm(x_TD, norm) if eight else reference.rms_norm(x_TD, norm)
        elif eight:
            x_TD = rows.quantize(x_TD)
    if isinstance(x_TD, QuantizedTokens):
        assert isinstance(weight_FD, QuantizedWeight)
        try:
            made = fp8_cuda.product(x_TD, weight_FD)
        except NotImplementedError:
            made = quantized.product(x_TD, weight_FD)
    elif parts > 1 and not isinstance(weight_FD, QuantizedWeight):
        made = Product(partial_sums(x_TD, weight_FD, parts, dtype_of(x_TD)), None, None, x_TD.dtype)
    else:
        # Not float32 that is rounded afterwards: XLA may write a large result to memory first, which costs a step of
        # 8,192 tokens on an H200 5 %.
        made = Product.of(matmul(x_TD, weight_FD, x_TD.dtype))
    return made if bias_F is None else Product.of(made.finish() + bias_F)


def multiplies_e4m3(x_TD: jax.Array | jax.ShapeDtypeStruct, weight_FD: Weight) -> bool:
    """Whether the product takes activations as e4m3 numbers."""
    if not isinstance(weight_FD, QuantizedWeight):
        return False
    if fp8_cuda.is_chosen(x_TD, weight_FD):
        return not fp8_cuda.is_wide(x_TD.size // x_TD.shape[-1], x_TD.shape[-1])
    return quantized.multiplies_e4m3(x_TD, weight_FD)


def scales(x_TD: jax.Array | jax.ShapeDtypeStruct, weight_FD: Weight, activation: str | None) -> bool:
    """Whether the product without a bias is of those that make the norms between them: it takes `ScaledTokens`, and
    without an activation adds to a residual by `add_scaled`.
    """
    if isinstance(weight_FD, QuantizedWeight) or packed.is_packed(weight_FD):
        return False
    if activation is not None and takes_blocks(x_TD, weight_FD, activation):
        return narrow_cuda.norms_of(x_TD.shape[0])
    return narrow_cuda.scales(x_TD, weight_FD, gated=activation is not None)


add_scaled = narrow_cuda.add_scaled


def takes_blocks(x_TD: jax.Array | jax.ShapeDtypeStruct, weight_FD: Weight, activation: str) -> bool:
    """Whether `gated` without a bias is fastest with such activations as `BlockedTokens`."""
    if isinstance(weight_FD, QuantizedWeight) or packed.is_packed(weight_FD):
        return False
    try:
        wide_cuda.choose(x_TD, weight_FD, activation)
    except NotImplementedError:
        return False
    return True


def num_rows(weight_FD: Weight) -> int:
    """F of a plain, packed or quantised weight."""
    return weight_FD.shape[0] * (ROWS if packed.is_packed(weight_FD) else 1)


def take_rows(weight_FD: jax.Array, ids_T: jax.Array) -> jax.Array:
    """Rows of a plain or packed weight, `[T, D]`; ids must be in range."""
    return packed.take_rows(weight_FD, ids_T) if packed.is_packed(weight_FD) else weight_FD[ids_T]
