"""The sum over ranks on Hopper GPUs that can write to each other's memory, by `cuda/all_reduce.cuh`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.kernels.cuda import call
from jaxllm.kernels.linear.product import Activations, Product, QuantizedTokens
from jaxllm.kernels.linear.reference import Norm

KERNEL = "all_reduce"
SCATTER, GATHER = "reduce_scatter", "gather_rows"
"""The kernels of one of the two shots."""
SLOT = 128
"""Threads that have a counter together."""
UNIT = 16
"""Bytes that a thread sends at once, as a packet, or as two numbered ones."""
MOST_BYTES = 8 << 20
"""Of a sum in two shots, and of one in one shot, times the ranks: larger ones go by NCCL."""
TWO_SHOTS: dict[int, int] = {}
"""By ranks, the bytes from which sums go in two shots. Two ranks never do: they would send as much.

In one shot a GPU sends ranks - 1 times the bytes of a sum (twice that if numbered), in two 2 * (ranks - 1) / ranks, and
waits twice."""
ASKED = 128 << 10
"""The same for groups that do not stand there, where `JAXLLM_CUDA=+two_shots` asks for it."""
APART: frozenset[int] = frozenset()
"""Numbers of ranks whose rows are gathered, and summed and scattered, by the kernels of one shot."""
QUANTISES: frozenset[int] = frozenset()
"""Numbers of ranks whose sums finish products in e4m3, and make the norm after them e4m3, in the same kernel."""
NUMBERED = False
"""Whether packets carry the number of their sum, or only data: half as many bytes, and places that must be emptied.

