"""Rotation and page writes: the CUDA kernel, run by the emulator, against the reference, and that against numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels.cuda import rtc
from jaxllm.kernels.linear.product import Product
from jaxllm.kernels.rope_write import cuda, reference
from tests.kernels.emulator.emulator import Kernels

BF16, FP8 = jnp.bfloat16, jnp.float8_e4m3fn


def inputs(T, N, K, H, O, dtype, norm, parts=0, scaled=False):
    rng = np.random.default_rng(0)
    columns = (N + 2 * K) * H
    sums = rng.standard_normal((parts, T, columns) if parts else (T, columns))
    scales = [jnp.asarray(rng.uniform(0.5, 2, n), jnp.float32) if scaled else None for n in ((T, 1), columns)]
    qkv = Product(jnp.asarray(sums, jnp.float32 if parts else BF16), *scales, np.dtype(BF16))
    angle = rng.uniform(-9, 9, (T, 1, H // 2)).astype(np.float32)
    kv = jnp.asarray(rng.standard_normal((T + 2, 2, K, O, H)), dtype)
    page = (rng.permutation(T) + 1).astype(np.int32)
    slot = rng.integers(0, O, T).astype(np.int32)
    norms = [rng.uniform(0.5, 2, H).astype(np.float32) if norm else None for _ in range(2)]
    return qkv, np.cos(angle), np.sin(angle), kv, page, slot, *norms


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "sizes",
    [
        (3, 4, 2, 128, 32, BF16, False),
        (1, 32, 8, 128, 16, BF16, True),
        (4, 9, 3, 64, 32, BF16, False),
        (2, 4, 4, 96, 16, BF16, True),
        (3, 2, 1, 256, 64, FP8, True),
        (5, 3, 2, 64, 16, FP8, False),
        (3, 4, 2, 128, 32, BF16, False, 4),
        (3, 4, 2, 96, 32, FP8, True, 2, True),
    ],
    ids=str,
)
def test_kernel_equals_reference(sizes, seed) -> None:
    arguments = inputs(*sizes)
    qkv, cos, sin, kv, page, slot, *norms = arguments
    macros = cuda.macros_of(qkv, kv, norm=norms[0] is not None, eps=1e-5)
    weights = [cos if w is None else w for w in norms]
    scales = [cos if s is None else s for s in (qkv.token_scale, qkv.column_scale)]
    operands = [np.asarray(a) for a in (qkv.sums, *scales, cos, sin, page, slot, *weights, kv)]
    q, pool = Kernels(rtc.SOURCES / "rope_write.cu", macros).run(
        "rope_write",
        operands,
        [((qkv.shape[0], macros["HEADS"], kv.shape[4]), BF16), (kv.shape, kv.dtype)],
        grid=cuda.grid_of(qkv.shape[0], macros),
        threads=cuda.THREADS,
        aliases={9: 1},
        seed=seed,
    )
    wanted_q, wanted_pool = reference.rope_write(*arguments, eps=1e-5)
    np.testing.assert_allclose(q.astype(np.float32), np.asarray(wanted_q, np.float32), rtol=1e-2, atol=1e-2)
    coarse = kv.dtype == FP8
    found, wanted = pool.astype(np.float32), np.asarray(wanted_pool, np.float32)
    np.testing.assert_allclose(found, wanted, rtol=0.13 if coarse else 1e-2, atol=1e-2)
    assert (found == wanted).mean() > 0.99  # only rounding, of which there is little


def test_reference_rotates_and_writes() -> None:
    qkv, cos, sin, kv, page, slot, *_ = inputs(4, 2, 1, 64, 8, jnp.float32, False)
    qkv = Product.of(qkv.finish().astype(jnp.float32))
    q, pool = reference.rope_write(qkv, cos, sin, kv, page, slot)
    heads = np.asarray(qkv.sums).reshape(4, 4, 64)
    turned = (heads[..., :32] + 1j * heads[..., 32:]) * (cos + 1j * sin)
    turned = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(q, turned[:, :2], atol=1e-5)
    wanted = np.array(kv)
    for t in range(4):
        wanted[page[t], 0, :, slot[t]], wanted[page[t], 1, :, slot[t]] = turned[t, 2:3], heads[t, 3:]
    np.testing.assert_allclose(pool, wanted, atol=1e-5)


def test_too_large_for_e4m3_becomes_the_largest() -> None:
    qkv, cos, sin, kv, page, slot, *_ = inputs(2, 1, 1, 64, 8, FP8, False)
    _, pool = reference.rope_write(
        Product.of(qkv.finish() * 1000), np.ones_like(cos), np.zeros_like(sin), kv, page, slot
    )
    assert np.isfinite(np.asarray(pool, np.float32)).all()
    assert np.abs(np.asarray(pool, np.float32)[page, :, :, slot]).max() == 448
