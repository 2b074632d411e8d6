"""Paged decode attention: against the reference, its speed, and a sweep of what cannot be decided without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernel_rows._measure import Row, difference, rate, time_call

from jaxllm.kernels.paged_attention import decode_cuda, reference

O = 32
BF16, FP8 = jnp.bfloat16, jnp.float8_e4m3fn
LLAMA = (8, 4, 128)
"""K, G, H"""
SHAPES: dict[str, tuple[list[int], tuple[int, int, int], Any]] = {
    # lengths of the rows, K G H, dtype of the pages
    "B=64 x 2048": ([2048] * 64, LLAMA, BF16),
    "B=1 x 131072": ([131_072], LLAMA, BF16),
    "B=8 x 32768": ([32_768] * 8, LLAMA, BF16),
    "B=1 x 8192": ([8192], LLAMA, BF16),
    "B=1 x 128": ([128], LLAMA, BF16),
    "B=8 x 128": ([128] * 8, LLAMA, BF16),
    "B=64 x 128": ([128] * 64, LLAMA, BF16),
    "B=256 x 100..2000": (list(np.random.default_rng(0).integers(100, 2000, 256)), LLAMA, BF16),
    "B=64 x 2048 + 64 padding": ([2048] * 64 + [0] * 64, LLAMA, BF16),
    "fp8 B=64 x 2048": ([2048] * 64, LLAMA, FP8),
    "fp8 B=8 x 32768": ([32_768] * 8, LLAMA, FP8),
    "tp2 B=64 x 2048": ([2048] * 64, (4, 4, 128), BF16),
    "G=8 B=64 x 2048": ([2048] * 64, (8, 8, 128), BF16),
    "H=256 B=32 x 2048": ([2048] * 32, (8, 2, 256), BF16),
    "H=64 B=64 x 2048": ([2048] * 64, (3, 3, 64), BF16),
}
TIMED_REFERENCE = ("B=64 x 2048", "B=1 x 8192", "B=1 x 128")
TUNINGS: tuple[dict[str, int], ...] = (
    {"resident": 1},
    {"resident": 3},
    {"warps": 8, "resident": 1},
    {"min_share": 1},
)
SWEPT = ("B=64 x 2048", "B=1 x 8192", "B=1 x 128")


@cache
def pool(K: int, H: int, dtype: Any, pages: int) -> jax.Array:
    """Random pages, made in parts: random numbers take memory of their own."""
    make = jax.jit(lambda key: jax.random.normal(key, (pages // 8, 2, K, O, H), BF16).astype(dtype))
    return jnp.concatenate([make(key) for key in jax.random.split(jax.random.key(0), 8)])


def arguments(lengths: list[int], heads: tuple[int, int, int], dtype: Any, tables: int) -> tuple[Any, ...]:
    """q, pool, `tables` page tables over different pages where the pool has enough, positions."""
    K, G, H = heads
    width = -(-max(lengths) // O)
    pages = 8 * -(-max(len(lengths) * width, 2**31 // (2 * K * O * H * jnp.dtype(dtype).itemsize)) // 8)
    rng = np.random.default_rng(1)
    ids = [rng.permutation(pages)[: len(lengths) * width].reshape(len(lengths), width) for _ in range(tables)]
    q = jnp.asarray(rng.standard_normal((len(lengths), 1, K * G, H)), BF16)
    positions = jnp.asarray(lengths, jnp.int32)[:, None] - 1
    pool.cache_clear()  # one pool at a time
    return q, pool(K, H, dtype, pages), [jnp.asarray(table, jnp.int32) for table in ids], positions


def chain(attend: Any, q: jax.Array, kv: jax.Array, tables: list[jax.Array], positions: jax.Array) -> jax.Array:
    """One call for each table, each on the output of the one before."""
    for table in tables:
        q = attend(q, kv, table, positions)[0]
    return q


def speed(name: str, **tuning: int) -> dict[str, Any]:
    lengths, heads, dtype = SHAPES[name]
    K, _, H = heads
    calls = 16 if sum(lengths) > 10_000 else 48
    q, kv, tables, positions = arguments(lengths, heads, dtype, calls)
    options: dict[str, Any] = {"scale": H**-0.5, "softcap": None}
    attend = decode_cuda.prepare(q, kv, tables[0], **options, **tuning)
    moved = 2 * K * H * sum(lengths) * jnp.dtype(dtype).itemsize
    seconds = time_call(jax.jit(partial(chain, attend)), q, kv, tables, positions, calls=calls)
    found: dict[str, Any] = rate(seconds, moved=moved)
    if tuning:
        return found
    plain = jax.jit(partial(reference.attend, **options))
    out, lse = jax.jit(attend)(q, kv, tables[0], positions)
    wanted, wanted_lse = plain(q, kv, tables[0], positions)
    real = np.asarray(positions)[:, 0] >= 0
    found["error"] = difference(np.asarray(out, np.float32)[real], np.asarray(wanted, np.float32)[real])
    found["lse_error"] = float(np.abs(np.asarray(lse) - np.asarray(wanted_lse))[real].max())
    found["wrong"] = not (found["error"] < 0.02 and found["lse_error"] < 0.02)
    if name in TIMED_REFERENCE:
        few = tables[:4]
        program = jax.jit(partial(chain, partial(reference.attend, **options)))
        found["reference_us"] = time_call(program, q, kv, few, positions, calls=4) * 1e6
    found["difference"] = found.pop("error")
    return found


def right(K: int, G: int, Q: int, H: int, page: int, dtype: Any, softcap: float | None, window: int | None) -> dict:
    """Error against float32, over rows of very different lengths, some of which see nothing."""
    rng = np.random.default_rng(2)
    R, W = 37, 4096 // page
    q = jnp.asarray(rng.standard_normal((R, Q, K * G, H)), BF16)
    kv = jnp.asarray(rng.standard_normal((R * W, 2, K, page, H), np.float32), dtype)
    pages = jnp.asarray(rng.permutation(R * W).reshape(R, W), jnp.int32)
    lengths = np.where(rng.random((R, Q)) < 0.2, 0, rng.integers(1, 4097, (R, Q)) // rng.integers(1, 100, (R, Q)))
    positions = jnp.asarray(lengths - 1, jnp.int32)
    first = None if window is None else positions - window + 1
    options: dict[str, Any] = {"scale": H**-0.5, "softcap": softcap}
    found = jax.jit(decode_cuda.prepare(q, kv, pages, **options))(q, kv, pages, positions, first)
    with jax.default_matmul_precision("highest"):
        plain = jax.jit(partial(reference.attend, **options))
        wanted = plain(q.astype(jnp.float32), kv.astype(jnp.float32), pages, positions, first)
    real = np.asarray(positions) >= 0
    out, lse = (np.asarray(x, np.float32) for x in found)
    error = difference(out[real], np.asarray(wanted[0])[real])
    lse_error = float(np.abs(lse - np.asarray(wanted[1]))[real].max())
    finite = bool(np.isfinite(out).all() and (lse[~real] < -1e29).all())
    return {"difference": error, "lse_error": lse_error, "wrong": not (error < 6e-3 and lse_error < 5e-3 and finite)}


def rows() -> Iterator[Row]:
    for case in (
        (8, 4, 1, 128, 32, BF16, None, None),
        (2, 16, 1, 128, 64, BF16, None, 100),
        (3, 3, 1, 64, 32, BF16, None, None),
        (4, 1, 1, 96, 32, BF16, None, 700),
        (2, 16, 1, 256, 32, BF16, 50.0, 1024),
        (2, 4, 4, 128, 32, BF16, None, 333),
        (8, 4, 1, 128, 32, FP8, None, None),
        (3, 3, 1, 64, 32, FP8, 30.0, None),
        (2, 8, 2, 256, 32, FP8, None, None),
    ):
        K, G, Q, H, page, dtype, softcap, window = case
        name = f"right K={K} G={G} Q={Q} H={H} O={page} {jnp.dtype(dtype).name} softcap={softcap} window={window}"
        yield Row(name, partial(right, *case))
    for name in SHAPES:
        yield Row(name, partial(speed, name))
    for name in SWEPT:
        for tuning in TUNINGS:
            label = " ".join(f"{key}={value}" for key, value in tuning.items())
            yield Row(f"{name} {label}", partial(speed, name, **tuning))
