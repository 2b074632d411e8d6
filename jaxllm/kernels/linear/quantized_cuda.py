"""Products of few tokens with quantised weights on a Hopper GPU: the kernel of `cuda` widens values in registers.

XLA reads such weights at less than half of the memory's speed, so that the kernel is used wherever it can be. It is not
for weights in e4m3 and activations in bfloat16: these are quantised, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.formats import Format
from jaxllm.kernels.cuda import call
from jaxllm.kernels.linear import cuda, quantized, reference
from jaxllm.kernels.linear.quantized import QuantizedWeight, quantize
from jaxllm.kernels.linear.reference import Norm

KERNEL = "skinny_gemm_quantized"
"""The name by which it is turned off apart from the kernel for bfloat16."""

Operands = tuple[jax.Array, QuantizedWeight, jax.Array | None, jax.Array | None]


def linear(
    x_TD: jax.Array,
    weight: QuantizedWeight,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: jax.Array | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """See `api.linear`; the result in `dtype`, bfloat16 or float32. Raises NotImplementedError where XLA must do it."""
    if residual is not None and residual.dtype != x_TD.dtype:
        raise NotImplementedError("a residual of another dtype")
    dtype = x_TD.dtype if dtype is None else dtype
    norm_D, eps = (None, None) if norm is None else norm
    run = choose(x_TD, weight, eps=eps, activation=activation, residual=residual is not None, out_dtype=dtype)

    def kernel(operands: Operands) -> jax.Array:
        x, weight, norm_D, residual = operands
        return run(x, weight.values, weight.scale.reshape(-1), norm_D, residual)

    def composed(operands: Operands) -> jax.Array:
        x, weight, norm_D, residual = operands
        norm = None if norm_D is None or eps is None else (norm_D, eps)
        product = partial(_as, dtype)
        return reference.linear(x, weight, norm=norm, activation=activation, residual=residual, matmul=product)

    operands: Operands = (x_TD, weight, norm_D, residual)
    return lax.platform_dependent(operands, cuda=kernel, default=composed)


def choose(x_TD: jax.Array | jax.ShapeDtypeStruct, weight: QuantizedWeight, **around: Any) -> Callable[..., jax.Array]:
    """The kernel, see `cuda.implementation`. Raises NotImplementedError where XLA must do the work."""
    call.require(cuda.KERNEL)
    call.require(KERNEL)
    if weight.format.group is not None or weight.zero is not None or quantized.multiplies_e4m3(x_TD, weight):
        raise NotImplementedError("only one scale for each row, and activations as they are")
    return cuda.implementation(x_TD, weight.values, **around)


def _as(dtype: jax.typing.DTypeLike, x: jax.Array, weight: QuantizedWeight, _: jax.typing.DTypeLike) -> jax.Array:
    return quantized.matmul(x, weight, dtype)


def matmul(x: jax.Array, weight: QuantizedWeight, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """See `api.matmul`. Raises NotImplementedError where XLA must do it."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"results in {dtype}")
    return linear(x.reshape(-1, x.shape[-1]), weight, dtype=dtype).reshape(*x.shape[:-1], -1)


def check() -> None:
    """Raises ArithmeticError if the kernel is wrong on a small input; to be run on a GPU."""
    rng = np.random.default_rng(0)
    for T, F, D in ((3, 64, 1024), (9, 128, 576)):
        wide, x, residual = (
            jnp.asarray(rng.standard_normal(shape) / 8, jnp.bfloat16) for shape in ((F, D), (T, D), (T, F // 2))
        )
        weight = quantize(wide, Format("int8"))
        norm_D = jnp.asarray(rng.uniform(0.5, 1.5, D), jnp.float32)

        def mlp(x: jax.Array, weight: QuantizedWeight, norm_D: jax.Array, residual: jax.Array) -> jax.Array:
            return linear(x, weight, norm=(norm_D, 1e-5), activation="silu", residual=residual)

        found = jax.jit(mlp)(x, weight, norm_D, residual)
        wanted = reference.linear(
            x, weight, norm=(norm_D, 1e-5), activation="silu", residual=residual, matmul=quantized.matmul
        )
        error = float(jnp.abs(found.astype(jnp.float32) - wanted.astype(jnp.float32)).max())
        if not error < 0.03 * float(jnp.abs(wanted).max()):
            raise ArithmeticError(f"{KERNEL} is wrong by {error:.1e} with int8 weights")
