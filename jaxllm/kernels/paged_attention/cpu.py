"""Paged attention on the CPU by `native/paged_attention.cc`: pages are read once, where they are."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels.native import build
from jaxllm.kernels.paged_attention import reference
from jaxllm.kernels.paged_attention.types import Implementation


def choose(
    q_RQNH: jax.Array, kv_PYKOH: jax.Array, pages_RW: jax.Array, *, scale: float, softcap: float | None
) -> Implementation:
    """See `api.Implementation`. Raises NotImplementedError where XLA must do it."""
    if any(a.dtype != jnp.float32 for a in (q_RQNH, kv_PYKOH)):
        raise NotImplementedError("only float32")
    if pages_RW.dtype != jnp.int32:
        raise NotImplementedError("only int32 pages")
    if not build.available("paged_attention", check):
        raise NotImplementedError("no native kernel")
    return partial(_native, scale=scale, softcap=softcap)


def _native(
    q_RQNH: jax.Array,
    kv_PYKOH: jax.Array,
    pages_RW: jax.Array,
    positions_RQ: jax.Array,
    first_RQ: jax.Array | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    target: str = "jaxllm_paged_attention",
) -> tuple[jax.Array, jax.Array]:
    R, Q, N, H = q_RQNH.shape
    results = (jax.ShapeDtypeStruct((R, Q, N, H), jnp.float32), jax.ShapeDtypeStruct((R, Q, N), jnp.float32))
    out, lse = jax.ffi.ffi_call(target, results)(
        q_RQNH,
        kv_PYKOH,
        pages_RW,
        positions_RQ,
        np.zeros((0, 0), np.int32) if first_RQ is None else first_RQ,
        scale=np.float32(scale),
        softcap=np.float32(softcap or 0.0),
    )
    return out, lse


def check(target: str) -> None:
    """Raises ArithmeticError if the kernel differs from the reference on a small input."""
    rng = np.random.default_rng(0)
    for R, Q, N, K, H, window, softcap in ((3, 1, 6, 2, 20, None, None), (2, 9, 3, 1, 16, 5, 3.0)):
        q = rng.standard_normal((R, Q, N, H), np.float32)
        kv = rng.standard_normal((8, 2, K, 4, H), np.float32)
        pages = np.arange(1, 1 + 2 * R, dtype=np.int32).reshape(R, 2)
        positions = np.full((R, Q), -1, np.int32)
        positions[:, :7] = np.arange(R)[:, None] + np.arange(min(Q, 5) + 2)[None, : min(Q, 7)] % 5
        args = tuple(jnp.asarray(a) for a in (q, kv, pages, positions))
        real = positions >= 0
        options: dict[str, Any] = {"scale": 0.3, "softcap": softcap}
        first = None if window is None else args[-1] - window + 1
        found = jax.jit(partial(_native, target=target, **options))(*args, first)
        wanted = jax.jit(partial(reference.attend, **options))(*args, first)
        error = max(np.abs(np.asarray(a) - np.asarray(b))[real].max() for a, b in zip(found, wanted, strict=True))
        if not error < 1e-4:
            raise ArithmeticError(f"{target} is wrong by {error:.1e} at Q={Q} H={H} window={window}")
