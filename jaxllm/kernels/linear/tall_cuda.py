"""act(gate) * up of products of many tokens with a large matrix of bfloat16 on a Hopper GPU, by `cuda/tall_gemm.cu`:
tiles of a ring of copies by the tensor memory accelerator; gate and up are never written to memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.kernels.cuda import call
from jaxllm.kernels.linear import reference
from jaxllm.kernels.linear.quantized import QuantizedWeight, Weight
from jaxllm.kernels.linear.reference import Norm

KERNEL = "tall_gemm"
"""Measured on an H200 (jax 0.11.2): a prompt of 8,000 tokens of Llama-3.1-8B runs at 40,605 tokens/s with it, and at
39,895 with cuBLAS and XLA's gate. Products without a gate won nothing by it: the chip's power bounds all of them. In
long runs a product of 8,064 tokens takes 2,818 us, with one warpgroup two stages behind the other 2,838, by clusters of
four 4,481."""
ROWS, COLUMNS = 128, 256
"""Of a tile: tokens, and rows of the weight, half of the gate and half of up."""
CLUSTER = 2
"""Blocks that share copies of the weight."""
CLUSTERS = call.SMS // 2
"""As many of them are on the chip at once."""
ACROSS = 8
"""Clusters' tiles of tokens that are done side by side."""
STAGES = 4
THREADS = 384
MAP_WORDS = 2 * 32
"""Of the tensor maps that a block of threads makes: of tokens and of the weight."""
ACTIVATIONS = {"silu": 1, "gelu_tanh": 2}
FEWEST = 1024
"""Tokens from which on it may be used."""
ROUNDS, FULL = 3, 0.93
"""How often tiles go over the multiprocessors, at least, and how full these are on average."""


def implementation(
    weight_FD: jax.Array | jax.ShapeDtypeStruct, activation: str
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The kernel for such weights and any number of tokens, a function of (x, weight) in a program for a Hopper GPU.

    It computes what `api.gated` does, [T, F / 2]. Sums are float32, and rounded once. A token's result does not depend
    on the others.

    Raises NotImplementedError where there is no kernel for these shapes and dtypes, or NVRTC refused it.
    """
    F, D = weight_FD.shape
    if weight_FD.dtype != jnp.bfloat16:
        raise NotImplementedError(f"{weight_FD.dtype} weights")
    steps = D // 64
    if activation not in ACTIVATIONS or D % 64 or steps < 2 or F % COLUMNS:
        raise NotImplementedError(f"activation {activation} of {F} features of {D} inputs")
    macros = {
        "OUT_FEATURES": F // 2, "INPUTS": D, "CLUSTER": CLUSTER, "ACROSS": ACROSS, "STAGES": STAGES,
        "GATED": ACTIVATIONS[activation], "SHARED": call.MAX_SHARED,
    }  # fmt: skip
    ptx = call.compile_or_refuse(KERNEL, KERNEL, macros)

    def run(x_TD: jax.Array, weight_FD: jax.Array) -> jax.Array:
        T = len(x_TD)
        tiles = -(-T // ROWS) * (F // COLUMNS)
        grid = min(CLUSTERS, -(-tiles // CLUSTER)) * CLUSTER
        maps = jax.ShapeDtypeStruct((grid, MAP_WORDS), jnp.int32)
        out, _ = call.launch(
            KERNEL,
            ptx,
            [x_TD, weight_FD, jnp.asarray([T], jnp.int32)],
            [jax.ShapeDtypeStruct((T, F // 2), jnp.bfloat16), maps],
            grid=(grid,),
            threads=THREADS,
            shared=call.MAX_SHARED,
        )
        return out

    return run


def gated(x_TD: jax.Array, weight_FD: Weight, activation: str, norm: Norm | None = None) -> jax.Array:
    """See `api.gated`. Raises NotImplementedError where others must do it, or are expected to be faster."""
    call.require(KERNEL)
    if isinstance(weight_FD, QuantizedWeight) or weight_FD.ndim != 2 or x_TD.dtype != jnp.bfloat16 or x_TD.ndim != 2:
        raise NotImplementedError(f"{x_TD.ndim} axes of {x_TD.dtype}, and weights that are not plain")
    T, F = x_TD.shape[0], weight_FD.shape[0]
    rounds = math.ceil(-(-T // (CLUSTER * ROWS)) * (F // COLUMNS) / CLUSTERS)
    share = T * F / (max(rounds, 1) * CLUSTERS * CLUSTER * ROWS * COLUMNS)  # of the tiles that there is time for
    if T < FEWEST or rounds < ROUNDS or share < FULL:
        raise NotImplementedError(f"{T} tokens and {F} features")
    run = implementation(weight_FD, activation)
    x_TD = x_TD if norm is None else reference.rms_norm(x_TD, norm)

    def composed(x_TD: jax.Array, weight_FD: jax.Array) -> jax.Array:
        return reference.linear(x_TD, weight_FD, activation=activation)

    return lax.platform_dependent(x_TD, weight_FD, cuda=run, default=composed)


def check() -> None:
    """Raises ArithmeticError if the kernel is wrong on small inputs; to be run on a GPU."""
    rng = np.random.default_rng(0)
    for T, F, D in ((300, 2 * COLUMNS, 1024), (1000, 80 * COLUMNS, 320)):
        x, weight = (jnp.asarray(rng.standard_normal(shape) / 8, jnp.bfloat16) for shape in ((T, D), (F, D)))
        out = jax.jit(implementation(weight, "silu"))(x, weight)
        wanted = reference.linear(x, weight, activation="silu")
        error = float(jnp.abs(out.astype(jnp.float32) - wanted.astype(jnp.float32)).max())
        if not error < 0.03 * float(jnp.abs(wanted).max()):
            raise ArithmeticError(f"{KERNEL} is wrong by {error:.1e} at T={T} F={F} D={D}")
