"""The kernel for experts of some tokens with rings of copies, run on the emulator, against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels.cuda import call
from jaxllm.kernels.grouped_matmul import cuda, ring_cuda
from jaxllm.kernels.grouped_matmul.ring_cuda import Tiling
from tests.kernels.test_grouped_skinny import emulated, expected, operands

__all__ = ["emulated"]

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
    emulated[0][0] = seed
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (arrays[0], arrays[1], arrays[3], arrays[4])]
    run = ring_cuda.implementation(*shapes, activation="silu", of=sizes[3] + 2, splits=splits)
    out = np.asarray(run(*map(jnp.asarray, arrays)))
    wanted = expected(*arrays)
    assert np.abs(out - wanted).max() < 6e-3 * np.abs(wanted).max()
    assert emulated[1] == [cuda.LIST] * (sizes[1] > 1) + [ring_cuda.KERNEL, ring_cuda.KERNEL]


def test_splits_fit() -> None:
    for D in (768, 2048, 4096, 14336):
        split = ring_cuda.tiling(D)
        assert split.shared * split.blocks <= call.MAX_SHARED and split.stages >= 4
