"""The sum over ranks on Hopper GPUs that can write to each other's memory, by `cuda/all_reduce.cu`."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxllm.kernels.cuda import call

KERNEL = "all_reduce"
THREADS = 128
UNIT = 16
"""Bytes that a thread sends at once, as two packets of 16 bytes."""
MOST_BYTES = 4 << 20
"""Of a sum, times the ranks: from there on NCCL, which sends every byte about twice and not to everybody, is faster."""
TIMEOUT_MS = 10_000
"""Time that a GPU waits for another. They differ most when a program runs first and loads its kernels."""


def limit(ranks: int) -> int:
    """Most bytes of a sum over so many ranks."""
    return MOST_BYTES // ranks // (UNIT * THREADS) * UNIT * THREADS


def blocks(ranks: int) -> int:
    """Blocks that the memory has counters and places for."""
    return limit(ranks) // (UNIT * THREADS)


def memory_bytes(ranks: int) -> int:
    """Of the memory of each GPU: counters, and two phases of places for the packets of each rank."""
    return -(-blocks(ranks) * 4 // 128) * 128 + 2 * ranks * 2 * limit(ranks)


def group_words(ranks: int) -> int:
    """Words of 4 bytes of what tells a rank of its group: see the kernel."""
    return 2 * (ranks + 2)


def macros_of(x: jax.Array, ranks: int, *, residual: bool, timeout_ms: int = TIMEOUT_MS) -> dict[str, object]:
    """Raises NotImplementedError for what the kernel cannot do."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"sums of {x.dtype}")
    size = math.prod(x.shape) * x.dtype.itemsize
    if size % UNIT or not 0 < size <= limit(ranks):
        raise NotImplementedError(f"sums of {size} bytes, not multiples of {UNIT} up to {limit(ranks)}")
    sizes = {"RANKS": ranks, "UNITS": size // UNIT, "BLOCKS": blocks(ranks), "THREADS": THREADS}
    kinds = {"FLOAT": int(x.dtype == jnp.float32), "RESIDUAL": int(residual)}
    return {**sizes, **kinds, "TIMEOUT_MS": timeout_ms}


def grid_of(size: int) -> tuple[int]:
    """A thread takes a unit of the sum's bytes."""
    return (-(-size // (UNIT * THREADS)),)


def run(
    x: jax.Array, residual: jax.Array | None, group: jax.Array, ranks: int, *, timeout_ms: int = TIMEOUT_MS
) -> jax.Array:
    """One launch; see `api.all_reduce`. Raises NotImplementedError where XLA must do the work."""
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise NotImplementedError(f"a sum in {x.dtype}{x.shape} and a residual in {residual.dtype}{residual.shape}")
    call.require(KERNEL)
    ptx = call.compile_or_refuse(
        KERNEL, KERNEL, macros_of(x, ranks, residual=residual is not None, timeout_ms=timeout_ms)
    )
    (out,) = call.launch(
        KERNEL,
        ptx,
        [x, x if residual is None else residual, group],
        [jax.ShapeDtypeStruct(x.shape, x.dtype)],
        grid=grid_of(math.prod(x.shape) * x.dtype.itemsize),
        threads=THREADS,
    )
    return out
