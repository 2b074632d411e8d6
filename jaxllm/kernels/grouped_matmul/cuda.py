"""Experts of few tokens each on a Hopper GPU, by `cuda/grouped_skinny.cu`, which reads the chosen ones only.

One kernel has gate and up and what comes after them, another the way down; its results, one of each token and expert,
are weighted and added up by XLA, in the kernel that adds the residual. The order of all sums is fixed. Weights are in
bfloat16, or in e4m3 with scales, half the bytes; activations stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.formats import Format
from jaxllm.kernels.cuda import call
from jaxllm.kernels.grouped_matmul import reference
from jaxllm.kernels.linear.quantized import QuantizedWeight, Weight, quantize

KERNEL, LIST = "grouped_skinny", "grouped_list"
QUANTIZED = "grouped_skinny_quantized"
"""The name by which it is turned off for weights in e4m3 only."""
ACTIVATIONS = {None: 0, "silu": 1, "gelu_tanh": 2}
PIECE = 64
"""Bytes of a row that four lanes read at a time."""
SPAN_COLUMNS = 8
"""Columns of a block up to which loads of whole lines are worth more products."""
FEW = 8
"""Tokens up to which a block finds its work by itself, where there are no more than 64 pairs."""
MAX_COLUMNS = 32
MEAN = 24
"""Tokens that an expert can expect, up to which this is better than XLA where there are no tiles; see `tiles_cuda`."""
AHEAD = 24_000_000
"""Bytes that the second-level cache holds until the next kernel reads them."""
REGISTERS, ADDRESSES = 104, 32
"""Of a thread: for its sums and what it loads at a time; and for the rest."""

Sizes = Iterable[tuple[int, int, int, int, int]]
"""T, X, E, D, F"""
Kernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True, slots=True)
class Values:
    """How a weight is kept. itemsize: bytes of a value. group: inputs that share a scale; None for all of a row."""

    itemsize: int = 2
    group: int | None = None

    @classmethod
    def of(cls, weight: Weight | jax.ShapeDtypeStruct) -> Values:
        """Raises NotImplementedError for what is neither bfloat16 nor e4m3."""
        if isinstance(weight, QuantizedWeight):
            if weight.format.kind != "fp8" or weight.zero is not None:
                raise NotImplementedError(f"{weight.format}")
            return cls(1, weight.format.group)
        if weight.dtype != jnp.bfloat16:
            raise NotImplementedError(f"{weight.dtype} weights")
        return cls()


WIDE = Values()


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

    def registers(self, values: Values) -> int:
        """Of a thread, for its sums and what it loads at a time."""
        loads = 4 * (2 * self.ms + self.ns * 2 // values.itemsize) + (2 * self.ms if values.group else 0)
        # Of groups, besides the scales, the sums that they multiply, and their addresses.
        return 4 * self.ms * self.ns + self.depth * loads + (4 * self.ns + 16 if values.group else 0)

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.warps * self.columns * (self.rows + 4) * 4 + self.columns * 4


def columns(tokens: int, chosen: int, of: int) -> int:
    """Pairs of a block: what an expert gets that is not unusually popular."""
    mean = tokens * chosen / of
    most = min(tokens, math.ceil(mean + 2 * math.sqrt(mean))) if tokens > FEW else tokens
    return 4 if most <= 4 else min(MAX_COLUMNS, -(-most // 8) * 8)


def tiling(tokens: int, columns: int, inputs: int, values: Values = WIDE) -> Tiling:
    """A good split: blocks of some 50 KB, of which several are on each multiprocessor.

    columns: a multiple of 8, or 4.
    """
    pieces = inputs * values.itemsize // PIECE
    span = 2 if columns <= SPAN_COLUMNS and pieces % 2 == 0 else 1
    groups = pieces // span
    warps = next((warps for warps in (8, 6, 4) if groups % warps == 0), 8)
    ns, groups = -(-columns * span // 8), -(-groups // warps)
    rows: tuple[int, ...] = (2 if tokens > FEW and warps == 8 else 1,)
    blocks: tuple[int, ...] = ({8: 2, 6: 4 if ns == 1 else 3, 4: 4}[warps],)
    if values.itemsize == 1:  # rows of half as many bytes: as much under way as there is room for
        rows, blocks = (1, 2), (2, 3, 4)
    depths = range(1, groups + 1)
    options = [Tiling(span, span * m, ns, warps, d, count) for m in rows for count in blocks for d in depths]

    def fits(split: Tiling) -> bool:
        room = REGISTERS if values.itemsize == 2 else 65536 // (32 * warps * split.blocks) - ADDRESSES
        return split.registers(values) <= room

    def worse(split: Tiling) -> tuple[int, int, int]:
        rounds = -(-groups // split.depth)
        return rounds * split.depth - groups, -split.depth * split.blocks * split.ms, split.blocks

    return min(list(filter(fits, options)) or options[:1], key=worse)


def records(pairs: int, experts: int, columns: int) -> int:
    """Records that are enough however the pairs are spread over the experts."""
    return (pairs + min(experts, pairs) * (columns - 1)) // columns


def product(
    pairs: int,
    shared_by: int,
    weight_EFD: Weight | jax.ShapeDtypeStruct,
    split: Tiling,
    *,
    listed: bool,
    activation: str | None = None,
    ahead: tuple[int, int] = (0, 0),
) -> Callable[[jax.Array, Weight, jax.Array, jax.Array], jax.Array]:
    """One product: (x [pairs / shared_by, D], weight, work, ahead) -> [pairs, F], or half of F with an activation.

    ahead: bytes of the weight of this name that a block brings to the second-level cache, and that an expert has of it.
    Raises NotImplementedError where NVRTC refuses the kernel.
    """
    (E, F, D), values = weight_EFD.shape, Values.of(weight_EFD)
    macros = {
        "PAIRS": pairs, "EXPERTS": E, "SHARED_BY": shared_by, "FEATURES": F, "INPUTS": D,
        "WEIGHT": int(values.itemsize == 1), "SCALED_BY": values.group or 0,
        "GATED": ACTIVATIONS[activation], "LIST": int(listed),
        "SPAN": split.span, "MS": split.ms, "NS": split.ns, "WARPS": split.warps, "DEPTH": split.depth,
        "BLOCKS": split.blocks, "AHEAD": ahead[0], "AHEAD_BYTES": ahead[1],
    }  # fmt: skip
    ptx = call.compile_or_refuse(KERNEL, KERNEL, macros)
    out = F // 2 if activation else F
    grid = tiles(split, out, activation), records(pairs, E, split.columns) if listed else pairs
    result = jax.ShapeDtypeStruct((pairs, out), jnp.bfloat16)

    def run(x: jax.Array, weight_EFD: Weight, work: jax.Array, ahead: jax.Array) -> jax.Array:
        arguments = [x, *arrays(weight_EFD), work, ahead]
        threads = split.warps * 32
        return call.launch(KERNEL, ptx, arguments, [result], grid=grid, threads=threads, shared=split.shared)[0]

    return run


def arrays(weight: Weight) -> tuple[jax.Array, jax.Array]:
    """Values, and scales; of what has none, anything."""
    return (weight.values, weight.scale) if isinstance(weight, QuantizedWeight) else (weight, weight)


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
    if x_TD.shape[0] * chosen_TX.shape[1] > MEAN * of:
        raise NotImplementedError("many tokens for each expert")
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
    if x_TD.dtype != jnp.bfloat16 or activation not in ACTIVATIONS:
        raise NotImplementedError(f"{x_TD.dtype} activations and {activation}")
    both = tuple((Values.of(weight), width) for weight, width in ((gate_up_EFD, D), (down_EDF, F)))
    if any(width * values.itemsize % PIECE or (values.group or PIECE) % PIECE for values, width in both) or not T * X:
        raise NotImplementedError(f"{T * X} pairs of {D} inputs and {F} columns in {[values for values, _ in both]}")
    if splits is None:
        most = columns(T, X, of)
        splits = tiling(T, most, D, both[0][0]), tiling(T, most, F, both[1][0])
    first, second = splits
    if first.columns != second.columns:  # half a product of columns is none without `span`
        first, second = (tiling(T, 8, width, values) for values, width in both)
    listed = min(FEW, first.columns) < T or T * X > 64
    blocks, of_expert = tiles(first, F, activation), D * F * both[1][0].itemsize
    each = 0 if listed else min(of_expert // blocks, ahead // (blocks * T * X)) // 512 * 512
    up = product(T * X, X, gate_up_EFD, first, listed=listed, activation=activation, ahead=(each, of_expert))
    down = product(T * X, 1, down_EDF, second, listed=listed)
    list_work = make_list(T * X, E, first.columns) if listed else lambda chosen: chosen

    def run(
        x_TD: jax.Array, chosen_TX: jax.Array, weights_TX: jax.Array, gate_up_EFD: Weight, down_EDF: Weight
    ) -> jax.Array:
        work, (next_weight, _) = list_work(chosen_TX), arrays(down_EDF)
        hidden = up(x_TD, gate_up_EFD, work, next_weight)
        y_TXD = down(hidden, down_EDF, work, next_weight).reshape(T, X, D)
        return weighted(y_TXD, chosen_TX, weights_TX, E, of)

    return run


def weighted(y_TXD: jax.Array, chosen_TX: jax.Array, weights_TX: jax.Array, experts: int, of: int) -> jax.Array:
    """The weighted sum of what a token's experts give, as far as they are here; the others' place holds anything."""
    here_TX = (chosen_TX >= 0) & (chosen_TX < experts)
    T, X, D = y_TXD.shape
    if of > experts:  # on several ranks most are elsewhere: one row stands for all that nobody wrote
        at_TX = jnp.where(here_TX, jnp.arange(T * X, dtype=jnp.int32).reshape(T, X), 0)
        y_TXD = jnp.take(y_TXD.reshape(T * X, D), at_TX, axis=0, mode="clip")
    y_TXD = jnp.where(here_TX[:, :, None], y_TXD, 0).astype(jnp.float32)
    return (y_TXD * weights_TX[:, :, None]).sum(axis=1)


def check() -> None:
    """Raises ArithmeticError if the kernels are wrong on a small input; to be run on a GPU."""
    compare(KERNEL, implementation, ((2, 4, 16, 512, 96), (40, 2, 5, 256, 64)))


def check_quantized() -> None:
    """The same of weights in e4m3."""
    compare(QUANTIZED, implementation, ((2, 4, 16, 512, 192), (40, 2, 5, 256, 64)), Format("fp8"))
    compare(QUANTIZED, implementation, ((20, 2, 5, 256, 128),), Format("fp8", group=128))


def compare(
    kernel: str,
    implementation: Callable[..., Callable[..., jax.Array]],
    sizes: Sizes,
    format: Format | None = None,
    tolerance: float = 0.02,
) -> None:
    """Raises ArithmeticError if an implementation is not near the reference.

    format: of the weights, where they are quantised. tolerance: of the norm of the difference, as a share.
    """
    rng = np.random.default_rng(0)
    for T, X, E, D, F in sizes:
        x, *wide = (
            jnp.asarray(rng.standard_normal(shape) / 4, jnp.bfloat16) for shape in ((T, D), (E, 2 * F, D), (E, D, F))
        )
        gate_up, down = wide if format is None else (quantize(weight, format) for weight in wide)
        chosen = jnp.asarray(np.stack([rng.permutation(E + 2)[:X] for _ in range(T)]), jnp.int32)
        weights = jnp.asarray(rng.random((T, X)), jnp.float32)
        arguments = x, chosen, weights, gate_up, down
        run = implementation(x, chosen, gate_up, down, activation="silu", of=E + 2)
        out = np.asarray(jax.jit(run)(*arguments))
        wanted = np.asarray(jax.jit(lambda *a, of=E + 2: reference.experts(*a, activation="silu", of=of))(*arguments))
        error = float(np.linalg.norm(out - wanted) / np.linalg.norm(wanted))
        if not error < tolerance:
            raise ArithmeticError(f"{kernel} is wrong by {error:.1e} at T={T} X={X} E={E} D={D} F={F}")
