"""Experts of few tokens each on a Hopper GPU, by `cuda/grouped_skinny.cu`, which reads the chosen ones only.

One kernel has gate and up and what comes after them, another the way down; its results, one of each token and expert,
are weighted and added up by XLA, in the kernel that adds the residual. The order of all sums is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels.cuda import call
from jaxllm.kernels.grouped_matmul import reference

KERNEL, LIST = "grouped_skinny", "grouped_list"
ACTIVATIONS = {None: 0, "silu": 1, "gelu_tanh": 2}
GROUP = 32
"""Inputs in 64 bytes of a row."""
SPAN_COLUMNS = 8
"""Columns of a block up to which loads of whole lines are worth more products."""
FEW = 8
"""Tokens up to which a block finds its work by itself, where there are no more than 64 pairs."""
MAX_COLUMNS = 32
MEAN = 24
"""Tokens that an expert can expect, up to which this is better than XLA where there are no tiles; see `tiles_cuda`."""
AHEAD = 24_000_000
"""Bytes that the second-level cache holds until the next kernel reads them."""
REGISTERS = 104
"""Of a thread, for its sums and what it loads at a time."""

Sizes = Iterable[tuple[int, int, int, int, int]]
"""T, X, E, D, F"""
Kernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the work is split; see the kernel."""

    span: int
    ms: int
    ns: int
    warps: int
    depth: int
    blocks: int

    @property
    def rows(self) -> int:
        return self.ms * 16 // self.span

    @property
    def columns(self) -> int:
        return self.ns * 8 // self.span

    @property
    def registers(self) -> int:
        """Of a thread, for its sums and what it loads at a time."""
        return 4 * (self.ms * self.ns + self.depth * (2 * self.ms + self.ns))

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.warps * self.columns * (self.rows + 4) * 4 + self.columns * 4


