"""Paged attention of a few query tokens per row on a Hopper GPU, by `cuda/paged_decode.cu`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels.cuda import call
from jaxllm.kernels.paged_attention import reference
from jaxllm.kernels.paged_attention.types import Implementation

KERNEL = "paged_decode"
HEAD_DIMS = (64, 96, 128, 256)
MAX_QUERIES = 16
"""Query heads of a KV head times query tokens of a row: the rows of one matrix instruction."""
TOKENS = 16
"""Tokens of a warp's block."""
TALL = 12
"""Warps of a block for few items: 192 tokens at once."""
WHOLE = 192 * 1024
"""Bytes of keys and values of one head that one block of threads reads sooner than several could share and merge."""
MANY = 4
"""Items for each block of threads, from which on they count what there is in any case; 256 rows of 256 tokens take 66.9
us so on an H200 (Llama-3.1-8B's heads), and 70.1 otherwise."""
SM_SHARED = 228 * 1024
"""Bytes of shared memory of a multiprocessor; each block takes 1 KiB more than it asks for."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How the kernel is compiled and launched."""

    macros: dict[str, object]
    grid: tuple[int, int]
    threads: int
    shared: int

    @property
    def ctas(self) -> int:
        """Blocks that have work."""
        return int(str(self.macros["CTAS"]))


