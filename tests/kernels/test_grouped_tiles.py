"""The kernel for experts of many tokens, run on the emulator, against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels.cuda import call
from jaxllm.kernels.grouped_matmul import cuda, tiles_cuda
from tests.kernels.test_grouped_skinny import emulated, expected, operands

__all__ = ["emulated"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["even", "elsewhere"])
def test_equals_float64(kind: str, seed: int, emulated, monkeypatch) -> None:
    """Two blocks take several tiles each, some of which are not full."""
    monkeypatch.setattr(call, "SMS", 2)
    arrays = operands(kind, 90, 2, 3, 256, 128)
    emulated[0][0] = seed
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (arrays[0], arrays[1], arrays[3], arrays[4])]
    out = np.asarray(tiles_cuda.implementation(*shapes, activation="silu", of=3)(*map(jnp.asarray, arrays)))
    wanted = expected(*arrays)
    assert out.dtype == np.float32
    assert np.abs(out - wanted).max() < 6e-3 * np.abs(wanted).max()
    assert emulated[1] == [cuda.LIST, tiles_cuda.KERNEL, tiles_cuda.KERNEL]


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
