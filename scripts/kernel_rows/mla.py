"""Decode attention over latents (MLA): against the reference, and its speed with all heads on a GPU and with some."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernel_rows._measure import BANDWIDTH, FLOPS, Row, all_right, decode_errors, time_call

from jaxllm.kernels.cuda import call, rtc
from jaxllm.kernels.paged_attention import latent_cuda, reference

O, VALUES, H = 32, latent_cuda.VALUES, latent_cuda.VALUES + 64
BF16 = jnp.bfloat16
SCALE = (128 + 64) ** -0.5
CASES = (
    # N, page, window
    (128, 32, None),
    (16, 64, None),
    (64, 32, 700),
    (5, 16, None),
    (32, 32, None),
)
LARGE = (
    (64, 4096, 128),
    (8, 4096, 128),
    (64, 4096, 16),
    (64, 4096, 64),
    (5, 20_000, 64),
)
"""Rows, tokens, query heads: as large as those whose speed is measured."""
SPEEDS = (
    (64, 4096, 128),
    (64, 4096, 16),
    (64, 4096, 8),
    (64, 4096, 64),
    (8, 4096, 128),
    (1, 4096, 16),
    (1, 131_072, 16),
    (128, 512, 16),
)
"""Rows, tokens, query heads."""


def errors(N: int, page: int, window: int | None, **tuning: Any) -> tuple[float, float, bool]:
    """Of results and lse against float32, and whether that is too much: rows of very different lengths, some empty."""
    rng = np.random.default_rng(2)
    R, W = 37, 4096 // page
    q = jnp.asarray(rng.standard_normal((R, 1, N, H)), BF16)
    kv = jnp.asarray(rng.standard_normal((R * W, 1, 1, page, H), np.float32), BF16)
    pages = jnp.asarray(rng.permutation(R * W).reshape(R, W), jnp.int32)
    lengths = np.where(rng.random((R, 1)) < 0.2, 0, rng.integers(1, 4097, (R, 1)) // rng.integers(1, 100, (R, 1)))
    positions = jnp.asarray(lengths - 1, jnp.int32)
    first = None if window is None else positions - window + 1
    return compare(q, kv, pages, positions, first, **tuning)


def large_errors(rows: int, tokens: int, heads: int, **tuning: Any) -> tuple[float, float, bool]:
    """The same for rows of nearly as many tokens."""
    rng = np.random.default_rng(4)
    used, kv = -(-tokens // O), latents()
    q = jnp.asarray(rng.standard_normal((rows, 1, heads, H)), BF16)
    pages = jnp.asarray(rng.permutation(kv.shape[0])[: rows * used].reshape(rows, used), jnp.int32)
    positions = jnp.asarray(tokens - 1 - np.arange(rows)[:, None] % 40, jnp.int32)
    return compare(q, kv, pages, positions, None, **tuning)


def compare(
    q: jax.Array, kv: jax.Array, pages: jax.Array, positions: jax.Array, first: jax.Array | None, **tuning: Any
) -> tuple[float, float, bool]:
    kernel = latent_cuda.prepare(q, kv, pages, values=VALUES, scale=SCALE, **tuning)
    found = jax.jit(kernel)(q, kv, pages, positions, first)
    with jax.default_matmul_precision("highest"):
        plain = jax.jit(partial(reference.attend, scale=SCALE, values=VALUES))
        wanted = plain(q.astype(jnp.float32), kv.astype(jnp.float32), pages, positions, first)
    return decode_errors(found, wanted, positions)


def right(**tuning: Any) -> dict[str, Any]:
    return all_right(CASES, partial(errors, **tuning))


def right_large(**tuning: Any) -> dict[str, Any]:
    latents()
    return all_right(LARGE, partial(large_errors, **tuning))


@cache
def latents() -> jax.Array:
    """A pool of 1.2 GB."""
    return jax.random.normal(jax.random.key(0), (2**15, 1, 1, O, H), BF16)


def chain(attend: Any, q: jax.Array, kv: jax.Array, tables: list[jax.Array], positions: jax.Array) -> jax.Array:
    """One call for each table, each after the one before: what it changes of the positions is nothing."""
    for table in tables:
        out, _ = attend(q, kv, table, positions)
        positions = positions + (out[:, :, 0, 0] > 1e30)  # also where it is NaN, which must not move them
    return out


def bare(launch: Any, q_shape: tuple[int, ...]) -> Callable[..., list[jax.Array]]:
    """All that a kernel writes, for queries, latents, pages and positions, and what came of the call before: the kernel
    is given it as the first visible tokens, which it does not look at, so that nothing is between two calls."""
    source = latent_cuda.source_of(launch)
    ptx = rtc.compile_ptx(source, launch.macros)
    shapes = [jax.ShapeDtypeStruct(*shape) for shape in latent_cuda.results(launch, q_shape)]

    def run(*arguments: jax.Array) -> list[jax.Array]:
        zeros = jnp.zeros(shapes[4].shape, jnp.int32)
        return call.launch(
            source,
            ptx,
            (*arguments, zeros),
            shapes,
            grid=launch.grid,
            threads=launch.threads,
            shared=launch.shared,
            aliases={5: 4},
        )

    return run


def bare_speed(rows: int, tokens: int, heads: int, **tuning: Any) -> dict[str, Any]:
    """Of calls that nothing but zeros of counts is between."""
    used, kv = -(-tokens // O), latents()
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.standard_normal((rows, 1, heads, H)), BF16)
    ids = [rng.permutation(kv.shape[0])[: rows * used].reshape(rows, used) for _ in range(4)]
    tables = [jnp.asarray(table, jnp.int32) for table in ids]
    positions = jnp.full((rows, 1), tokens - 1, jnp.int32)
    launch = latent_cuda.configure(q.shape, kv.shape, used, VALUES, scale=SCALE, first=False, **tuning)
    one = bare(launch, q.shape)

    def chain(q: jax.Array, kv: jax.Array, tables: list[jax.Array], positions: jax.Array) -> jax.Array:
        found = one(q, kv, tables[0], positions, positions)
        for table in tables[1:]:
            found = one(q, kv, table, positions, found[4])
        return found[0]

    return {"us": 1e6 * time_call(jax.jit(chain), q, kv, tables, positions, calls=4)}


def speed(rows: int, tokens: int, heads: int, reference_too: bool, **tuning: Any) -> dict[str, Any]:
    used, kv = -(-tokens // O), latents()
    calls = 4 if rows * tokens > 100_000 else 16
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.standard_normal((rows, 1, heads, H)), BF16)
    ids = [rng.permutation(kv.shape[0])[: rows * used].reshape(rows, used) for _ in range(calls)]
    tables = [jnp.asarray(table, jnp.int32) for table in ids]
    positions = jnp.full((rows, 1), tokens - 1, jnp.int32)
    kernel = latent_cuda.prepare(q, kv, tables[0], values=VALUES, scale=SCALE, **tuning)
    seconds = time_call(jax.jit(partial(chain, kernel)), q, kv, tables, positions, calls=calls)
    memory = 2 * H * rows * tokens / BANDWIDTH
    products = 2 * (H + VALUES) * heads * rows * tokens / FLOPS
    found = {
        "us": seconds * 1e6,
        "memory_floor_us": memory * 1e6,
        "product_floor_us": products * 1e6,
        "floor_percent": 100 * max(memory, products) / seconds,
    }
    if reference_too:
        plain = jax.jit(partial(chain, partial(reference.attend, scale=SCALE, values=VALUES)))
        found["reference_us"] = time_call(plain, q, kv, tables[:1], positions, calls=1) * 1e6
    return found


PHASES = (
    "start",
    "queries",
    "keys",
    "their_weights",
    "scores",
    "softmax",
    "their_values",
    "values",
    "results",
    "merge",
    "told",
    "map",
    "tables",
    "cluster",
)


def phases(rows: int, tokens: int, heads: int, **tuning: Any) -> dict[str, Any]:
    """Median cycles of the phases of `latent_many.cu`, of all blocks of threads that had work, for a warp of either
    warpgroup and the one that copies, whose "keys" are waits for room, "their_values" copies, "scores" prefetches and
    "values" pages; of those of the loop, for 64 tokens."""
    used, kv = -(-tokens // O), latents()
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.standard_normal((rows, 1, heads, H)), BF16)
    pages = jnp.asarray(rng.permutation(kv.shape[0])[: rows * used].reshape(rows, used), jnp.int32)
    positions = jnp.full((rows, 1), tokens - 1, jnp.int32)
    launch = latent_cuda.configure(
        q.shape, kv.shape, used, VALUES, scale=SCALE, first=False, source=latent_cuda.KERNEL, timeline=True, **tuning
    )
    run = jax.jit(bare(launch, q.shape))
    for _ in range(3):
        times = np.asarray(run(q, kv, pages, positions, positions)[-1], np.int64)
    worked = times[times[:, 0, 2] > 0]
    blocks = rows * -(-tokens // 64) * (2 if heads > 64 else 1) / max(1, len(worked))
    found: dict[str, Any] = {"worked": len(worked), "blocks": blocks}
    done = worked[:, 0, :14].sum(1) - worked[:, 0, PHASES.index("merge")]  # until there is nothing left but to merge
    late = (worked[:, 0, 15] - worked[:, 0, 15].min()) % 2**32
    found |= {"done_first": int(done.min()), "done_median": int(np.median(done)), "done_last": int(done.max())}
    found |= {"ns": int(np.median(worked[:, 0, 14])), "ns_most": int((late + worked[:, 0, 14]).max())}
    found |= {"began_late_ns": int(late.max())}
    for warp in (0, 4, 8):
        for which, name in enumerate(PHASES):
            each = blocks if 2 <= which <= 7 or which == 10 else 1
            found[f"{name}_{warp // 4}"] = int(np.median(worked[:, warp, which]) / each)
    return found


def rows() -> Iterator[Row]:
    many: dict[str, Any] = {"source": latent_cuda.KERNEL}
    yield Row("right", right)
    yield Row("right large", right_large)
    yield Row("right large many", partial(right_large, **many))
    for count, heads in ((64, 64), (64, 128), (8, 128)):
        yield Row(f"phases B={count} x 4096, {heads} heads", partial(phases, count, 4096, heads))
    for heads in (128, 64):
        yield Row(f"bare B=64 x 4096, {heads} heads", partial(bare_speed, 64, 4096, heads))
    for i, (count, tokens, heads) in enumerate(SPEEDS):
        yield Row(f"speed B={count} x {tokens}, {heads} heads", partial(speed, count, tokens, heads, i < 2))
