"""The passes between products: the CUDA kernels, run by the emulator, against the reference."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels.linear.product import Product, QuantizedTokens
from jaxllm.kernels.linear.quantized import quantize_tokens
from jaxllm.kernels.linear.reference import rms_norm
from jaxllm.kernels.rows import cuda, reference
from tests.kernels.emulator.launches import Launches

BF16, F32 = jnp.bfloat16, jnp.float32
EPS = 1e-5


@pytest.fixture
def on_emulator(emulated: Launches) -> None:
    emulated.seed = 1


def product_of(T: int, F: int, dtype: Any, splits: int, scaled: bool) -> Product:
    rng = np.random.default_rng(T)
    sums = rng.standard_normal((splits, T, F) if splits else (T, F))
    scales = [jnp.asarray(rng.uniform(0.1, 2, n), F32) if scaled else None for n in ((T, 1), (F,))]
    return Product(jnp.asarray(sums, F32 if splits else dtype), *scales, np.dtype(dtype))


def close(found: Any, wanted: Any, rounding: float = 2**-7) -> None:
    """Nearly all numbers are equal, and the others next to one another."""
    if isinstance(wanted, QuantizedTokens):
        np.testing.assert_allclose(found.scale, wanted.scale, rtol=rounding)
        found, wanted = (np.asarray(x.values, np.float32) * np.asarray(x.scale) for x in (found, wanted))
        assert (np.abs(found - wanted) < 1e-6 * np.abs(wanted)).mean() > 0.5
        return np.testing.assert_allclose(found, wanted, rtol=0.13, atol=2**-8 * np.abs(wanted).max())
    assert found.dtype == wanted.dtype
    found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
    np.testing.assert_allclose(found, wanted, rtol=rounding, atol=1e-5)
    if rounding > 1e-4:
        assert (found == wanted).mean() > 0.97


@pytest.mark.parametrize("sizes", [
    # rows, columns, dtype, sums, scaled, residual, norm, quantised, units of a thread
    (1, 4096, BF16, 0, False, True, True, False, None),
    (3, 1024, BF16, 0, True, True, True, True, 2),
    (2, 520, BF16, 3, True, False, True, True, None),
    (2, 768, F32, 2, False, True, True, False, None),
    *(pytest.param(case, marks=pytest.mark.slow) for case in (
        (3, 1000, BF16, 0, False, True, True, False, 2),
        (2, 576, F32, 0, False, True, True, False, None),
        (5, 2048, BF16, 4, False, True, True, False, None),
        (3, 512, BF16, 0, False, False, True, False, None),
        (4, 640, BF16, 0, False, False, False, True, None),
        (300, 264, BF16, 0, False, True, True, False, None),
    )),
], ids=str)  # fmt: skip
def test_residual_and_norm(on_emulator: None, sizes: tuple) -> None:
    T, D, dtype, splits, scaled, residual, norm, quantised, per = sizes
    rng = np.random.default_rng(D)
    product = product_of(T, D, dtype, splits, scaled)
    residual_TD = jnp.asarray(rng.standard_normal((T, D)) * 3, dtype) if residual else None
    weight_D = jnp.asarray(rng.uniform(-2, 2, D), F32) if norm else None
    run = cuda.norm_kernel(product, eps=EPS if norm else None, residual=residual, quantised=quantised, per=per)
    sum_TD, out = run(product, residual_TD, weight_D)
    wanted_TD = product.finish() if residual_TD is None else residual_TD + product.finish()
    if residual or splits or scaled:
        close(sum_TD, wanted_TD, 2**-7 if dtype == BF16 else 1e-5)
    else:
        assert sum_TD is None
    # Of the kernel's own sum: where that is rounded in another way, the norm must be too.
    summed = wanted_TD if sum_TD is None else jnp.asarray(sum_TD)
    if weight_D is None:
        wanted = reference.quantize(summed)
    else:
        norm = (weight_D, EPS)
        wanted = reference.quantized_norm(summed, norm) if quantised else rms_norm(summed, norm)
    close(out, wanted, 2**-7 if dtype == BF16 else 1e-5)


def test_sums_of_parts_that_were_rounded(on_emulator: None) -> None:
    """Are added in float32, and rounded once more with the residual."""
    rng = np.random.default_rng(0)
    parts, residual_TD = (jnp.asarray(rng.standard_normal(s), BF16) for s in ((3, 5, 512), (5, 512)))
    product = Product(parts, None, None, np.dtype(BF16))
    run = cuda.norm_kernel(product, eps=EPS, residual=True, quantised=False)
    sum_TD, out = run(product, residual_TD, jnp.ones(512, F32))
    wanted = (parts.astype(F32).sum(axis=0) + residual_TD.astype(F32)).astype(BF16)
    close(sum_TD, wanted)
    close(out, rms_norm(jnp.asarray(sum_TD), (jnp.ones(512), EPS)))


def test_norm_in_blocks(on_emulator: None) -> None:
    T, D = 9, 320
    rng = np.random.default_rng(0)
    product, weight_D = product_of(T, D, BF16, 2, False), jnp.asarray(rng.uniform(-2, 2, D), F32)
    residual_TD = jnp.asarray(rng.standard_normal((T, D)), BF16)
    sums, outs = zip(*(
        cuda.norm_kernel(product, eps=EPS, residual=True, quantised=False, blocked=rows)(product, residual_TD, weight_D)
        for rows in (0, 64)
    ), strict=True)  # fmt: skip
    np.testing.assert_array_equal(*sums)
    assert outs[1].values.shape == (5, 64, 64)
    np.testing.assert_array_equal(outs[1].plain(), outs[0])


@pytest.mark.parametrize("sizes", [
    # rows, columns of the result, dtype, sums, scaled, activation, quantised, units of a thread
    (17, 1000, BF16, 0, False, "gelu_tanh", False, None),
    (3, 1032, BF16, 0, True, "silu", True, 2),
    *(pytest.param(case, marks=pytest.mark.slow) for case in (
        (1, 4096, BF16, 0, False, "silu", False, None),
        (2, 264, F32, 0, False, "silu", False, None),
        (3, 1024, BF16, 2, True, "silu", False, None),
        (2, 576, BF16, 0, False, "gelu_tanh", True, None),
    )),
], ids=str)  # fmt: skip
def test_gate(on_emulator: None, sizes: tuple) -> None:
    T, F, dtype, splits, scaled, activation, quantised, per = sizes
    product = product_of(T, 2 * F, dtype, splits, scaled)
    found = cuda.gate_kernel(product, activation, quantised=quantised, per=per)(product)
    # The reference rounds after every step in bfloat16, the kernel once.
    finished = product.finish().astype(F32)
    exact = reference.gate(Product.of(finished), activation).astype(dtype)
    close(found, reference.quantize(exact) if quantised else exact, 2**-7 if dtype == BF16 else 1e-5)
    near = reference.gate(product, activation, quantised=quantised)
    assert cuda.distance(found, near) < cuda.TOLERANCE[quantised]


def test_rows_of_zeros_and_of_large_numbers(on_emulator: None) -> None:
    x = np.zeros((2, 512), np.float32)
    x[1, 7] = -3e38
    product = Product.of(jnp.asarray(x, BF16))
    _, found = cuda.norm_kernel(product, eps=None, residual=False, quantised=True)(product)
    assert found.scale[0] == 1 and not np.asarray(found.values[0], np.float32).any()
    assert np.asarray(found.values[1], np.float32)[7] == -448
    wanted = reference.quantize(product.sums)
    np.testing.assert_array_equal(np.asarray(found.values, np.float32), np.asarray(wanted.values, np.float32))
    np.testing.assert_array_equal(found.scale, wanted.scale)


def test_reference_is_what_products_and_norms_are() -> None:
    product = product_of(4, 256, BF16, 3, True)
    y = np.asarray(product.sums).sum(0) * np.asarray(product.token_scale) * np.asarray(product.column_scale)
    np.testing.assert_allclose(np.asarray(product.finish(), np.float32), y, rtol=2**-8, atol=1e-6)
    residual = jnp.asarray(np.random.default_rng(1).standard_normal((4, 256)), BF16)
    weight = jnp.linspace(0.5, 2, 256)
    total, normed = reference.residual_norm(product, residual, (weight, EPS))
    assert total.dtype == normed.dtype == BF16
    np.testing.assert_array_equal(np.asarray(total), np.asarray(residual + product.finish()))
    wide = np.asarray(total, np.float32)
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS) * np.asarray(weight)
    np.testing.assert_allclose(np.asarray(normed, np.float32), exact, rtol=2**-8, atol=1e-6)
    _, quantised = reference.residual_norm(product, residual, (weight, EPS), quantised=True)
    values, scale = quantize_tokens(normed)
    np.testing.assert_array_equal(np.asarray(quantised.values, np.float32), np.asarray(values, np.float32))
    np.testing.assert_array_equal(quantised.scale, scale)


def test_what_no_kernel_does() -> None:
    with pytest.raises(NotImplementedError, match="no GPU"):
        cuda.gate(Product.of(jnp.zeros((4, 512), BF16)), "silu", quantised=False)
    for product, quantised, reason in (
        (Product.of(jnp.zeros((4, 516), BF16)), False, "516 columns"),
        (Product.of(jnp.zeros((4, 512), jnp.float16)), False, "float16"),
        (Product.of(jnp.zeros((4, 512), F32)), True, "e4m3 of float32"),
        (Product(jnp.zeros((17, 4, 512), F32), None, None, np.dtype(BF16)), False, "17 parts"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            cuda.macros_of(product, product.shape[1], quantised=quantised)
