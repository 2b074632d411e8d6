"""The kernel for experts of many tokens, run on the emulator, against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels.cuda import call
from jaxllm.kernels.grouped_matmul import cuda, ring_cuda, tiles_cuda
from jaxllm.kernels.linear.quantized import dequantize, quantize_tokens
from tests.kernels.test_grouped_skinny import expected, operands, scaled


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["even", "elsewhere"])
def test_equals_float64(kind: str, seed: int, emulated, monkeypatch) -> None:
    """Two blocks take several tiles each, some of which are not full."""
    monkeypatch.setattr(call, "SMS", 2)
    arrays = operands(kind, 90, 2, 3, 256, 128)
    emulated.seed = seed
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (arrays[0], arrays[1], arrays[3], arrays[4])]
    out = np.asarray(tiles_cuda.implementation(*shapes, activation="silu", of=3)(*map(jnp.asarray, arrays)))
    wanted = expected(*arrays)
    assert out.dtype == np.float32
    assert np.abs(out - wanted).max() < 6e-3 * np.abs(wanted).max()
    assert emulated.ran == [cuda.LIST, tiles_cuda.KERNEL, tiles_cuda.KERNEL]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("group", [*(pytest.param(g, marks=pytest.mark.slow) for g in (None, 64)), 128])
def test_e4m3_equals_float64(group: int | None, seed: int, emulated, monkeypatch) -> None:
    """Of activations rounded to e4m3, token by token, and weights with scales that differ a thousandfold."""
    monkeypatch.setattr(call, "SMS", 2)
    x, chosen, weights, *both = operands("elsewhere", 90, 2, 3, 256, 128)
    kept = [scaled(wide, group, seed) for wide in both]
    emulated.seed = seed
    of_x, of_chosen = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, chosen))
    run = tiles_cuda.implementation(of_x, of_chosen, *kept, activation="silu", of=3)
    out = np.asarray(run(*map(jnp.asarray, (x, chosen, weights)), *kept))
    numbers = [np.asarray(dequantize(weight, jnp.float32)) for weight in kept]
    wanted = expected(rounded(x), chosen, weights, *numbers, then=rounded)
    assert np.abs(out - wanted).max() < 1e-2 * np.abs(wanted).max()
    assert np.abs(out - expected(x, chosen, weights, *numbers)).max() < 0.1 * np.abs(wanted).max()
    assert emulated.ran == [cuda.LIST, tiles_cuda.KERNEL, tiles_cuda.KERNEL]


def rounded(x: np.ndarray) -> np.ndarray:
    """Rows as quantize_tokens rounds them."""
    values, scale = quantize_tokens(jnp.asarray(x))
    return np.asarray(values, np.float64) * np.asarray(scale, np.float64)


def test_what_the_kernel_cannot_do() -> None:
    def of(D=256, F=128, dtype=jnp.bfloat16):
        shapes = ((300, D), dtype), ((300, 2), jnp.int32), ((4, 2 * F, D), dtype), ((4, D, F), dtype)
        return [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    for arguments, activation in (
        (of(dtype=jnp.float32), "silu"),
        (of(), "gelu"),
        (of(D=320), "silu"),
        (of(F=64), "silu"),
    ):
        with pytest.raises(NotImplementedError):
            tiles_cuda.implementation(*arguments, activation=activation, of=4)


@pytest.mark.slow
@pytest.mark.parametrize("module", [cuda, ring_cuda, tiles_cuda])
def test_checks(module, emulated, monkeypatch) -> None:
    """Those at start pass, and find a scale that is wrong."""
    monkeypatch.setattr(call, "SMS", 4)
    with jax.disable_jit():
        module.check_quantized()
        monkeypatch.setattr(cuda, "arrays", lambda weight: (weight.values, 1.2 * weight.scale))
        with pytest.raises(ArithmeticError, match=module.QUANTIZED):
            module.check_quantized()
