"""Rotation and page writes on a Hopper GPU, by `cuda/rope_write.cu`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels.cuda import call
from jaxllm.kernels.linear.product import Product
from jaxllm.kernels.rope_write import reference

KERNEL = "rope_write"
THREADS = 128
HEAD_DIMS = (64, 96, 128, 256)
FINISHED: dict[bool, tuple[tuple[int, int], ...]] = {False: (), True: ((33, 255),)}
"""Tokens, from and to, for which the kernel also finishes the projection, by whether that has scales.

Measured on an H200 (jax 0.11.2), Llama-3.1-8B: in bfloat16 5.36 ms at 64 tokens and 9.70 at 256, where others finish in
5.34 and 9.57; with fp8 weights 3.60 ms at 64 together with the kernels for rows, see there."""

Kernel = Callable[..., tuple[jax.Array, jax.Array]]


def finishes(tokens: int, *, scaled: bool) -> bool:
    """Whether the kernel takes projections that are not finished; scaled: they have scales."""
    try:
        call.require(KERNEL)
    except NotImplementedError:
        return False
    return any(low <= tokens <= high for low, high in FINISHED[scaled]) or call.asked_for(KERNEL)


def macros_of(qkv: Product, kv_PYKOH: jax.Array, *, norm: bool, eps: float) -> dict[str, object]:
    """Raises NotImplementedError for what the kernel cannot do."""
    _, _, K, O, H = kv_PYKOH.shape
    if qkv.dtype != jnp.bfloat16 or kv_PYKOH.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        raise NotImplementedError(f"heads in {qkv.dtype} and pages in {kv_PYKOH.dtype}")
    if H not in HEAD_DIMS:
        raise NotImplementedError(f"head dim {H}, not one of {HEAD_DIMS}")
    product = {
        "COLUMNS": qkv.shape[1], "THREADS": THREADS, "FLOAT": 0,
        "SPLITS": qkv.sums.shape[0] if qkv.sums.ndim == 3 else 0, "SCALED": int(qkv.token_scale is not None),
        "ROUNDED": int(qkv.sums.dtype == jnp.bfloat16),
    }  # fmt: skip
    sizes = {"HEADS": qkv.shape[1] // H - 2 * K, "K": K, "H": H, "O": O}
    fp8 = int(kv_PYKOH.dtype == jnp.float8_e4m3fn)
    return {**product, **sizes, "FP8": fp8, "NORM": int(norm), "EPS": repr(float(eps))}


def grid_of(tokens: int, macros: Mapping[str, Any]) -> tuple[int, int]:
    """A group of lanes takes a head of a token, each lane 8 dims of both of its halves."""
    lanes = next(lanes for lanes in (4, 8, 16) if 16 * lanes >= macros["H"])
    return tokens, -(-macros["COLUMNS"] // macros["H"] * lanes // THREADS)


def choose(
    qkv: Product,
    cos: jax.Array,
    sin: jax.Array,
    kv_PYKOH: jax.Array,
    page_T: jax.Array,
    slot_T: jax.Array,
    q_norm_H: jax.Array | None,
    k_norm_H: jax.Array | None,
    *,
    eps: float,
) -> Kernel:
    """The kernel for these arguments, compiled. Raises NotImplementedError where XLA must do the work."""
    call.require(KERNEL)
    macros = macros_of(qkv, kv_PYKOH, norm=q_norm_H is not None, eps=eps)
    return partial(run, ptx=call.compile_or_refuse(KERNEL, KERNEL, macros), grid=grid_of(qkv.shape[0], macros))


def run(
    qkv: Product,
    cos: jax.Array,
    sin: jax.Array,
    kv_PYKOH: jax.Array,
    page_T: jax.Array,
    slot_T: jax.Array,
    q_norm_H: jax.Array | None = None,
    k_norm_H: jax.Array | None = None,
    *,
    ptx: str,
    grid: tuple[int, int],
) -> tuple[jax.Array, jax.Array]:
    """One launch; see `api.rope_write`."""
    (T, columns), K, H = qkv.shape, kv_PYKOH.shape[2], kv_PYKOH.shape[4]
    scales, norms = (qkv.token_scale, qkv.column_scale), (q_norm_H, k_norm_H)
    # What the kernel does not read must still be a pointer.
    q_TNH, kv_PYKOH = call.launch(
        KERNEL,
        ptx,
        [
            qkv.sums,
            *(cos if scale is None else scale for scale in scales),
            *(cos, sin, page_T, slot_T),
            *(cos if weight is None else weight for weight in norms),
            kv_PYKOH,
        ],
        [
            jax.ShapeDtypeStruct((T, columns // H - 2 * K, H), qkv.dtype),
            jax.ShapeDtypeStruct(kv_PYKOH.shape, kv_PYKOH.dtype),
        ],
        grid=grid,
        threads=THREADS,
        aliases={9: 1},
    )
    return q_TNH, kv_PYKOH


def check() -> None:
    """Raises ArithmeticError if the kernel differs from the reference on a small input."""
    rng = np.random.default_rng(0)
    for dtype, H, norm in ((jnp.bfloat16, 128, False), (jnp.float8_e4m3fn, 64, True)):
        T, N, K, O = 5, 4, 2, 16
        qkv = Product.of(jnp.asarray(rng.standard_normal((T, (N + 2 * K) * H)), jnp.bfloat16))
        if norm:  # and sums of parts, and scales
            sums = jnp.asarray(rng.standard_normal((3, *qkv.shape)), jnp.float32)
            of_tokens, of_columns = (jnp.asarray(rng.uniform(0.5, 1, n), jnp.float32) for n in ((T, 1), qkv.shape[1]))
            qkv = Product(sums, of_tokens, of_columns, qkv.dtype)
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
