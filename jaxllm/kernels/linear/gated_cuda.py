"""act(gate) * up of products of many tokens with a large matrix of bfloat16 on a Hopper GPU, by `cuda/gated_gemm.cu`:
tiles of a ring of copies by the tensor memory accelerator, so that gate and up are never written to memory.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.kernels.cuda import call
from jaxllm.kernels.linear import reference
from jaxllm.kernels.linear.reference import Norm

KERNEL = "gated_gemm"
ROWS, COLUMNS = 128, 256
"""Of a tile: tokens, and rows of the weight, half of the gate and half of up."""
CLUSTER = 2
STAGES = 4
THREADS = 384
MAP_WORDS = 2 * 32
"""Of the tensor maps that a block of threads makes: of tokens and of the weight."""
ACTIVATIONS = {"silu": 1, "gelu_tanh": 2}
FEWEST = 1024
"""Tokens from which on tiles fill the multiprocessors several times over, for weights of FEATURES rows."""
FEATURES = 8192

USED = False
"""Whether it is used where it is not asked for by name (`call.asked_for`): it was not measured yet."""


def is_used() -> bool:
    """Whether any product may use it."""
    return USED or call.asked_for(KERNEL)


def implementation(
    weight_FD: jax.Array | jax.ShapeDtypeStruct, activation: str, *, stacked: bool = True, stages: int = STAGES
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The kernel for such weights and any number of tokens, a function of (x, weight) in a program for a Hopper GPU.

    It computes what `api.gated` does, [T, F / 2]. Sums are float32, and rounded once. A token's result does not depend
    on the others. stacked: a cluster has two tiles of tokens by the same rows of the weight, not one by twice as many.

    Raises NotImplementedError where there is no kernel for these shapes and dtypes, or NVRTC refused it.
    """
    F, D = weight_FD.shape
    if weight_FD.dtype != jnp.bfloat16:
        raise NotImplementedError(f"{weight_FD.dtype} weights")
    if activation not in ACTIVATIONS or D % 64 or D < 128 or F % (COLUMNS if stacked else COLUMNS * CLUSTER):
        raise NotImplementedError(f"activation {activation} of {F} features of {D} inputs")
    macros = {
        "OUT_FEATURES": F // 2, "INPUTS": D, "CLUSTER": CLUSTER, "STACKED": int(stacked), "STAGES": stages,
        "GATED": ACTIVATIONS[activation], "SHARED": call.MAX_SHARED,
    }  # fmt: skip
    ptx = call.compile_or_refuse(KERNEL, KERNEL, macros)

    def run(x_TD: jax.Array, weight_FD: jax.Array) -> jax.Array:
        T = len(x_TD)
        tiles = -(-T // ROWS) * (F // COLUMNS)
        grid = min(call.SMS, -(-tiles // CLUSTER) * CLUSTER)
        results = [jax.ShapeDtypeStruct((T, F // 2), jnp.bfloat16), jax.ShapeDtypeStruct((grid, MAP_WORDS), jnp.int32)]
        arguments = [x_TD, weight_FD, jnp.asarray([T], jnp.int32)]
        return call.launch(KERNEL, ptx, arguments, results, grid=(grid,), threads=THREADS, shared=call.MAX_SHARED)[0]

    return run


def gated(x_TD: jax.Array, weight_FD: jax.Array, activation: str, norm: Norm | None = None) -> jax.Array:
    """See `api.gated`. Raises NotImplementedError where others must do it, or were not found to be slower."""
    if not is_used():
        raise NotImplementedError("it was not asked for")
    call.require(KERNEL)
    T, F = x_TD.shape[0], weight_FD.shape[0]
    if x_TD.dtype != jnp.bfloat16 or weight_FD.ndim != 2 or T < FEWEST or F < FEATURES:
        raise NotImplementedError(f"{T} tokens in {x_TD.dtype} and {F} features")
    run = implementation(weight_FD, activation)

    def composed(x_TD: jax.Array, weight_FD: jax.Array) -> jax.Array:
        return reference.linear(x_TD, weight_FD, activation=activation)

    x_TD = x_TD if norm is None else reference.rms_norm(x_TD, norm)
    return lax.platform_dependent(x_TD, weight_FD, cuda=run, default=composed)


def check() -> None:
    """Raises ArithmeticError if the kernel is wrong on a small input; to be run on a GPU."""
    rng = np.random.default_rng(0)
    for T, F, D in ((300, 2 * COLUMNS, 1024), (1000, 80 * COLUMNS, 192)):
        x, weight = (jnp.asarray(rng.standard_normal(shape) / 8, jnp.bfloat16) for shape in ((T, D), (F, D)))
        out = jax.jit(implementation(weight, "silu"))(x, weight)
        wanted = reference.linear(x, weight, activation="silu")
        error = float(jnp.abs(out.astype(jnp.float32) - wanted.astype(jnp.float32)).max())
        if not error < 0.03 * float(jnp.abs(wanted).max()):
            raise ArithmeticError(f"{KERNEL} is wrong by {error:.1e} at T={T} F={F} D={D}")