On two H200s, with residual and norm, numbered and not: 16 KiB 3.7 and 4.1 us, 1 MiB 10.1 and 7.3 us."""
CLUSTERS: dict[int, int] = {2: 8}
"""By ranks, the most blocks (1, 2, 4 or 8) that have a row together in a sum with a norm: 1 where it does not say."""
MOST_THREADS = 1024
TIMEOUT_MS = 10_000
"""Time that a GPU waits for another. They differ most when a program runs first and loads its kernels."""


def limit(ranks: int, shots: int = 1) -> int:
    """Most bytes of a sum over so many ranks."""
    return slots(ranks) * UNIT * SLOT * (ranks if shots == 2 else 1)


def shots_of(size: int, ranks: int) -> int:
    """The better way for a sum of so many bytes."""
    never = ASKED if ranks > 2 and call.asked_for("two_shots") else MOST_BYTES + 1
    return 2 if size >= TWO_SHOTS.get(ranks, never) else 1


def quantises(ranks: int) -> bool:
    """Whether sums over so many ranks had better take products of e4m3 unfinished, and leave e4m3."""
    return ranks in QUANTISES or call.asked_for("sum_e4m3")


def cluster_of(row: int, most: int, slot: int = SLOT) -> int:
    """Blocks that have a row of so many units together: as many as have whole slots of it, at most `most`."""
    return max(blocks for blocks in (1, 2, 4, 8) if blocks == 1 or (blocks <= most and row % (blocks * slot) == 0))


def slots(ranks: int) -> int:
    """Slots that the memory has counters and places for."""
    return MOST_BYTES // ranks // (UNIT * SLOT)


def memory_bytes(ranks: int, numbered: bool = NUMBERED) -> int:
    """Of the memory of each GPU: counters, and two phases of places for the packets of each shot and rank."""
    return counter_bytes(ranks) + 2 * 2 * ranks * (2 if numbered else 1) * limit(ranks)


def counter_bytes(ranks: int) -> int:
    """Of the counters, after which the places begin."""
    return -(-slots(ranks) * 4 // 128) * 128


def group_words(ranks: int) -> int:
    """Words of 4 bytes of what tells a rank of its group: see the kernel."""
    return 2 * (ranks + 2)


def macros_of(
    x: jax.Array,
    ranks: int,
    *,
    residual: bool,
    eps: float | None = None,
    shots: int | None = None,
    numbered: bool = NUMBERED,
    clusters: int | None = None,
    kernel: str = KERNEL,
    scaled: bool = False,
    quantised: bool = False,
    slot: int = SLOT,
    timeout_ms: int = TIMEOUT_MS,
) -> dict[str, object]:
    """eps: of a norm of the result; None for none. shots: 1 or 2; None for the better way. numbered: as the group is.
    clusters: the most blocks of a row; None for the better number. kernel: of this name.
    scaled: x is a product in e4m3. quantised: what the norm makes becomes e4m3.

    Raises NotImplementedError for what the kernel cannot do.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"sums of {x.dtype}")
    size = math.prod(x.shape) * x.dtype.itemsize * (ranks if kernel == GATHER else 1)
    shots = 2 if kernel != KERNEL else shots_of(size, ranks) if shots is None else shots
    if kernel != KERNEL and (x.shape[0] % (1 if kernel == GATHER else ranks) or size % (ranks * UNIT)):
        raise NotImplementedError(f"rows of {x.dtype}{x.shape} on {ranks} ranks")
    if size % UNIT or not 0 < size <= limit(ranks, shots):
        raise NotImplementedError(f"sums of {size} bytes, not multiples of {UNIT} up to {limit(ranks, shots)}")
    row, cluster = slot, 1
    if eps is not None:
        row, rest = divmod(x.shape[-1] * x.dtype.itemsize, UNIT)
        known = CLUSTERS.get(ranks, 8 if call.asked_for("two_shots") else 1)
        cluster = cluster_of(row, known if clusters is None else clusters, slot)
        row //= cluster
        if rest or row > MOST_THREADS or x.dtype != jnp.bfloat16:
            raise NotImplementedError(f"the norm of rows of {x.shape[-1]} {x.dtype}")
    threads = -(-row // slot) * slot
    macros = {"RANKS": ranks, "SHOTS": shots, "UNITS": size // UNIT, "ROW": row, "THREADS": threads, "SLOT": slot}
    macros["CLUSTER"] = cluster
    macros["NUMBERED"] = int(numbered)
    macros |= {"SLOTS": slots(ranks), "FLOAT": int(x.dtype == jnp.float32), "RESIDUAL": int(residual)}
    if grid_of(macros, kernel)[0] * threads // slot > slots(ranks):
        raise NotImplementedError(f"{x.shape[0]} rows of {threads} threads")
    if (scaled or quantised) and eps is None:
        raise NotImplementedError("e4m3 without a norm")
    macros |= {"SCALED": int(scaled), "QUANT": int(quantised)}
    return {**macros, "NORM": int(eps is not None), "EPS": repr(float(eps or 0.0)), "TIMEOUT_MS": timeout_ms}


def grid_of(macros: dict[str, Any], kernel: str = KERNEL) -> tuple[int]:
    """A block takes ROW units, with two shots of each rank's share; a cluster of them a row."""
    parts = macros["RANKS"] if kernel != KERNEL else _parts(macros)
    return (-(-macros["UNITS"] // (macros["CLUSTER"] * macros["ROW"] * parts)) * macros["CLUSTER"],)


def shared_of(macros: dict[str, Any], kernel: str = KERNEL) -> int:
    """Bytes of shared memory: with a norm two floats for each row and warp, and block of its cluster."""
    rows = 1 if kernel == SCATTER else _parts(macros)
    return 8 * (macros["THREADS"] // 32 + macros["CLUSTER"]) * rows if macros["NORM"] else 0


def _parts(macros: dict[str, Any]) -> int:
    parts: int = macros["RANKS"] if macros["SHOTS"] == 2 else 1
    return parts


def run(
    x: jax.Array | Product,
    residual: jax.Array | None,
    group: jax.Array,
    ranks: int,
    norm: Norm | None = None,
    *,
    shots: int | None = None,
    numbered: bool = NUMBERED,
    clusters: int | None = None,
    kernel: str = KERNEL,
    quantised: bool = False,
    timeout_ms: int = TIMEOUT_MS,
) -> tuple[jax.Array, Activations | None]:
    """One launch; see `api.all_reduce`. Raises NotImplementedError where XLA must do the work."""
    row_scale = column_scale = None
    if isinstance(x, Product):
        if x.sums.ndim == 3 or x.sums.dtype != x.dtype:
            raise NotImplementedError("a product of several parts")
        row_scale, column_scale, x = x.token_scale, x.column_scale, x.sums
    rows = x.shape[0] * ranks if kernel == GATHER else x.shape[0] // ranks if kernel == SCATTER else x.shape[0]
    shape = (rows, *x.shape[1:])
    if residual is not None and (residual.shape, residual.dtype) != (shape, x.dtype):
        raise NotImplementedError(f"a sum in {x.dtype}{shape} and a residual in {residual.dtype}{residual.shape}")
    call.require(KERNEL)
    weight, eps = (None, None) if norm is None else norm
    options: dict[str, Any] = {"shots": shots, "numbered": numbered, "clusters": clusters, "timeout_ms": timeout_ms}
    options |= {"kernel": kernel, "scaled": row_scale is not None, "quantised": quantised}
    macros: dict[str, Any] = macros_of(x, ranks, residual=residual is not None, eps=eps, **options)
    second = jax.ShapeDtypeStruct(shape if norm is not None else (UNIT,), jnp.float8_e4m3fn if quantised else x.dtype)
    scale = jax.ShapeDtypeStruct((rows, 1) if quantised else (4,), jnp.float32)
    given = [x if other is None else other for other in (weight, row_scale, column_scale)]
    out, normed, normed_scale = call.launch(
        kernel,
        call.compile_or_refuse(KERNEL, kernel, macros),
        [x, x if residual is None else residual, group, *given],
        [jax.ShapeDtypeStruct(shape, x.dtype), second, scale],
        grid=grid_of(macros, kernel),
        threads=macros["THREADS"],
        shared=shared_of(macros, kernel),
    )
    if norm is None:
        return out, None
    return out, QuantizedTokens(normed, normed_scale, x.dtype) if quantised else normed


def scatter_sum(
    x: jax.Array, residual: jax.Array | None, group: jax.Array, ranks: int, *, numbered: bool = NUMBERED, **options: Any
) -> jax.Array:
    """This rank's rows of the sum of every rank's x [ranks * T, ...], plus the residual [T, ...].

    Added up as by `run`. Raises NotImplementedError where XLA must do the work."""
    return _apart(x, residual, group, ranks, SCATTER, numbered, options)


def gather(x: jax.Array, group: jax.Array, ranks: int, *, numbered: bool = NUMBERED, **options: Any) -> jax.Array:
    """Every rank's x [T, ...], one after the other; floats, of which NaNs stay NaNs.

    Raises NotImplementedError where XLA must do the work."""
    return _apart(x, None, group, ranks, GATHER, numbered, options)


def _apart(
    x: jax.Array,
    residual: jax.Array | None,
    group: jax.Array,
    ranks: int,
    kernel: str,
    numbered: bool,
    options: dict[str, Any],
) -> jax.Array:
    if ranks not in APART and not call.asked_for(kernel):
        raise NotImplementedError(f"{kernel} over {ranks} ranks was not measured to be faster")
    return run(x, residual, group, ranks, kernel=kernel, numbered=numbered, **options)[0]
