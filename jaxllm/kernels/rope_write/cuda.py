"""Rotation and page writes on a Hopper GPU, by `cuda/rope_write.cu`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels.cuda import call
from jaxllm.kernels.rope_write import reference

KERNEL = "rope_write"
WARPS = 4
AHEAD_PIECE = 2048
HEAD_DIMS = (64, 96, 128, 256)

Kernel = Callable[..., tuple[jax.Array, jax.Array]]


def macros_of(
    qkv_TCH: jax.Array, kv_PYKOH: jax.Array, *, norm: bool, eps: float, fetched: int = 0
) -> dict[str, object]:
    """fetched: see `choose`. Raises NotImplementedError for what the kernel cannot do."""
    C, H = qkv_TCH.shape[1:]
    _, _, K, O, _ = kv_PYKOH.shape
    if qkv_TCH.dtype != jnp.bfloat16 or kv_PYKOH.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        raise NotImplementedError(f"heads in {qkv_TCH.dtype} and pages in {kv_PYKOH.dtype}")
    if H not in HEAD_DIMS:
        raise NotImplementedError(f"head dim {H}, not one of {HEAD_DIMS}")
    fp8 = int(kv_PYKOH.dtype == jnp.float8_e4m3fn)
    sizes = {"HEADS": C - 2 * K, "K": K, "H": H, "O": O, "WARPS": WARPS}
    return {**sizes, "FP8": fp8, "NORM": int(norm), "EPS": repr(float(eps)), "AHEAD": fetched}


def grid_of(qkv_shape: Sequence[int], fetched: int = 0) -> tuple[int, int]:
    """A warp takes a head of a token, and a thread a piece of what is fetched."""
    return qkv_shape[0], -(-qkv_shape[1] // WARPS) + -(-fetched // (AHEAD_PIECE * WARPS * 32 * qkv_shape[0]))


def choose(
    qkv_TCH: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    kv_PYKOH: jax.Array,
    page_T: jax.Array,
    slot_T: jax.Array,
    q_norm_H: jax.Array | None,
    k_norm_H: jax.Array | None,
    *,
    eps: float,
    fetched: int = 0,
) -> Kernel:
    """The kernel for these arguments, compiled. Raises NotImplementedError where XLA must do the work.

    fetched: bytes, a multiple of 16, of the weight `ahead` that the second-level cache fetches meanwhile.
    """
    call.require(KERNEL)
    macros = macros_of(qkv_TCH, kv_PYKOH, norm=q_norm_H is not None, eps=eps, fetched=fetched)
    return partial(run, ptx=call.compile_or_refuse(KERNEL, KERNEL, macros), fetched=fetched)


def run(
    qkv_TCH: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    kv_PYKOH: jax.Array,
    page_T: jax.Array,
    slot_T: jax.Array,
    q_norm_H: jax.Array | None = None,
    k_norm_H: jax.Array | None = None,
    ahead: jax.Array | None = None,
    *,
    ptx: str,
    fetched: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """One launch; see `api.rope_write`."""
    T, C, H = qkv_TCH.shape
    norms = [cos if weight is None else weight for weight in (q_norm_H, k_norm_H)]
    q_TNH, kv_PYKOH = call.launch(
        KERNEL,
        ptx,
        [qkv_TCH, cos, sin, page_T, slot_T, *norms, cos if ahead is None else ahead, kv_PYKOH],
        [
            jax.ShapeDtypeStruct((T, C - 2 * kv_PYKOH.shape[2], H), qkv_TCH.dtype),
            jax.ShapeDtypeStruct(kv_PYKOH.shape, kv_PYKOH.dtype),
        ],
        grid=grid_of(qkv_TCH.shape, fetched),
        threads=32 * WARPS,
        aliases={8: 1},
    )
    return q_TNH, kv_PYKOH


def check() -> None:
    """Raises ArithmeticError if the kernel differs from the reference on a small input."""
    rng = np.random.default_rng(0)
    for dtype, H, norm in ((jnp.bfloat16, 128, False), (jnp.float8_e4m3fn, 64, True)):
        T, N, K, O = 5, 4, 2, 16
        qkv = jnp.asarray(rng.standard_normal((T, N + 2 * K, H)), jnp.bfloat16)
        angle = rng.uniform(0, 6, (T, 1, H // 2)).astype(np.float32)
        kv = jnp.asarray(rng.standard_normal((6, 2, K, O, H)), dtype)
        places = jnp.asarray([1, 2, 3, 4, 5], jnp.int32), jnp.asarray([0, 15, 7, 3, 9], jnp.int32)
        weights = [jnp.asarray(rng.uniform(0.5, 2, H), jnp.float32) if norm else None for _ in range(2)]
        arguments: Any = (qkv, jnp.cos(angle), jnp.sin(angle), kv, *places, *weights)
        found = jax.jit(choose(*arguments, eps=1e-5))(*arguments)
        # Not under jit, where XLA leaves out the rounding between norm and rotation; the kernel rounds.
        wanted = reference.rope_write(*arguments, eps=1e-5)
        for a, b in zip(found, wanted, strict=True):
            x, y = np.asarray(a, np.float32), np.asarray(b, np.float32)
            # One may round up what the other rounds down: a step of e4m3 is an eighth.
            error = (np.abs(x - y) / np.maximum(np.abs(y), 0.05)).max()
            if not error < (0.13 if a.dtype == jnp.float8_e4m3fn else 0.01):
                raise ArithmeticError(f"wrong by {error:.1e} at head dim {H}")
