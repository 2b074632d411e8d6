"""Attention of prompt tiles over pages by the CUDA kernels `cuda/paged_prefill.cu` (wgmma) and `paged_prefill_mma.cu`.

The first is the fast one. Each is used only if its own check at start was passed, so that the second, which needs
nothing that is special to Hopper, stands in for the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels.cuda import call
from jaxllm.kernels.paged_attention import reference, tiles
from jaxllm.kernels.paged_attention.types import Implementation

MAX_GROUP = 16
MAP_WORDS = 32
"""Of the tensor map that a block of threads makes of the pool."""
FP8 = jnp.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compile a kernel for a head dim.

    block: keys of a step. stages: buffers for keys and values, if shared memory holds so many.
    macros: beyond those of `prefill.cuh`.
    persistent: one block of threads stays on each multiprocessor, instead of one for each tile.
    """

    kernel: str
    block: int
    stages: int
    threads: int
    persistent: bool
    macros: tuple[tuple[str, int], ...]

    def shared(self, head_dim: int, fp8: bool = False) -> int:
        """Bytes of shared memory."""
        return self._bytes(self.stages_of(head_dim, fp8), head_dim, fp8)

    def stages_of(self, head_dim: int, fp8: bool = False) -> int:
        """Buffers for keys, and for values: at least two; pages of e4m3 need room to be converted."""
        fitting = (n for n in range(self.stages, 2, -1) if self._bytes(n, head_dim, fp8) <= call.MAX_SHARED)
        return next(fitting, 2)

    def _bytes(self, stages: int, head_dim: int, fp8: bool) -> int:
        barriers = 16 * (1 + 2 * stages) if self.persistent else 0
        packed = 2 * self.block * head_dim if fp8 else 0
        return 2 * head_dim * (tiles.ROWS + 2 * stages * self.block) + packed + barriers


def wgmma(block: int, stages: int = 3) -> Variant:
    """FlashAttention-3: a warpgroup that copies, two that multiply."""
    return Variant("paged_prefill", block, stages, 384, True, ())


def mma(block: int, tall: int) -> Variant:
    """FlashAttention-2: warps of 16 * tall rows."""
    warps = tiles.ROWS // (16 * tall)
    macros = (("WARPS", warps), ("TALL", tall))
    return Variant("paged_prefill_mma", block, 2, warps * 32, False, macros)


VARIANTS: Mapping[int, tuple[Variant, Variant]] = {
    64: (wgmma(128), mma(64, tall=2)),
    96: (wgmma(128), mma(64, tall=2)),
    128: (wgmma(128), mma(32, tall=2)),
    256: (wgmma(64), mma(32, tall=1)),
}
"""By head dim, in the order of preference: what shared memory (227 KiB) and registers hold, without spills up to 128.

Measured on an H200 (jax 0.11.2) over 8,000 tokens of Llama-3.1-8B: 913 us; 954 with copies by threads, cuDNN 1,025."""


def choose(
    q_RQNH: jax.Array | jax.ShapeDtypeStruct,
    kv_PYKOH: jax.Array,
    pages_RW: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    before: int = 0,
) -> Implementation:
    """See `api.PLATFORMS`; before: see `run`. Raises NotImplementedError where another implementation must do it."""
    if q_RQNH.shape[1] == 1:
        raise NotImplementedError("one query token is decoding")
    if q_RQNH.shape[-1] not in VARIANTS:
        raise NotImplementedError(f"head dim {q_RQNH.shape[-1]} is none of {', '.join(map(str, VARIANTS))}")
    reasons = []
    for variant in VARIANTS[q_RQNH.shape[-1]]:
        try:
            call.require(variant.kernel)
            how: dict[str, Any] = {"scale": scale, "softcap": softcap, "before": before}
            return partial(run, variant=variant, ptx=compile_variant(variant, q_RQNH, kv_PYKOH, pages_RW, **how))
        except NotImplementedError as reason:
            reasons.append(str(reason))
    raise NotImplementedError("; ".join(reasons))


