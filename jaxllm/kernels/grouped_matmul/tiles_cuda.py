"""Experts of many tokens each on a Hopper GPU, by `cuda/grouped_tiles.cu`: tiles of 128 tokens, on wgmma."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxllm.formats import Format
from jaxllm.kernels.cuda import call
from jaxllm.kernels.grouped_matmul import cuda
from jaxllm.kernels.linear.quantized import QuantizedWeight, Weight
from jaxllm.kernels.rows import api as rows

KERNEL = "grouped_tiles"
QUANTIZED = "grouped_tiles_quantized"
"""The name by which it is turned off for weights in e4m3 only."""
ROWS = 128
"""Pairs of a tile."""
MEAN = 8
"""Tokens that an expert can expect, from which tiles are better.

Measured on an H200 with the shapes of Qwen3-30B-A3B, in shares of the time that reading the weights takes: 81 % at 16
tokens and 78 % at 32, where `cuda` has 81 % at 4 and 55 % at 16; and 57 % of the speed of matrix products at 512."""
STAGES, LAG = 4, 2
WIDTH, NARROW = 256, 128
"""Rows of the weight that a tile has; and where groups of inputs have scales, which take registers for more sums."""
STEP = 128
"""Bytes of a row that a step has."""


def product(
    pairs: int, shared_by: int, weight_EFD: Weight | jax.ShapeDtypeStruct, *, activation: str | None = None
) -> Callable[[jax.Array, Weight, jax.Array], jax.Array]:
    """As `cuda.product`, for lists of ROWS columns. With a weight in e4m3, activations are rounded to it, too."""
    (E, F, D), values = weight_EFD.shape, cuda.Values.of(weight_EFD)
    width = NARROW if values.group else WIDTH
    if F % width or D * values.itemsize % STEP or (values.group and values.group % STEP and STEP % values.group):
        raise NotImplementedError(f"{F} features of {D} inputs in {values}")
    stage = (ROWS + width) * STEP
    scales = max(1, STEP // values.group) * width * 4 if values.group else 0
    stages = call.MAX_SHARED // (stage + scales + 16) if values.group else STAGES
    macros = {
        "PAIRS": pairs, "EXPERTS": E, "SHARED_BY": shared_by, "FEATURES": F, "INPUTS": D,
        "WEIGHT": int(values.itemsize == 1), "SCALED_BY": values.group or 0, "BLOCK_N": width,
        "GATED": cuda.ACTIVATIONS[activation], "RECORDS": cuda.records(pairs, E, ROWS), "STAGES": stages, "LAG": LAG,
    }  # fmt: skip
    ptx = call.compile_or_refuse(KERNEL, KERNEL, macros)
    result = jax.ShapeDtypeStruct((pairs, F // 2 if activation else F), jnp.bfloat16)
    shared = stages * (stage + scales + 16)

    def run(x: jax.Array, weight_EFD: Weight, work: jax.Array) -> jax.Array:
        x_scale = x
        if values.itemsize == 1:
            tokens = rows.quantize(x)
            x, x_scale = tokens.values, tokens.scale
        arguments = [x, *cuda.arrays(weight_EFD), x_scale, work]
        return call.launch(KERNEL, ptx, arguments, [result], grid=(call.SMS,), threads=384, shared=shared)[0]

    return run


def choose(
    x_TD: jax.Array | jax.ShapeDtypeStruct,
    chosen_TX: jax.Array | jax.ShapeDtypeStruct,
    gate_up_EFD: Weight | jax.ShapeDtypeStruct,
    down_EDF: Weight | jax.ShapeDtypeStruct,
    *,
    activation: str,
    of: int,
) -> Callable[..., jax.Array]:
    """See `api.PLATFORMS`."""
    call.require(KERNEL)
    if isinstance(gate_up_EFD, QuantizedWeight):
        call.require(QUANTIZED)
    if x_TD.shape[0] * chosen_TX.shape[1] < MEAN * of:
        raise NotImplementedError("few tokens for each expert")
    return implementation(x_TD, chosen_TX, gate_up_EFD, down_EDF, activation=activation, of=of)


def implementation(
    x_TD: jax.Array | jax.ShapeDtypeStruct,
    chosen_TX: jax.Array | jax.ShapeDtypeStruct,
    gate_up_EFD: Weight | jax.ShapeDtypeStruct,
    down_EDF: Weight | jax.ShapeDtypeStruct,
    *,
    activation: str,
    of: int,
) -> Callable[..., jax.Array]:
    """As `cuda.implementation`."""
    (T, D), X, E = x_TD.shape, chosen_TX.shape[1], down_EDF.shape[0]
    if x_TD.dtype != jnp.bfloat16 or activation not in cuda.ACTIVATIONS:
        raise NotImplementedError(f"{x_TD.dtype} activations and {activation}")
    up = product(T * X, X, gate_up_EFD, activation=activation)
    down = product(T * X, 1, down_EDF)
    list_work = cuda.make_list(T * X, E, ROWS)

    def run(
        x_TD: jax.Array, chosen_TX: jax.Array, weights_TX: jax.Array, gate_up_EFD: Weight, down_EDF: Weight
    ) -> jax.Array:
        work = list_work(chosen_TX)
        y_TXD = down(up(x_TD, gate_up_EFD, work), down_EDF, work).reshape(T, X, D)
        return cuda.weighted(y_TXD, chosen_TX, weights_TX, E, of)

    return run


def check() -> None:
    """Raises ArithmeticError if the kernel is wrong on a small input; to be run on a GPU."""
    cuda.compare(KERNEL, implementation, ((300, 2, 3, 512, 128), (150, 1, 4, 256, 384)))


def check_quantized() -> None:
    """The same of weights in e4m3. Activations that are rounded twice make 4 % of the norm."""
    for format in (Format("fp8"), Format("fp8", group=128)):
        cuda.compare(QUANTIZED, implementation, ((300, 2, 3, 512, 128),), format, tolerance=0.08)
