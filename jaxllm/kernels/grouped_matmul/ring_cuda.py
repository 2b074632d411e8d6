"""Experts of few tokens each on a Hopper GPU, by `cuda/grouped_ring.cu`: blocks that stay, and copy all the time.

Measured on an H200 with the shapes of Qwen3-30B-A3B, in shares of the time that reading the active experts takes: 65 %
at 1 token, 90 % at 16 and at 64, where `cuda` has 53, 85 and 81 %; Mixtral-8x7B at 16 tokens 95 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxllm.formats import Format
from jaxllm.kernels.cuda import call
from jaxllm.kernels.grouped_matmul import cuda
from jaxllm.kernels.linear.quantized import QuantizedWeight, Weight

KERNEL = "grouped_ring"
QUANTIZED = "grouped_ring_quantized"
"""The name by which it is turned off for weights in e4m3 only."""
LINE = 128
"""Bytes of a row that a warp copies at a time."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the work is split; see the kernel."""

    ms: int
    ns: int
    warps: int
    stages: int
    blocks: int

    def shared(self, values: cuda.Values = cuda.WIDE) -> int:
        """Bytes of shared memory."""
        rows, columns = self.ms * 16, self.ns * 8
        scales = 0 if values.group is None else rows * 4 * (2 if values.group == LINE // 2 else 1)
        stage = rows * LINE + columns * LINE * 2 // values.itemsize + scales
        return self.warps * self.stages * stage + 2 * 4 * (self.warps * columns * (rows + 4) + columns)


def tiling(inputs: int, values: cuda.Values = cuda.WIDE, tokens: int = 1) -> Tiling:
    """A good split for 8 columns: two blocks on a multiprocessor, with as many stages as fit."""
    lines, ms = inputs * values.itemsize // LINE, 1
    counts: tuple[int, ...] = (8, 6, 4)
    if values.itemsize == 1 and tokens > 1:  # a line of x is twice one of the weight: for more rows of that
        ms, counts = 2, (4, 3)
    warps = next((warps for warps in counts if lines % warps == 0), counts[0])
    options = [Tiling(ms, 1, warps, stages, 2) for stages in range(8, 1, -1)]
    room = call.MAX_SHARED // 2 - 1024
    return next(option for option in options if option.shared(values) <= room or option.stages == 2)


def product(
    pairs: int,
    shared_by: int,
    weight_EFD: Weight | jax.ShapeDtypeStruct,
    split: Tiling,
    *,
    listed: bool,
    activation: str | None = None,
) -> Callable[[jax.Array, Weight, jax.Array], jax.Array]:
    """As `cuda.product`; what is not listed is the choice of one token."""
    (E, F, D), values = weight_EFD.shape, cuda.Values.of(weight_EFD)
    if D * values.itemsize % LINE or (values.group and values.group != LINE // 2 and values.group % LINE):
        raise NotImplementedError(f"{D} inputs in {values}")
    macros = {
        "EXPERTS": E, "SHARED_BY": shared_by, "FEATURES": F, "INPUTS": D, "GATED": cuda.ACTIVATIONS[activation],
        "WEIGHT": int(values.itemsize == 1), "SCALED_BY": values.group or 0,
        "LIST": int(listed), "RECORDS": cuda.records(pairs, E, split.ns * 8) if listed else pairs,
        "MS": split.ms, "NS": split.ns, "WARPS": split.warps,
        "STAGES": split.stages, "BLOCKS": split.blocks,
    }  # fmt: skip
    ptx = call.compile_or_refuse(KERNEL, KERNEL, macros)
    result = jax.ShapeDtypeStruct((pairs, F // 2 if activation else F), jnp.bfloat16)
    grid, threads = (call.SMS * split.blocks,), split.warps * 32

    def run(x: jax.Array, weight_EFD: Weight, work: jax.Array) -> jax.Array:
        arguments = [x, *cuda.arrays(weight_EFD), work]
        return call.launch(KERNEL, ptx, arguments, [result], grid=grid, threads=threads, shared=split.shared(values))[0]

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
    return implementation(x_TD, chosen_TX, gate_up_EFD, down_EDF, activation=activation, of=of)


def implementation(
    x_TD: jax.Array | jax.ShapeDtypeStruct,
    chosen_TX: jax.Array | jax.ShapeDtypeStruct,
    gate_up_EFD: Weight | jax.ShapeDtypeStruct,
    down_EDF: Weight | jax.ShapeDtypeStruct,
    *,
    activation: str,
    of: int,
    splits: tuple[Tiling, Tiling] | None = None,
) -> Callable[..., jax.Array]:
    """As `cuda.implementation`."""
    (T, D), X, (E, _, F) = x_TD.shape, chosen_TX.shape[1], down_EDF.shape
    if x_TD.dtype != jnp.bfloat16 or activation not in cuda.ACTIVATIONS:
        raise NotImplementedError(f"{x_TD.dtype} activations and {activation}")
    if not T * X:
        raise NotImplementedError("no pairs")
    if splits is None:
        if cuda.columns(T, X, of) > 8:
            raise NotImplementedError("many tokens for each expert")
        splits = tiling(D, cuda.Values.of(gate_up_EFD), T), tiling(F, cuda.Values.of(down_EDF), T)
    first, second = splits
    listed = T > 1
    up = product(T * X, X, gate_up_EFD, first, listed=listed, activation=activation)
    down = product(T * X, 1, down_EDF, second, listed=listed)
    list_work = cuda.make_list(T * X, E, first.ns * 8) if listed else lambda chosen: chosen

    def run(
        x_TD: jax.Array, chosen_TX: jax.Array, weights_TX: jax.Array, gate_up_EFD: Weight, down_EDF: Weight
    ) -> jax.Array:
        work = list_work(chosen_TX)
        y_TXD = down(up(x_TD, gate_up_EFD, work), down_EDF, work).reshape(T, X, D)
        return cuda.weighted(y_TXD, chosen_TX, weights_TX, E, of)

    return run


def check() -> None:
    """Raises ArithmeticError if the kernel is wrong on a small input; to be run on a GPU."""
    cuda.compare(KERNEL, implementation, ((2, 4, 16, 512, 128), (20, 2, 8, 256, 64)))


def check_quantized() -> None:
    """The same of weights in e4m3."""
    cuda.compare(QUANTIZED, implementation, ((2, 4, 16, 512, 128), (20, 2, 8, 256, 128)), Format("fp8"))
    cuda.compare(QUANTIZED, implementation, ((20, 2, 8, 256, 128),), Format("fp8", group=128))
