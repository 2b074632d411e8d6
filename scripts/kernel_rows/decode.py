"""Paged decode attention: against the reference, its speed, and a sweep of what cannot be decided without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from kernel_rows._measure import BANDWIDTH, Row, all_right, decode_errors, difference, rate, time_call

from jaxllm.kernels.linear.product import Product
from jaxllm.kernels.paged_attention import decode_cuda, reference, rope_cuda
from jaxllm.kernels.rope_write import cuda as rope_write

O = 32
BF16, FP8 = jnp.bfloat16, jnp.float8_e4m3fn
LLAMA = (8, 4, 128)
"""K, G, H"""
SHAPES: dict[str, tuple[list[int], tuple[int, int, int], Any]] = {
    # lengths of the rows, K G H, dtype of the pages
    "B=64 x 2048": ([2048] * 64, LLAMA, BF16),
    "B=1 x 8192": ([8192], LLAMA, BF16),
    "B=256 x 100..2000": (list(np.random.default_rng(0).integers(100, 2000, 256)), LLAMA, BF16),
    "B=64 x 2048 + 64 padding": ([2048] * 64 + [0] * 64, LLAMA, BF16),
    "fp8 B=64 x 2048": ([2048] * 64, LLAMA, FP8),
    "fp8 B=8 x 32768": ([32_768] * 8, LLAMA, FP8),
    "tp2 B=64 x 2048": ([2048] * 64, (4, 4, 128), BF16),
    "G=8 B=64 x 2048": ([2048] * 64, (8, 8, 128), BF16),
    "H=256 B=32 x 2048": ([2048] * 32, (8, 2, 256), BF16),
    "H=64 B=64 x 2048": ([2048] * 64, (3, 3, 64), BF16),
}
TIMED_REFERENCE = ("B=64 x 2048", "B=1 x 8192")
SHORT = {1: 128, 8: 24, 64: 8, 128: 8, 256: 6}
"""Calls of a program by the rows of one, of 160 tokens: together more than the second cache holds."""
CONTEXTS = (160, 192, 255, 257, 320, 384)
"""Tokens of rows whose time is measured with pages in order and in any order."""
LONG = {(1, 131_072): 4, (8, 32_768): 2, (64, 2048): 4}
"""Calls by rows and tokens."""
TUNINGS: dict[str, tuple[dict[str, int], ...]] = {
    "B=1 x 160": ({"warps": 4}, {"warps": 8, "resident": 1}),
    "B=64 x 160": ({"warps": 12, "resident": 1}, {"warps": 8, "resident": 1}, {"resident": 3}, {"whole": 0}),
    "B=256 x 256": ({"whole": 6}, {"whole": 0}, {"whole": 6, "resident": 2}, {"whole": 0, "resident": 2}),
    "B=128 x 256": ({"whole": 6}, {"whole": 0}),
    "B=64 x 256": ({"whole": 6}, {"whole": 0}),
    "B=1 x 131072": ({"warps": 4},),
}


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


def chain(attend: Any, q: jax.Array, kv: jax.Array, tables: list[jax.Array], positions: Any) -> jax.Array:
    """One call for each table, each on the output of the one before. positions: of each call, or of all."""
    for i, table in enumerate(tables):
        q = attend(q, kv, table, positions[i] if isinstance(positions, list) else positions)[0]
    return q


def equal_rows(
    rows: int, tokens: int, calls: int, *, ordered: bool = False, copies: int = 1, **tuning: int
) -> tuple[float, float]:
    """Seconds of a call for rows of a length, as in a step: no call finds anything of its own in the cache; and bytes.

    Tables are as wide as the longest context of 8,192 or more needs. ordered: a row's pages follow one another.
    copies: of 2 GiB of pages, over which those of a call are spread.
    """
    K, G, H = LLAMA
    used, width = -(-tokens // O), max(8192, tokens) // O
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.standard_normal((rows, 1, K * G, H)), BF16)
    kv = pool(K, H, BF16, 2**31 // (2 * K * O * H * 2))
    kv = jnp.tile(kv, (copies, 1, 1, 1, 1)) if copies > 1 else kv
    positions = jnp.full((rows, 1), tokens - 1, jnp.int32)
    ids = np.zeros((calls, rows, width), np.int32)
    each = max(1, kv.shape[0] // (rows * used))  # calls with pages of their own
    for i in range(calls):
        if i % each == 0:
            order = np.arange(kv.shape[0]) if ordered else rng.permutation(kv.shape[0])
        ids[i, :, :used] = order[i % each * rows * used :][: rows * used].reshape(rows, used)
    tables, places = [jnp.asarray(table) for table in ids], [positions + 0 for _ in ids]
    attend = decode_cuda.prepare(q, kv, tables[0], scale=H**-0.5, softcap=None, **tuning)
    seconds = time_call(jax.jit(partial(chain, attend)), q, kv, tables, places, calls=calls)
    return seconds, float(2 * K * H * rows * tokens * 2)


def short() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for rows in (1, 8, 64, 256):
        calls = SHORT[rows]
        seconds, moved = equal_rows(rows, 160, calls)
        found |= {f"b{rows}_us": seconds * 1e6, f"b{rows}_floor_us": moved / BANDWIDTH * 1e6}
    return found


def long() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for (rows, tokens), calls in LONG.items():
        seconds, moved = equal_rows(rows, tokens, calls)
        found |= {f"{rows}x{tokens}_us": seconds * 1e6, f"{rows}x{tokens}_of_roof": moved / BANDWIDTH / seconds}
    return found


def contexts(rows: int) -> dict[str, Any]:
    """Microseconds by tokens: pages in any order, in order, and the floor; then pages in any order of 32 GiB."""
    found: dict[str, Any] = {}
    for tokens in CONTEXTS:
        times = [equal_rows(rows, tokens, SHORT[rows], ordered=ordered) for ordered in (False, True)]
        found[str(tokens)] = " ".join(f"{1e6 * t:.1f}" for t in (*(t for t, _ in times), times[0][1] / BANDWIDTH))
    found["255 of 32 GiB"] = f"{1e6 * equal_rows(rows, 255, SHORT[rows], copies=16)[0]:.1f}"
    return found


def rotated(rows: int, tokens: int) -> dict[str, Any]:
    """Microseconds of attention with what is new, by one kernel (us) and by two (two_us), twice each in turns; both
    have a copy of the queries beside them.
    """
    K, G, H = LLAMA
    calls, used = SHORT[rows], -(-tokens // O)
    rng = np.random.default_rng(1)
    kv = pool(K, H, BF16, 2**31 // (2 * K * O * H * 2))
    qkv = jnp.asarray(rng.standard_normal((rows, (G + 2) * K * H)), BF16)
    ids = rng.permutation(kv.shape[0])[: min(calls, kv.shape[0] // (rows * used)) * rows * used]
    tables = [jnp.asarray(table, jnp.int32) for table in np.resize(ids, (calls, rows, used))]
    angle = jnp.asarray(rng.uniform(0, 6, (rows, 1, H // 2)), jnp.float32)
    positions, slots = jnp.full(rows, tokens - 1, jnp.int32), jnp.full(rows, (tokens - 1) % O, jnp.int32)
    one = rope_cuda.implementation(qkv.shape, kv, used, H**-0.5, None)
    around = (jnp.cos(angle), jnp.sin(angle))

    def two(qkv: jax.Array, cos: Any, sin: Any, kv: jax.Array, page: Any, slot: Any, table: Any, at: Any) -> Any:
        given = (Product.of(qkv), cos, sin, kv, page, slot, None, None)
        q, kv = rope_write.choose(*given, eps=0.0)(*given)
        attend = decode_cuda.prepare(q[:, None], kv, table, scale=H**-0.5, softcap=None)
        return attend(q[:, None], kv, table, at[:, None])[0][:, 0], kv

    def program(way: Any, qkv: jax.Array, tables: list[jax.Array], kv: jax.Array) -> tuple[jax.Array, jax.Array]:
        rest = qkv[:, G * K * H :]
        for table in tables:
            out, kv = way(qkv, *around, kv, table[:, -1], slots, table, positions)
            qkv = lax.optimization_barrier(jnp.concatenate([out.reshape(rows, -1), rest], axis=1))
        return qkv, kv

    found: dict[str, Any] = {"floor_us": 2 * K * H * rows * tokens * 2 / BANDWIDTH * 1e6}
    state = [kv + 0]
    runs = {name: jax.jit(partial(program, way), donate_argnums=2) for name, way in (("us", one), ("two_us", two))}
    outs = []
    for again in ("", "again_"):
        for name, run in runs.items():

            def once(run: Any = run) -> jax.Array:
                out, state[0] = run(qkv, tables, state[0])
                return out

            outs.append(np.asarray(once(), np.float32))
            found[again + name] = time_call(once, calls=calls, seconds=0.02) * 1e6
    found["difference"] = max(difference(out, outs[0]) for out in outs)
    return found | {"wrong": not found["difference"] < 0.02}


def tuned(name: str, **tuning: int) -> dict[str, Any]:
    rows, tokens = (int(word) for word in name.removeprefix("B=").split(" x "))
    seconds, moved = equal_rows(rows, tokens, SHORT.get(rows, 16) if tokens < 1000 else 4, **tuning)
    return rate(seconds, moved=moved)


def speed(name: str) -> dict[str, Any]:
    lengths, heads, dtype = SHAPES[name]
    K, _, H = heads
    calls = 16 if sum(lengths) > 10_000 else 48
    q, kv, tables, positions = arguments(lengths, heads, dtype, calls)
    options: dict[str, Any] = {"scale": H**-0.5, "softcap": None}
    attend = decode_cuda.prepare(q, kv, tables[0], **options)
    moved = 2 * K * H * sum(lengths) * jnp.dtype(dtype).itemsize
    seconds = time_call(jax.jit(partial(chain, attend)), q, kv, tables, positions, calls=calls)
    found = rate(seconds, moved=moved)
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


def errors(
    K: int, G: int, Q: int, H: int, page: int, dtype: Any, softcap: float | None, window: int | None
) -> tuple[float, float, bool]:
    """Of results and lse against float32, and whether that is too much: rows of very different lengths, some empty."""
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
    return decode_errors(found, wanted, positions)


def right() -> dict[str, Any]:
    return all_right(CASES, errors)


CASES = (
    # K, G, Q, H, O, dtype of the pages, softcap, window
    (8, 4, 1, 128, 32, BF16, None, None),
    (2, 16, 1, 128, 64, BF16, None, 100),
    (3, 3, 1, 64, 32, BF16, None, None),
    (4, 1, 1, 96, 32, BF16, None, 700),
    (2, 16, 1, 256, 32, BF16, 50.0, 1024),
    (2, 4, 4, 128, 32, BF16, None, 333),
    (8, 4, 1, 128, 32, FP8, None, None),
    (3, 3, 1, 64, 32, FP8, 30.0, None),
    (2, 8, 2, 256, 32, FP8, None, None),
)


def rows() -> Iterator[Row]:
    yield Row("right", right)
    yield Row("short", short)
    yield Row("long", long)
    for rows in (64, 256):
        yield Row(f"contexts of {rows} rows", partial(contexts, rows))
    for rows in (8, 256, 64, 128, 1):
        yield Row(f"rotated {rows} x 256", partial(rotated, rows, 256))
    for name in SHAPES:
        yield Row(name, partial(speed, name))
    for name, tunings in TUNINGS.items():
        for tuning in tunings:
            label = " ".join(f"{key}={value}" for key, value in tuning.items())
            yield Row(f"{name} {label}", partial(tuned, name, **tuning))
