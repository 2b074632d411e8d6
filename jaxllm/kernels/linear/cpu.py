"""Matrix products on the CPU by `native/linear.cc`: weights are read once, at the speed of memory.

A token's result does not depend on how many others are in the batch, to the last bit.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.kernels.linear import reference
from jaxllm.kernels.native import build

MAX_TOKENS = 128
"""Measured on two cores with AVX-512: at 128 tokens as fast as XLA, at 256 5% slower."""


def matmul(x: jax.Array, weight_FD: jax.Array) -> jax.Array:
    """See `api.matmul`. Raises NotImplementedError where XLA must do it."""
    tokens = math.prod(x.shape[:-1])
    if x.dtype != jnp.float32 or weight_FD.dtype != jnp.float32:
        raise NotImplementedError("only float32")
    if not 0 < tokens <= MAX_TOKENS:
        raise NotImplementedError(f"{tokens} tokens, and at most {MAX_TOKENS} were measured")
    if not build.available("linear", check):
        raise NotImplementedError("no native kernel")
    # The program may be lowered for a GPU in a process whose default backend is a CPU (ahead-of-time compilation): what
    # it is lowered for decides.
    return lax.platform_dependent(x, weight_FD, cpu=_native, default=reference.matmul)


def _native(x: jax.Array, weight_FD: jax.Array) -> jax.Array:
    tokens, (F, D) = math.prod(x.shape[:-1]), weight_FD.shape
    call = jax.ffi.ffi_call("jaxllm_linear", jax.ShapeDtypeStruct((tokens, F), jnp.float32))
    return call(x.reshape(tokens, D), weight_FD).reshape(*x.shape[:-1], F)


def check(target: str) -> None:
    """Raises ArithmeticError if the kernel is wrong on a small input."""
    rng = np.random.default_rng(0)
    for T, D, F in ((1, 37, 35), (37, 300, 50)):
        x, weight = rng.standard_normal((T, D), np.float32), rng.standard_normal((F, D), np.float32)
        out = np.asarray(jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((T, F), jnp.float32))(x, weight))
        error = np.abs(out - x.astype(np.float64) @ weight.T.astype(np.float64)).max()
        if not error < 1e-4:
            raise ArithmeticError(f"{target} is wrong by {error:.1e} at T={T} D={D} F={F}")
