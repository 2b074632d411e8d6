"""Products of many tokens with a large matrix of bfloat16 on a Hopper GPU, by `cuda/tall_gemm.cu`: tiles of a ring of
copies by the tensor memory accelerator. act(gate) * up is made of sums in registers: gate and up are never written.
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

SOURCE = "tall_gemm"
PLAIN, GATED = "tall_gemm", "tall_gated"
"""Names for `call`, of products as they are (and with a residual), and of those with an activation."""
USED = frozenset({GATED})
"""What is used where it is not asked for by name (`call.asked_for`).

Measured on an H200 (jax 0.11.2): a prompt of 8,000 tokens of Llama-3.1-8B runs at 40,605 tokens/s with gated products
of this kernel, and at 39,895 with cuBLAS and XLA's gate. The others were not measured."""
ROWS, COLUMNS = 128, 256
"""Of a tile: tokens, and rows of the weight, half of the gate and half of up."""
CLUSTERS = {2: call.SMS // 2, 4: 32}
"""Clusters of so many blocks that are on the chip at once."""
STAGES = 4
THREADS = 384
MAP_WORDS = 2 * 32
"""Of the tensor maps that a block of threads makes: of tokens and of the weight."""
ACTIVATIONS = {None: 0, "silu": 1, "gelu_tanh": 2}
FEWEST = 1024
"""Tokens from which on it may be used."""
ROUNDS, FULL = 3, 0.93
"""How often tiles go over the multiprocessors, at least, and how full these are on average."""

Kernel = Callable[[jax.Array, jax.Array, "jax.Array | None"], jax.Array]
"""(x, weight, residual or None) -> the result."""


def is_used(kernel: str) -> bool:
    """Whether any product may use it."""
    return kernel in USED or call.asked_for(kernel)


def implementation(
    weight_FD: jax.Array | jax.ShapeDtypeStruct,
    activation: str | None = None,
    *,
    residual: bool = False,
    lag: int = 0,
    cluster: int = 2,
    across: int = 8,
) -> Kernel:
    """The kernel for such weights and any number of tokens, in a program for an H100 or H200.

    It computes what `api.linear` does, [T, F], or [T, F / 2] with an activation. Sums are float32, and rounded once. A
    token's result does not depend on the others.

    Args:
      lag: stages by which one warpgroup is behind the other.
      cluster: blocks that share copies. across: clusters' tiles of tokens that are done side by side.

    Raises NotImplementedError where there is no kernel for these shapes and dtypes, or NVRTC refused it.
    """
    F, D = weight_FD.shape
    if weight_FD.dtype != jnp.bfloat16:
        raise NotImplementedError(f"{weight_FD.dtype} weights")
    if activation not in ACTIVATIONS or (residual and activation is not None):
        raise NotImplementedError(f"activation {activation}, residual {residual}")
    steps = D // 64
    if D % 64 or steps < lag + 2 or F % COLUMNS:
        raise NotImplementedError(f"{F} features of {D} inputs")
    features = F if activation is None else F // 2
    macros = {
        "OUT_FEATURES": features, "INPUTS": D, "CLUSTER": cluster, "ACROSS": across,
        "STAGES": STAGES, "LAG": lag, "GATED": ACTIVATIONS[activation], "RESIDUAL": int(residual),
        "SHARED": call.MAX_SHARED,
    }  # fmt: skip
    ptx = call.compile_or_refuse(GATED if activation else PLAIN, SOURCE, macros)

    def run(x_TD: jax.Array, weight_FD: jax.Array, residual_TF: jax.Array | None = None) -> jax.Array:
        T = len(x_TD)
        tiles = -(-T // ROWS) * (F // COLUMNS)
        grid = min(CLUSTERS[cluster], -(-tiles // cluster)) * cluster
        maps = jax.ShapeDtypeStruct((grid, MAP_WORDS), jnp.int32)
        # What the kernel does not read must still be a pointer.
        arguments = [x_TD, weight_FD, jnp.asarray([T], jnp.int32), x_TD if residual_TF is None else residual_TF]
        out, _ = call.launch(
            SOURCE,
            ptx,
            arguments,
            [jax.ShapeDtypeStruct((T, features), jnp.bfloat16), maps],
            grid=(grid,),
            threads=THREADS,
            shared=call.MAX_SHARED,
        )
        return out

    return run


def linear(
    x_TD: jax.Array,
    weight_FD: Weight,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual_TF: jax.Array | None = None,
) -> jax.Array:
    """See `api.linear`. Raises NotImplementedError where others must do it, or were not found to be slower."""
    kernel = PLAIN if activation is None else GATED
    if not is_used(kernel):
        raise NotImplementedError(f"{kernel} was not asked for")
    call.require(kernel)
    if isinstance(weight_FD, QuantizedWeight) or weight_FD.ndim != 2 or x_TD.dtype != jnp.bfloat16 or x_TD.ndim != 2:
        raise NotImplementedError(f"{x_TD.ndim} axes of {x_TD.dtype}, and weights that are not plain")
    T, F = x_TD.shape[0], weight_FD.shape[0]
    rounds = math.ceil(-(-T // (2 * ROWS)) * (F // COLUMNS) / CLUSTERS[2])
    share = T * F / (rounds * call.SMS * ROWS * COLUMNS)  # of the tiles that there is time for
    if T < FEWEST or rounds < ROUNDS or share < FULL:
        raise NotImplementedError(f"{T} tokens and {F} features")
    run = implementation(weight_FD, activation, residual=residual_TF is not None)
    x_TD = x_TD if norm is None else reference.rms_norm(x_TD, norm)

    def composed(x_TD: jax.Array, weight_FD: jax.Array, residual_TF: jax.Array | None) -> jax.Array:
        return reference.linear(x_TD, weight_FD, activation=activation, residual=residual_TF)

    return lax.platform_dependent(x_TD, weight_FD, residual_TF, cuda=run, default=composed)


def check(kernel: str) -> None:
    """Raises ArithmeticError if the kernel is wrong on small inputs; to be run on a GPU."""
    rng = np.random.default_rng(0)
    for T, F, D in ((300, 2 * COLUMNS, 1024), (1000, 80 * COLUMNS, 320)):
        x, weight = (jnp.asarray(rng.standard_normal(shape) / 8, jnp.bfloat16) for shape in ((T, D), (F, D)))
        residual = None if kernel == GATED else jnp.asarray(rng.standard_normal((T, F)), jnp.bfloat16)
        activation = "silu" if kernel == GATED else None
        out = jax.jit(implementation(weight, activation, residual=residual is not None))(x, weight, residual)
        wanted = reference.linear(x, weight, activation=activation, residual=residual)
        error = float(jnp.abs(out.astype(jnp.float32) - wanted.astype(jnp.float32)).max())
        if not error < 0.03 * float(jnp.abs(wanted).max()):
            raise ArithmeticError(f"{kernel} is wrong by {error:.1e} at T={T} F={F} D={D}")