def columns(tokens: int, chosen: int, of: int) -> int:
    """Pairs of a block: what an expert gets that is not unusually popular."""
    mean = tokens * chosen / of
    most = min(tokens, math.ceil(mean + 2 * math.sqrt(mean))) if tokens > FEW else tokens
    return 4 if most <= 4 else min(MAX_COLUMNS, -(-most // 8) * 8)


def tiling(tokens: int, columns: int, inputs: int) -> Tiling:
    """A good split: blocks of some 50 KB, of which several are on each multiprocessor.

    columns: a multiple of 8, or 4.
    """
    span = 2 if columns <= SPAN_COLUMNS and inputs % (2 * GROUP) == 0 else 1
    groups = inputs // (GROUP * span)
    warps = next((warps for warps in (8, 6, 4) if groups % warps == 0), 8)
    ns, ms, groups = -(-columns * span // 8), span * (2 if tokens > FEW and warps == 8 else 1), -(-groups // warps)
    blocks = {8: 2, 6: 4 if ns == 1 else 3, 4: 4}[warps]
    options = [Tiling(span, ms, ns, warps, depth, blocks) for depth in range(1, groups + 1)]
    fitting = [option for option in options if option.registers <= REGISTERS] or options[:1]
    return min(fitting, key=lambda option: (-(-groups // option.depth) * option.depth - groups, -option.depth))


def records(pairs: int, experts: int, columns: int) -> int:
    """Records that are enough however the pairs are spread over the experts."""
    return (pairs + min(experts, pairs) * (columns - 1)) // columns


def product(
    pairs: int,
    shared_by: int,
    weight_EFD: jax.Array | jax.ShapeDtypeStruct,
    split: Tiling,
    *,
    listed: bool,
    activation: str | None = None,
    ahead: tuple[int, int] = (0, 0),
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
    """One product: (x [pairs / shared_by, D], weight, work, ahead) -> [pairs, F], or half of F with an activation.

    ahead: bytes of the weight of this name that a block brings to the second-level cache, and that an expert has of it.
    Raises NotImplementedError where NVRTC refuses the kernel.
    """
    E, F, D = weight_EFD.shape
    macros = {
        "PAIRS": pairs, "EXPERTS": E, "SHARED_BY": shared_by, "FEATURES": F, "INPUTS": D,
        "GATED": ACTIVATIONS[activation], "LIST": int(listed),
        "SPAN": split.span, "MS": split.ms, "NS": split.ns, "WARPS": split.warps, "DEPTH": split.depth,
        "BLOCKS": split.blocks, "AHEAD": ahead[0], "AHEAD_BYTES": ahead[1],
    }  # fmt: skip
    ptx = call.compile_or_refuse(KERNEL, KERNEL, macros)
    out = F // 2 if activation else F
    grid = tiles(split, out, activation), records(pairs, E, split.columns) if listed else pairs
    result = jax.ShapeDtypeStruct((pairs, out), jnp.bfloat16)

    def run(x: jax.Array, weight_EFD: jax.Array, work: jax.Array, ahead: jax.Array) -> jax.Array:
        arguments = [x, weight_EFD, work, ahead]
        threads = split.warps * 32
        return call.launch(KERNEL, ptx, arguments, [result], grid=grid, threads=threads, shared=split.shared)[0]

    return run


def tiles(split: Tiling, out: int, activation: str | None) -> int:
    """Blocks for the columns of a result."""
    return -(-out // (split.rows // 2 if activation else split.rows))


def make_list(pairs: int, experts: int, columns: int) -> Callable[[jax.Array], jax.Array]:
    """chosen, int32 of any shape with so many elements -> the records of `cuda/grouped_list.cu`."""
    threads, count = min(1024, -(-pairs // 32) * 32), records(pairs, experts, columns)
    macros = {"PAIRS": pairs, "EXPERTS": experts, "COLUMNS": columns, "RECORDS": count, "THREADS": threads}
    ptx = call.compile_or_refuse(KERNEL, LIST, macros)
    result = jax.ShapeDtypeStruct((count, 1 + columns), jnp.int32)
    return lambda chosen: call.launch(LIST, ptx, [chosen], [result], grid=(1,), threads=threads)[0]


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
    if x_TD.shape[0] * chosen_TX.shape[1] > MEAN * of:
        raise NotImplementedError("many tokens for each expert")
    return implementation(x_TD, chosen_TX, gate_up_EFD, down_EDF, activation=activation, of=of)


def implementation(
    x_TD: jax.Array | jax.ShapeDtypeStruct,
    chosen_TX: jax.Array | jax.ShapeDtypeStruct,
    gate_up_EFD: jax.Array | jax.ShapeDtypeStruct,
    down_EDF: jax.Array | jax.ShapeDtypeStruct,
    *,
    activation: str,
    of: int,
    splits: tuple[Tiling, Tiling] | None = None,
    ahead: int = AHEAD,
) -> Callable[..., jax.Array]:
    """What `api.experts` does, as a function of (x, chosen, weights, gate_up, down) in a program for an H100 or H200.

    Args:
      splits: of the first and the second product, with equal columns; None for good ones.
      ahead: bytes of the second product's weight that are fetched during the first one, of few tokens.

    Raises:
      NotImplementedError: there is no kernel for these shapes and dtypes.
    """
    (T, D), X, (E, _, F) = x_TD.shape, chosen_TX.shape[1], down_EDF.shape
    if any(a.dtype != jnp.bfloat16 for a in (x_TD, gate_up_EFD, down_EDF)) or activation not in ACTIVATIONS:
        raise NotImplementedError(f"{gate_up_EFD.dtype} weights, {x_TD.dtype} activations and {activation}")
    if D % GROUP or F % GROUP or not T * X:
        raise NotImplementedError(f"{T * X} pairs of {D} inputs and {F} columns")
    if splits is None:
        most = columns(T, X, of)
        splits = tiling(T, most, D), tiling(T, most, F)
    first, second = splits
    if first.columns != second.columns:  # half a product of columns is none without `span`
        first, second = (tiling(T, 8, width) for width in (D, F))
    listed = min(FEW, first.columns) < T or T * X > 64
    blocks, of_expert = tiles(first, F, activation), D * F * 2
    each = 0 if listed else min(of_expert // blocks, ahead // (blocks * T * X)) // 512 * 512
    up = product(T * X, X, gate_up_EFD, first, listed=listed, activation=activation, ahead=(each, of_expert))
    down = product(T * X, 1, down_EDF, second, listed=listed)
    list_work = make_list(T * X, E, first.columns) if listed else lambda chosen: chosen

    def run(
        x_TD: jax.Array, chosen_TX: jax.Array, weights_TX: jax.Array, gate_up_EFD: jax.Array, down_EDF: jax.Array
    ) -> jax.Array:
        work = list_work(chosen_TX)
        hidden = up(x_TD, gate_up_EFD, work, down_EDF)
        y_TXD = down(hidden, down_EDF, work, down_EDF).reshape(T, X, D)
        return weighted(y_TXD, chosen_TX, weights_TX, E)

    return run


def weighted(y_TXD: jax.Array, chosen_TX: jax.Array, weights_TX: jax.Array, experts: int) -> jax.Array:
    """The weighted sum of what a token's experts give, as far as they are here; the others' place holds anything."""
    here_TX = (chosen_TX >= 0) & (chosen_TX < experts)
    y_TXD = jnp.where(here_TX[:, :, None], y_TXD, 0).astype(jnp.float32)
    return (y_TXD * weights_TX[:, :, None]).sum(axis=1)


def check() -> None:
    """Raises ArithmeticError if the kernels are wrong on a small input; to be run on a GPU."""
    compare(KERNEL, implementation, ((2, 4, 16, 512, 96), (40, 2, 5, 256, 64)))


def compare(kernel: str, implementation: Callable[..., Callable[..., jax.Array]], sizes: Sizes) -> None:
    """Raises ArithmeticError if an implementation is not near the reference."""
    rng = np.random.default_rng(0)
    for T, X, E, D, F in sizes:
        x, gate_up, down = (
            jnp.asarray(rng.standard_normal(shape) / 4, jnp.bfloat16) for shape in ((T, D), (E, 2 * F, D), (E, D, F))
        )
        chosen = jnp.asarray(np.stack([rng.permutation(E + 2)[:X] for _ in range(T)]), jnp.int32)
        weights = jnp.asarray(rng.random((T, X)), jnp.float32)
        arguments = x, chosen, weights, gate_up, down
        run = implementation(x, chosen, gate_up, down, activation="silu", of=E + 2)
        out = np.asarray(jax.jit(run)(*arguments))
        wanted = np.asarray(jax.jit(lambda *a, of=E + 2: reference.experts(*a, activation="silu", of=of))(*arguments))
        error = float(np.linalg.norm(out - wanted) / np.linalg.norm(wanted))
        if not error < 0.02:
            raise ArithmeticError(f"{kernel} is wrong by {error:.1e} at T={T} X={X} E={E} D={D} F={F}")