def macros_of(
    variant: Variant,
    q_shape: tuple[int, ...],
    kv_shape: tuple[int, ...],
    *,
    fp8: bool,
    scale: float,
    softcap: float | None,
    before: int = 0,
) -> dict[str, object]:
    """The macros that the variant is compiled with; the numbers of rows, tokens and pages are no part of them."""
    cap = softcap or 0.0
    return {
        "HEAD_DIM": q_shape[-1],
        "GROUP": q_shape[-2] // kv_shape[2],
        "KV_HEADS": kv_shape[2],
        "PAGE": kv_shape[3],
        "SCALE_LOG2": f"{scale * math.log2(math.e):.9e}f",
        "SOFTCAP": f"{cap:.9e}f",
        "BLOCK_M": tiles.ROWS,
        "BLOCK_N": variant.block,
        "STAGES": variant.stages_of(q_shape[-1], fp8),
        "FP8": int(fp8),
        "BEFORE": before,
        **dict(variant.macros),
    }


def compile_variant(
    variant: Variant,
    q_RQNH: jax.Array | jax.ShapeDtypeStruct,
    kv_PYKOH: jax.Array,
    pages_RW: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    before: int = 0,
) -> str:
    """PTX for these shapes. Raises NotImplementedError for what the kernels cannot do."""
    if q_RQNH.dtype != jnp.bfloat16 or kv_PYKOH.dtype not in (jnp.bfloat16, FP8):
        raise NotImplementedError(f"{q_RQNH.dtype} queries and {kv_PYKOH.dtype} pages")
    if kv_PYKOH.dtype == FP8 and not variant.persistent:
        raise NotImplementedError("only wgmma has pages in e4m3")
    if pages_RW.dtype != jnp.int32:
        raise NotImplementedError("only int32 pages")
    N, (_, _, K, O, _) = q_RQNH.shape[2], kv_PYKOH.shape
    if N % K or N // K > MAX_GROUP:
        raise NotImplementedError(f"{N} query heads for {K} KV heads")
    if O % 8:
        raise NotImplementedError(f"pages of {O} tokens")
    if scale <= 0:
        raise NotImplementedError("a scale that is not positive")
    fp8 = kv_PYKOH.dtype == FP8
    how: dict[str, Any] = {"scale": scale, "softcap": softcap, "before": before}
    macros = macros_of(variant, q_RQNH.shape, kv_PYKOH.shape, fp8=fp8, **how)
    return call.compile_or_refuse(variant.kernel, variant.kernel, macros)


