"""Decode attention that rotates its queries and brings each row's new key and value to their page, in one kernel of a
Hopper GPU: `cuda/rope_decode.cu`, in place of `rope_write` and `decode_cuda`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.kernels.cuda import call
from jaxllm.kernels.linear.product import Product
from jaxllm.kernels.paged_attention import decode_cuda, reference
from jaxllm.kernels.rope_write import reference as rope

KERNEL = "rope_decode"
ROWS: tuple[tuple[int, int], ...] = ((1, 1), (33, 64), (129, 256))
"""Rows, from and to, for which the kernel is used.

Measured on an H200 (jax 0.11.2) with Llama-3.1-8B's heads and 256 tokens in each row: 10.0 us and two kernels 14.8 for
one row, 25.7 and 27.8 for 64, 42.8 and 45.2 for 128, 75.8 and 76.5 for 256; 10.8 and 11.9 for 8. Steps of the engine
show little: 4.19 ms and 4.18 at 8 rows, 5.03 and 5.05 at 64, 9.46 and 9.47 at 256, and at 128 6.19 and 6.09, on two
GPUs."""
ASKED = ((1, 256),)
"""As above, where the kernel is asked for by name."""

Rotated = Callable[..., tuple[jax.Array, jax.Array]]
"""(qkv [R, (N + 2K) H], cos, sin, kv, page_R, slot_R, pages_RW, positions_R) -> out_RNH and the pool."""


def is_used() -> bool:
    """Whether any step may use it."""
    return bool(ROWS) or call.asked_for(KERNEL)


def implementation(
    shape: tuple[int, int], kv_PYKOH: jax.Array | jax.ShapeDtypeStruct, width: int, scale: float, softcap: float | None
) -> Rotated:
    """The kernel, for qkv of this shape and page tables of this width, in a program for an H100 or H200.

    The pool is written in place where the caller gives it away; rows at position -1 write nothing, and get zeros.
    Raises NotImplementedError for what the kernel cannot do.
    """
    (R, columns), (_, _, K, _, H) = shape, kv_PYKOH.shape
    N = columns // H - 2 * K
    if kv_PYKOH.dtype != jnp.bfloat16 or N % K:
        raise NotImplementedError(f"pages in {kv_PYKOH.dtype}")
    launch = decode_cuda.configure(
        (R, 1, N, H), kv_PYKOH.shape, width, fp8=False, scale=scale, softcap=softcap, first=False, rope=True
    )
    ptx = call.compile_or_refuse(KERNEL, KERNEL, launch.macros)
    written = [jax.ShapeDtypeStruct(*result) for result in decode_cuda.results(launch, (R, 1, N, H))]
    written.append(jax.ShapeDtypeStruct(kv_PYKOH.shape, kv_PYKOH.dtype))

    def run(
        qkv: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        kv_PYKOH: jax.Array,
        page_R: jax.Array,
        slot_R: jax.Array,
        pages_RW: jax.Array,
        positions_R: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        zeros = jnp.zeros(written[4].shape, jnp.int32)
        out, *_, kv_PYKOH = call.launch(
            KERNEL,
            ptx,
            [qkv, cos, sin, pages_RW, positions_R, zeros, kv_PYKOH],
            written,
            grid=launch.grid,
            threads=launch.threads,
            shared=launch.shared,
            aliases={5: 4, 6: 5},
        )
        return out[:, 0], kv_PYKOH

    return run


def composed(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    kv_PYKOH: jax.Array,
    page_R: jax.Array,
    slot_R: jax.Array,
    pages_RW: jax.Array,
    positions_R: jax.Array,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """The same in two steps, without kernels."""
    q_RNH, kv_PYKOH = rope.rope_write(Product.of(qkv), cos, sin, kv_PYKOH, page_R, slot_R)
    out, _ = reference.attend(q_RNH[:, None], kv_PYKOH, pages_RW, positions_R[:, None], scale=scale, softcap=softcap)
    return out[:, 0], kv_PYKOH


def attend(
    qkv: Product,
    cos: jax.Array,
    sin: jax.Array,
    kv_PYKOH: jax.Array,
    page_R: jax.Array,
    slot_R: jax.Array,
    pages_RW: jax.Array,
    positions_R: jax.Array,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of one new token for each row, out_RNH, and the pool with their keys and values.

    qkv: [R, (N + 2K) H]. page_R, slot_R: the places of the new keys and values, those of positions_R in pages_RW.
    Raises NotImplementedError where it is two kernels.
    """
    call.require(KERNEL)
    R, ranges = qkv.shape[0], ASKED if call.asked_for(KERNEL) else ROWS
    if not any(least <= R <= most for least, most in ranges):
        raise NotImplementedError(f"two kernels are for {R} rows")
    if qkv.dtype != jnp.bfloat16:
        raise NotImplementedError(f"heads in {qkv.dtype}")
    kernel = implementation((R, qkv.shape[1]), kv_PYKOH, pages_RW.shape[1], scale, softcap)
    default = partial(composed, scale=scale, softcap=softcap)
    arguments = (qkv.finish(), cos, sin, kv_PYKOH, page_R, slot_R, pages_RW, positions_R)
    return lax.platform_dependent(*arguments, cuda=kernel, default=default)


def example(R: int, K: int, G: int, H: int, O: int, W: int, positions: list[int]) -> Any:
    """Arguments of `Rotated` with random numbers; pages of rows at -1, and what is after a row's position, are none."""
    rng = np.random.default_rng(0)
    at = np.asarray(positions, np.int32)
    pages = (rng.permutation(R * W) + 1).reshape(R, W).astype(np.int32)
    pages[np.arange(W) > at[:, None] // O] = 0
    angle = rng.uniform(0, 6, (R, 1, H // 2)).astype(np.float32)
    index = np.maximum(at, 0)
    page, slot = np.where(at >= 0, pages[np.arange(R), index // O], 0), index % O
    qkv = jnp.asarray(rng.standard_normal((R, (G + 2) * K * H)), jnp.bfloat16)
    kv = jnp.asarray(rng.standard_normal((R * W + 1, 2, K, O, H)), jnp.bfloat16)
    return qkv, np.cos(angle), np.sin(angle), kv, page.astype(np.int32), slot.astype(np.int32), pages, at


def check() -> None:
    """Raises ArithmeticError if the kernel differs from the two steps on small inputs; to be run on a GPU."""
    for R, K, G, H, positions in ((5, 2, 4, 128, [0, 77, -1, 1279, 640]), (70, 2, 3, 64, list(range(0, 1050, 15)))):
        given = example(R, K, G, H, 32, 40, positions)
        kernel = implementation((R, given[0].shape[1]), given[3], 40, H**-0.5, None)
        found, wanted = jax.jit(kernel)(*given), composed(*given, scale=H**-0.5, softcap=None)
        real = np.asarray(positions) >= 0
        for a, b in ((found[0][real], wanted[0][real]), (found[1][1:], wanted[1][1:])):
            x, y = np.asarray(a, np.float32), np.asarray(b, np.float32)
            error = float(np.linalg.norm(x - y) / np.linalg.norm(y))
            if not error < 0.01:
                raise ArithmeticError(f"wrong by {error:.1e} of the result at {R} rows")
