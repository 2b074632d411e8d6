"""Experts of many tokens each on a Hopper GPU, by `cuda/grouped_tiles.cu`: tiles of 128 tokens, on wgmma."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxllm.kernels.cuda import call
from jaxllm.kernels.grouped_matmul import cuda

KERNEL = "grouped_tiles"
ROWS = 128
"""Pairs of a tile."""
MEAN = 8
"""Tokens that an expert can expect, from which tiles are better.

Measured on an H200 with the shapes of Qwen3-30B-A3B, in shares of the time that reading the weights takes: 81 % at 16
tokens and 78 % at 32, where `cuda` has 81 % at 4 and 55 % at 16; and 57 % of the speed of matrix products at 512."""
STAGES, LAG = 4, 2
STAGE_BYTES = (128 + 256) * 64 * 2
WIDTH, DEPTH = 256, 64
"""Rows of the weight and inputs that a tile and a step have."""


def product(
    pairs: int, shared_by: int, weight_EFD: jax.Array | jax.ShapeDtypeStruct, *, activation: str | None = None
) -> cuda.Kernel:
    """As `cuda.product`, for lists of ROWS columns."""
    E, F, D = weight_EFD.shape
    if F % WIDTH or D % DEPTH:
        raise NotImplementedError(f"{F} features of {D} inputs")
    macros = {
        "PAIRS": pairs, "EXPERTS": E, "SHARED_BY": shared_by, "FEATURES": F, "INPUTS": D,
        "GATED": cuda.ACTIVATIONS[activation], "RECORDS": cuda.records(pairs, E, ROWS), "STAGES": STAGES, "LAG": LAG,
    }  # fmt: skip
    ptx = call.compile_or_refuse(KERNEL, KERNEL, macros)
    result = jax.ShapeDtypeStruct((pairs, F // 2 if activation else F), jnp.bfloat16)
    shared = STAGES * (STAGE_BYTES + 16)

    def run(x: jax.Array, weight_EFD: jax.Array, work: jax.Array) -> jax.Array:
        arguments = [x, weight_EFD, work]
        return call.launch(KERNEL, ptx, arguments, [result], grid=(call.SMS,), threads=384, shared=shared)[0]

    return run


def choose(
    x_TD: jax.Array | jax.ShapeDtypeStruct,
    chosen_TX: jax.Array | jax.ShapeDtypeStruct,
    gate_up_EFD: jax.Array | jax.ShapeDtypeStruct,
    down_EDF: jax.Array | jax.ShapeDtypeStruct,
    *,
    activation: str,
    of: int,
) -> Callable[..., jax.Array]:
    """See `api.PLATFORMS`."""
    call.require(KERNEL)
    if x_TD.shape[0] * chosen_TX.shape[1] < MEAN * of:
        raise NotImplementedError("few tokens for each expert")
    return implementation(x_TD, chosen_TX, gate_up_EFD, down_EDF, activation=activation, of=of)


def implementation(
    x_TD: jax.Array | jax.ShapeDtypeStruct,
    chosen_TX: jax.Array | jax.ShapeDtypeStruct,
    gate_up_EFD: jax.Array | jax.ShapeDtypeStruct,
    down_EDF: jax.Array | jax.ShapeDtypeStruct,
    *,
    activation: str,
    of: int,
) -> Callable[..., jax.Array]:
    """As `cuda.implementation`."""
    (T, D), X, E = x_TD.shape, chosen_TX.shape[1], down_EDF.shape[0]
    if any(a.dtype != jnp.bfloat16 for a in (x_TD, gate_up_EFD, down_EDF)) or activation not in cuda.ACTIVATIONS:
        raise NotImplementedError(f"{gate_up_EFD.dtype} weights, {x_TD.dtype} activations and {activation}")
    up = product(T * X, X, gate_up_EFD, activation=activation)
    down = product(T * X, 1, down_EDF)
    list_work = cuda.make_list(T * X, E, ROWS)

    def run(
        x_TD: jax.Array, chosen_TX: jax.Array, weights_TX: jax.Array, gate_up_EFD: jax.Array, down_EDF: jax.Array
    ) -> jax.Array:
        work = list_work(chosen_TX)
        y_TXD = down(up(x_TD, gate_up_EFD, work), down_EDF, work).reshape(T, X, D)
        return cuda.weighted(y_TXD, chosen_TX, weights_TX, E)

    return run


def check() -> None:
    """Raises ArithmeticError if the kernel is wrong on a small input; to be run on a GPU."""
    cuda.compare(KERNEL, implementation, ((300, 2, 3, 512, 128), (150, 1, 4, 256, 384)))