def run(
    q: jax.Array,
    kv_PYKOH: jax.Array,
    pages_RW: jax.Array,
    positions_RQ: jax.Array,
    first_RQ: jax.Array | None,
    *,
    variant: Variant,
    ptx: str,
) -> tuple[jax.Array, jax.Array]:
    """The kernel of `ptx` on these arrays; see `api.paged_attention`.

    q: q_RQNH; or, where `ptx` is for tokens before those of the rows, q_TNH, and results are of T tokens as well.
    """
    (R, Q), (*tokens, N, H) = positions_RQ.shape, q.shape
    K = kv_PYKOH.shape[2]
    positions_RQ = positions_RQ.astype(jnp.int32)
    first_RQ = jnp.zeros_like(positions_RQ) if first_RQ is None else first_RQ.astype(jnp.int32)
    lines = tiles.schedule(positions_RQ, first_RQ, group=N // K, width=pages_RW.shape[1], pages=kv_PYKOH.shape[0])
    items = K * tiles.num_tiles(R, Q, N // K)
    grid = min(items, call.SMS) if variant.persistent else items
    results = [jax.ShapeDtypeStruct((*tokens, N, H), q.dtype), jax.ShapeDtypeStruct((*tokens, N), jnp.float32)]
    if variant.persistent:  # and a map of the pool for each block of threads
        results.append(jax.ShapeDtypeStruct((grid, MAP_WORDS), jnp.int32))
    out, lse, *_ = call.launch(
        variant.kernel,
        ptx,
        (q, kv_PYKOH, pages_RW, positions_RQ, first_RQ, lines),
        results,
        grid=(grid,),
        threads=variant.threads,
        shared=variant.shared(H, kv_PYKOH.dtype == FP8),
    )
    return out, lse


TOLERANCE = 3e-2
"""Of outputs of about one, against a float32 reference: queries, keys and values are exact in bfloat16, probabilities
and results are rounded to it."""


def sample(head_dim: int, *, seed: int = 0) -> tuple[jax.Array, ...]:
    """A small input with all there is to get wrong: q, kv, pages, positions, first.

    Rows that see nothing, pages out of order, counts that do not rise, windows, several blocks of keys, two tiles of a
    row of which the second is not full.
    """
    rng = np.random.default_rng(seed)
    R, Q, K, G, O, W = 3, 45, 2, 3, 16, 20
    q = rng.standard_normal((R, Q, K * G, head_dim), np.float32)
    kv = rng.standard_normal((R * W + 1, 2, K, O, head_dim), np.float32)
    pages = (rng.permutation(R * W) + 1).reshape(R, W).astype(np.int32)
    last = np.sort(rng.integers(0, O * W, (R, Q)), axis=1).astype(np.int32)
    last[1] = np.arange(Q) + O * W - Q  # a chunk at the end of its context
    last[2] = rng.permutation(last[2])
    last[2, ::7] = -1
    first = np.where(np.arange(R)[:, None] == 2, last - rng.integers(-1, 150, (R, Q)), 0).astype(np.int32)
    exact = tuple(jnp.asarray(x, jnp.bfloat16) for x in (q, kv))
    return (*exact, *map(jnp.asarray, (pages, last, first)))


def check(variant: Variant, head_dim: int, softcap: float | None = None, *, fp8: bool = False) -> float:
    """The largest error of a variant on a small input; needs a GPU. Raises ArithmeticError if it is wrong."""
    q, kv, *others = sample(head_dim)
    arguments, scale = (q, kv.astype(FP8) if fp8 else kv, *others), head_dim**-0.5
    ptx = compile_variant(variant, *arguments[:3], scale=scale, softcap=softcap)
    found = jax.jit(partial(run, variant=variant, ptx=ptx))(*arguments)
    wide = [x.astype(jnp.float32) for x in arguments[:2]]
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(partial(reference.attend, scale=scale, softcap=softcap))(*wide, *arguments[2:])
    seen = np.asarray(arguments[3] >= jnp.maximum(arguments[4], 0))
    pairs = zip(found, wanted, strict=True)
    error = max(float(np.abs(np.asarray(a, np.float32) - np.asarray(b))[seen].max()) for a, b in pairs)
    if not error < TOLERANCE:
        raise ArithmeticError(f"wrong by {error:.1e} at head dim {head_dim}, softcap {softcap}")
    if not (np.asarray(found[1])[~seen] < -1e29).all():
        raise ArithmeticError(f"attends to keys that are not visible, at head dim {head_dim}")
    return error


def check_wgmma() -> None:
    """Raises ArithmeticError if the wgmma kernel is wrong."""
    check(VARIANTS[128][0], 128)
    check(VARIANTS[64][0], 64, softcap=20.0, fp8=True)


def check_mma() -> None:
    """Raises ArithmeticError if the mma.sync kernel is wrong; where the other is right, nobody asks for this one."""
    try:
        call.require(VARIANTS[128][0].kernel)
    except NotImplementedError:
        check(VARIANTS[128][1], 128)
        check(VARIANTS[64][1], 64, softcap=20.0)


CHECKS: dict[str, call.Check] = {"paged_prefill": check_wgmma, "paged_prefill_mma": check_mma}
"""For `call.check_all`, in this order."""
