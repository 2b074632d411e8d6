"""Attention of one query token per row over paged latents on a Hopper GPU, by `cuda/latent_many.cu` and, for few heads,
`cuda/latent_few.cu`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels.cuda import call
from jaxllm.kernels.paged_attention import reference
from jaxllm.kernels.paged_attention.decode_cuda import Launch, attend
from jaxllm.kernels.paged_attention.types import Implementation

KERNEL = "latent_many"
"""On an H200 64 rows of 4,096 tokens take 151 us with 128 heads and 96 with 64, at 1,650 MHz, which is what products
leave of 1,980. With 128, values before keys take 162, no clusters 156, blocks of 32 tokens 175; with 64, keys before
values take 100, blocks of 32 tokens 102, and 6 more where the second-level cache is told two blocks ahead."""
FEW_HEADS = "latent_few"
VALUES = 512
"""Numbers of a token's value: those that all models with such attention have."""
FEW = 16
"""Query heads that `latent_few.cu` has: on an H200 64 rows of 4,096 tokens take 87 us with 8 heads and 93 with 16,
where the other kernel takes 99 with 16; its tiles of 64 make that the same work for all numbers up to 64."""
TILE = 64
"""Query heads of an item of work: the rows of one matrix instruction."""
BLOCK = 64
"""Tokens that are worked on at once; two stages of them fit into shared memory."""
MAX_ROWS = 128
"""Rows of a launch; their tables lie in shared memory."""
AHEAD = 2
"""Blocks of tokens that KERNEL tells the second-level cache of before they are wanted, where clusters read them."""
STAGES = 2
"""Blocks of tokens that fit into shared memory beside few heads."""