def configure(
    q_shape: tuple[int, ...],
    kv_shape: tuple[int, ...],
    width: int,
    *,
    fp8: bool,
    scale: float,
    softcap: float | None,
    first: bool,
    rope: bool = False,
    warps: int | None = None,
    resident: int | None = None,
    min_share: int | None = None,
    whole: int | None = None,
) -> Launch:
    """Macros and sizes for q_RQNH, kv_PYKOH and pages_RW with W = width; rope: for the kernel that also rotates.

    warps, resident: of a block, and blocks of a multiprocessor; None: what fills its shared memory well, and where each
    item has a multiprocessor of its own, one tall block, which has less to do one after the other. min_share: blocks of
    tokens worth sharing an item for; None: 128 tokens or more. whole: blocks of tokens of the longest rows that are not
    shared; None: WHOLE bytes. Raises NotImplementedError for what the kernel cannot do.
    """
    R, Q, N, H = q_shape
    _, _, K, O, _ = kv_shape
    queries = N // K * Q
    if H not in HEAD_DIMS:
        raise NotImplementedError(f"head dim {H}, not one of {HEAD_DIMS}")
    if queries > MAX_QUERIES:
        raise NotImplementedError(f"{queries} queries for each KV head, and at most {MAX_QUERIES} share what is read")
    if O % TOKENS:
        raise NotImplementedError(f"pages of {O} tokens, not a multiple of {TOKENS}")
    token = 2 * H * (1 if fp8 else 2)  # bytes of a key and a value
    if warps is None and resident is None and R * K <= call.SMS and 2 * TALL * TOKENS * token <= WHOLE:
        warps, resident = TALL, 1
    warps = warps or 4
    stage = warps * TOKENS * token
    if resident is None:
        # Bytes under way cover the latency of memory at any of these; small tiles want more warps to compute on them.
        resident = {8: 4, 16: 3, 24: 2, 32: 2, 64: 1}.get(stage // 1024 * 4 // warps, 3)
    fixed = 2 * warps * 16 * 4 + 8 * warps + 12 * (R + 1)
    room = min(SM_SHARED // resident - 1024, call.MAX_SHARED) - fixed
    held = stage + rope * warps * H * 4
    stages = min(6, room // held)
    if stages < 2:
        raise NotImplementedError(f"{R} rows: their tables do not fit into shared memory")
    ctas = call.SMS * resident
    macros: dict[str, object] = {
        "H": H,
        "G": N // K,
        "Q": Q,
        "K": K,
        "O": O,
        "W": width,
        "WARPS": warps,
        "STAGES": stages,
        "CTAS": ctas,
        "RESIDENT": resident,
        "MIN_SHARE": min_share or -(-128 // (warps * TOKENS)),
        "WHOLE": (0 if MANY * ctas < R * K else max(2, min(8, WHOLE // stage))) if whole is None else whole,
        "SCALE": repr(float(scale)),
        "SOFTCAP": repr(float(softcap)) if softcap else "0",
        "FP8": int(fp8),
        "FIRST": int(first),
    }
    return Launch(macros, (R, -(-ctas // R)), 32 * warps, stages * held + fixed)


def choose(
    q_RQNH: jax.Array, kv_PYKOH: jax.Array, pages_RW: jax.Array, *, scale: float, softcap: float | None
) -> Implementation:
    """See `api.PLATFORMS`."""
    call.require(KERNEL)
    if q_RQNH.dtype != jnp.bfloat16 or kv_PYKOH.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        raise NotImplementedError(f"queries in {q_RQNH.dtype} and pages in {kv_PYKOH.dtype}")
    return prepare(q_RQNH, kv_PYKOH, pages_RW, scale=scale, softcap=softcap)


def prepare(
    q_RQNH: jax.Array, kv_PYKOH: jax.Array, pages_RW: jax.Array, *, scale: float, softcap: float | None, **tuning: int
) -> Implementation:
    """The kernel as an Implementation, compiled for these shapes. tuning: arguments of `configure`."""
    fp8 = kv_PYKOH.dtype == jnp.float8_e4m3fn
    shapes = (q_RQNH.shape, kv_PYKOH.shape, pages_RW.shape[1])
    options: dict[str, Any] = {"fp8": fp8, "scale": scale, "softcap": softcap, **tuning}
    for first in (False, True):
        configure(*shapes, first=first, **options)

    def run(
        q_RQNH: jax.Array,
        kv_PYKOH: jax.Array,
        pages_RW: jax.Array,
        positions_RQ: jax.Array,
        first_RQ: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        launch = configure(*shapes, first=first_RQ is not None, **options)
        ptx = call.compile_or_refuse(KERNEL, KERNEL, launch.macros)
        return attend(
            KERNEL, launch, ptx, results(launch, q_RQNH.shape), q_RQNH, kv_PYKOH, pages_RW, positions_RQ, first_RQ
        )

    return run


def results(launch: Launch, q_shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of what the kernel writes: out, lse, parts of both, and counts of finished parts."""
    R, Q, N, H = q_shape
    queries = int(str(launch.macros["G"])) * Q
    return [
        (q_shape, jnp.bfloat16),
        ((R, Q, N), jnp.float32),
        ((2 * launch.ctas, queries, H), jnp.float32),
        ((2 * launch.ctas, queries), jnp.float32),
        ((launch.ctas,), jnp.int32),
    ]


def attend(
    kernel: str,
    launch: Launch,
    ptx: str,
    written: Sequence[tuple[tuple[int, ...], Any]],
    q_RQNH: jax.Array,
    kv_PYKOH: jax.Array,
    pages_RW: jax.Array,
    positions_RQ: jax.Array,
    first_RQ: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """One launch of a kernel of decode attention. written: as `results`."""
    shapes = [jax.ShapeDtypeStruct(*result) for result in written]
    first = positions_RQ if first_RQ is None else first_RQ
    arguments = [q_RQNH, kv_PYKOH, pages_RW, positions_RQ, first, jnp.zeros(shapes[4].shape, jnp.int32)]
    out, lse, *_ = call.launch(
        kernel,
        ptx,
        arguments,
        shapes,
        grid=launch.grid,
        threads=launch.threads,
        shared=launch.shared,
        aliases={5: 4},
    )
    return out, lse


def check() -> None:
    """Raises ArithmeticError if the kernel differs from the reference on a small input."""
    rng = np.random.default_rng(0)
    for dtype, G, H, softcap, windowed in ((jnp.bfloat16, 4, 128, None, False), (jnp.float8_e4m3fn, 2, 64, 9.0, True)):
        R, K, O, W = 5, 2, 32, 40
        q = jnp.asarray(rng.standard_normal((R, 1, K * G, H)), jnp.bfloat16)
        kv = jnp.asarray(rng.standard_normal((R * W, 2, K, O, H)), dtype)
        pages = jnp.asarray(rng.permutation(R * W).reshape(R, W), jnp.int32)
        positions = jnp.asarray([[0], [77], [-1], [1279], [640]], jnp.int32)
        first = positions - 300 if windowed else None
        options: dict[str, Any] = {"scale": H**-0.5, "softcap": softcap}
        found = jax.jit(prepare(q, kv, pages, **options))(q, kv, pages, positions, first)
        wide = kv.astype(jnp.float32)
        wanted = jax.jit(partial(reference.attend, **options))(q.astype(jnp.float32), wide, pages, positions, first)
        real = np.asarray(positions) >= 0
        for a, b in zip(found, wanted, strict=True):
            difference = np.asarray(a, np.float32)[real] - np.asarray(b)[real]
            error = np.linalg.norm(difference) / np.linalg.norm(np.asarray(b)[real])
            if not error < 0.01:
                raise ArithmeticError(f"wrong by {error:.1e} of the result with pages in {jnp.dtype(dtype).name}")
