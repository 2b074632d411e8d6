"""The kernel for experts of some tokens with rings of copies, run on the emulator, against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels.cuda import call
from jaxllm.kernels.grouped_matmul import cuda, ring_cuda
from jaxllm.kernels.grouped_matmul.ring_cuda import Tiling
from jaxllm.kernels.linear.quantized import dequantize
from tests.kernels.test_grouped_skinny import expected, operands, scaled

CASES = [
    ("elsewhere", 40, 3, 5, 320, 128, (Tiling(1, 1, 4, 3, 2), Tiling(2, 1, 2, 2, 2))),
    pytest.param(("one", 20, 2, 3, 128, 64, (Tiling(2, 2, 2, 4, 1), Tiling(1, 2, 4, 2, 1))), marks=pytest.mark.slow),
    ("elsewhere", 1, 5, 8, 512, 192, None),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(case, seed: int, emulated, monkeypatch) -> None:
    """Each block takes several tiles."""
    monkeypatch.setattr(call, "SMS", 3)
    *sizes, splits = case
    arrays = operands(*sizes)
    emulated.seed = seed
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (arrays[0], arrays[1], arrays[3], arrays[4])]
    run = ring_cuda.implementation(*shapes, activation="silu", of=sizes[3] + 2, splits=splits)
    out = np.asarray(run(*map(jnp.asarray, arrays)))
    wanted = expected(*arrays)
    assert np.abs(out - wanted).max() < 6e-3 * np.abs(wanted).max()
    assert emulated.ran == [cuda.LIST] * (sizes[1] > 1) + [ring_cuda.KERNEL, ring_cuda.KERNEL]


SLOW = pytest.mark.slow
QUANTIZED = [
    ("elsewhere", 20, 3, 5, 384, 128, 128, (Tiling(1, 1, 2, 3, 2), Tiling(2, 1, 1, 2, 2))),
    pytest.param(("even", 1, 5, 8, 512, 128, None, None), marks=SLOW),
    pytest.param(("elsewhere", 40, 2, 5, 640, 256, None, (Tiling(2, 2, 2, 3, 1), Tiling(1, 2, 4, 2, 2))), marks=SLOW),
    pytest.param(("one", 7, 2, 3, 384, 128, 64, None), marks=SLOW),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", QUANTIZED, ids=str)
def test_e4m3_equals_float64(case, seed: int, emulated, monkeypatch) -> None:
    monkeypatch.setattr(call, "SMS", 3)
    *sizes, group, splits = case
    x, chosen, weights, *both = operands(*sizes)
    kept = [scaled(wide, group, seed) for wide in both]
    emulated.seed = seed
    of_x, of_chosen = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, chosen))
    run = ring_cuda.implementation(of_x, of_chosen, *kept, activation="silu", of=sizes[3] + 2, splits=splits)
    out = np.asarray(run(*map(jnp.asarray, (x, chosen, weights)), *kept))
    wanted = expected(x, chosen, weights, *(np.asarray(dequantize(w, jnp.float32)) for w in kept))
    assert np.abs(out - wanted).max() < 6e-3 * np.abs(wanted).max()


def test_splits_fit() -> None:
    for D in (768, 2048, 4096, 14336):
        for values in (cuda.WIDE, cuda.Values(1), cuda.Values(1, 64), cuda.Values(1, 128)):
            for tokens in (1, 16):
                split = ring_cuda.tiling(D, values, tokens)
                assert split.shared(values) * split.blocks <= call.MAX_SHARED
                assert split.stages >= (4 if values == cuda.WIDE else 3)