def configure(
    q_shape: tuple[int, ...],
    kv_shape: tuple[int, ...],
    width: int,
    values: int,
    *,
    scale: float,
    first: bool,
    whole: int | None = None,
    min_share: int | None = None,
    source: str | None = None,
    cluster: int | None = None,
    ahead: int | None = None,
    values_first: bool | None = None,
    processors: int = call.SMS,
    timeline: bool = False,
) -> Launch:
    """Macros and sizes for q_RQNH, kv_PYKOH with Y = K = 1, and pages_RW with W = width.

    whole, min_share: in blocks, of the longest rows that are not shared, and that are worth sharing a row for; None:
    256 tokens. source: the kernel; None: FEW_HEADS where it can, else KERNEL.
    Of KERNEL only: cluster: blocks of threads that share what they read; None: as many tiles as a row has, at most 2.
    ahead, values_first: see `latent_many.cu`. processors: of the GPU, each with a block of threads.
    timeline: whether the last of `results` has cycles of phases.
    Raises NotImplementedError for what the kernel cannot do.
    """
    R, Q, N, H = q_shape
    _, parts, K, O, _ = kv_shape
    if parts != 1 or K != 1 or Q != 1:
        raise NotImplementedError(f"{Q} query tokens over {parts} x {K} heads, not one over latents")
    if values != VALUES or H <= VALUES or H > VALUES + 64 or H % 64:
        raise NotImplementedError(f"latents of {H} numbers, {values} of them values")
    if N > TILE and N % TILE:
        raise NotImplementedError(f"{N} query heads: more than {TILE}, and no multiple")
    if O % 8:
        raise NotImplementedError(f"pages of {O} tokens, not a multiple of 8")
    source = source or (FEW_HEADS if N <= FEW else KERNEL)
    few = source == FEW_HEADS
    cluster = 1 if few else cluster or (2 if N % (2 * TILE) == 0 else 1)
    ctas = processors // cluster
    macros: dict[str, object] = {
        "HEADS": N,
        "H": H,
        "VALUES": values,
        "O": O,
        "W": width,
        "CTAS": ctas,
        "MIN_SHARE": min_share or (64 if few else 256) // BLOCK,
        "WHOLE": whole or 256 // BLOCK,
        "SCALE": repr(float(scale)),
        "FIRST": int(first),
    }
    tables = (12 if first else 8) * R + 4
    if few:
        if N > FEW:
            raise NotImplementedError(f"{N} query heads in the kernel for at most {FEW}")
        room = 8 if N <= 8 else 16
        macros |= {"HEADS_ROOM": room, "BLOCK": BLOCK, "STAGES": STAGES}
        shared = 2 * (room + STAGES * BLOCK) * H + 128 * room + 16 * room + 16 * STAGES + 48 + 2 * 12 * 4 + tables
        return fitting(Launch(macros, (R, -(-ctas // R)), 384, shared), R)
    if ahead is None:
        ahead = AHEAD if cluster > 1 else 0
    if values_first is None:
        values_first = cluster == 1
    macros |= {"CLUSTER": cluster, "BOX": math.gcd(O, BLOCK // cluster), "AHEAD": ahead}
    macros |= {"TIMELINE": int(timeline), "VALUES_FIRST": int(values_first)}
    shared = 2 * (TILE + 2 * BLOCK) * H + 24 * TILE + 8 * 2 * (9 + 1 + 2) + 48 + 2 * 12 * 4 + tables
    shared += 12 * 16 * 4 * timeline
    return fitting(Launch(macros, (R * cluster, -(-ctas // R)), 384, shared), R)


def fitting(launch: Launch, rows: int) -> Launch:
    """The launch, if its shared memory is not too much."""
    if launch.shared > call.MAX_SHARED:
        raise NotImplementedError(f"{rows} rows: their tables do not fit into shared memory")
    return launch


def source_of(launch: Launch) -> str:
    """The kernel of a launch, and the name of its source."""
    return FEW_HEADS if "HEADS_ROOM" in launch.macros else KERNEL


def choose(
    q_RQNH: jax.Array, kv_PYKOH: jax.Array, pages_RW: jax.Array, *, values: int, scale: float, softcap: float | None
) -> Implementation:
    """See `api.PLATFORMS`."""
    call.require(KERNEL)
    if q_RQNH.dtype != jnp.bfloat16 or kv_PYKOH.dtype != jnp.bfloat16:
        raise NotImplementedError(f"queries in {q_RQNH.dtype} and pages in {kv_PYKOH.dtype}")
    if softcap is not None:
        raise NotImplementedError("scores with a soft cap")
    if jax.default_backend() == "gpu":
        processors = getattr(jax.local_devices()[0], "core_count", call.SMS)
        if processors < call.SMS:
            raise NotImplementedError(f"{processors} multiprocessors, and each block wants one of {call.SMS}")
    return prepare(q_RQNH, kv_PYKOH, pages_RW, values=values, scale=scale)


def prepare(
    q_RQNH: jax.Array, kv_PYKOH: jax.Array, pages_RW: jax.Array, *, values: int, scale: float, **tuning: Any
) -> Implementation:
    """The kernel as an Implementation. tuning: arguments of `configure`."""
    rows, width = min(q_RQNH.shape[0], MAX_ROWS), pages_RW.shape[1]
    options: dict[str, Any] = {"scale": scale, **tuning}

    def launch_of(count: int, first: bool) -> Launch:
        return configure((count, *q_RQNH.shape[1:]), kv_PYKOH.shape, width, values, first=first, **options)

    launch_of(rows, False)

    def run(
        q_RQNH: jax.Array,
        kv_PYKOH: jax.Array,
        pages_RW: jax.Array,
        positions_RQ: jax.Array,
        first_RQ: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        parts = []
        for start in range(0, q_RQNH.shape[0], MAX_ROWS):
            some = slice(start, start + MAX_ROWS)
            q, first = q_RQNH[some], None if first_RQ is None else first_RQ[some]
            launch = launch_of(q.shape[0], first is not None)
            source = source_of(launch)
            ptx = call.compile_or_refuse(KERNEL, source, launch.macros)
            shapes = results(launch, q.shape)
            parts.append(attend(source, launch, ptx, shapes, q, kv_PYKOH, pages_RW[some], positions_RQ[some], first))
        out, lse = zip(*parts, strict=True)
        return (out[0], lse[0]) if len(parts) == 1 else (jnp.concatenate(out), jnp.concatenate(lse))

    return run


def results(launch: Launch, q_shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of what the kernel writes: out, lse, parts of both, counts of finished parts; maps, times."""
    R, Q, N, _ = q_shape
    values, ctas = int(str(launch.macros["VALUES"])), launch.ctas * int(str(launch.macros.get("CLUSTER", 1)))
    parts = (2 * ctas, min(N, TILE))
    written: list[tuple[tuple[int, ...], Any]] = [
        ((R, Q, N, values), jnp.bfloat16),
        ((R, Q, N), jnp.float32),
        ((*parts, values), jnp.float32),
        (parts, jnp.float32),
        ((ctas,), jnp.int32),
    ]
    if source_of(launch) == KERNEL:
        timed = ctas if launch.macros["TIMELINE"] else 1
        written += [((ctas, 128), jnp.uint8), ((timed, 12, 16), jnp.uint32)]
    return written


def check() -> None:
    """Raises ArithmeticError if a kernel differs from the reference on a small input."""
    cases = ((128, False, KERNEL), (128, True, KERNEL), (64, False, KERNEL), (32, False, KERNEL), (16, True, FEW_HEADS))
    rng = np.random.default_rng(0)
    for N, windowed, source in cases:
        R, O, H, W = 5, 32, VALUES + 64, 40
        q = jnp.asarray(rng.standard_normal((R, 1, N, H)), jnp.bfloat16)
        kv = jnp.asarray(rng.standard_normal((R * W, 1, 1, O, H)), jnp.bfloat16)
        pages = jnp.asarray(rng.permutation(R * W).reshape(R, W), jnp.int32)
        positions = jnp.asarray([[0], [77], [-1], [1279], [640]], jnp.int32)
        first = positions - 300 if windowed else None
        scale = H**-0.5
        kernel = prepare(q, kv, pages, values=VALUES, scale=scale, source=source)
        found = jax.jit(kernel)(q, kv, pages, positions, first)

        def plain(*arguments: Any, scale: float = scale) -> tuple[jax.Array, jax.Array]:
            return reference.attend(*arguments, scale=scale, values=VALUES)

        wide = (q.astype(jnp.float32), kv.astype(jnp.float32))
        wanted = jax.jit(plain)(*wide, pages, positions, first)
        real = np.asarray(positions) >= 0
        for a, b in zip(found, wanted, strict=True):
            difference = np.asarray(a, np.float32)[real] - np.asarray(b)[real]
            error = np.linalg.norm(difference) / np.linalg.norm(np.asarray(b)[real])
            if not error < 0.01:
                raise ArithmeticError(f"wrong by {error:.1e} of the result with {N} heads")
