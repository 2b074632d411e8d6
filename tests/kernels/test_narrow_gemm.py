"""The kernel for products of 8 to 128 tokens, run on the emulator, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.kernels.cuda import call, rtc
from jaxllm.kernels.linear import api, narrow_cuda
from jaxllm.kernels.linear.narrow_cuda import Split
from tests.kernels.emulator.emulator import EmulatorError, Kernels

BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Case:
    """clusters: on the chip at once; fewer than tiles, and each works on several."""

    tokens: int
    features: int
    inputs: int
    split: Split
    clusters: int
    activation: str | None = None
    residual: bool = False
    out: np.dtype = BF16


CASES = [
    # rows of a tile, blocks of a cluster, panels of 64 inputs in a stage
    Case(8, 128, 512, Split(64, 2, 4), clusters=2),
    Case(5, 200, 256, Split(64, 1, 1), clusters=2, out=np.dtype(np.float32)),
    Case(13, 384, 768, Split(64, 4, 1), clusters=2, residual=True),
    Case(24, 384, 640, Split(192, 4, 1), clusters=2, residual=True),
    Case(64, 256, 256, Split(256, 1, 1), clusters=1, activation="silu", residual=True),
    Case(61, 400, 512, Split(128, 4, 2), clusters=1, activation="gelu_tanh"),
]


def operands(case: Case, seed: int) -> list[np.ndarray]:
    """x, weight and the residual, NaNs where the case has none."""
    rng, (T, F, D) = np.random.default_rng(seed), (case.tokens, case.features, case.inputs)
    residual = rng.standard_normal((T, F // 2 if case.activation else F)) if case.residual else np.full(8, np.nan)
    return [a.astype(BF16) for a in (rng.standard_normal((T, D)), rng.standard_normal((F, D)) * 0.05, residual)]


def run(case: Case, arguments: list[np.ndarray], seed: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """What `narrow_cuda.implementation` launches, on the emulator."""
    ran: list[Kernels] = []

    def compile_ptx(kernel, source, macros):
        ran.append(Kernels(rtc.SOURCES / f"{source}.cu", macros))
        return ""

    def launch(name, ptx, operands, results, *, grid, threads, shared):
        (result,) = results
        shapes = [(result.shape, np.dtype(result.dtype))]
        return ran[0].run(name, operands, shapes, grid=grid, threads=threads, shared=shared, seed=seed)

    monkeypatch.setattr(call, "compile_or_refuse", compile_ptx)
    monkeypatch.setattr(call, "launch", launch)
    monkeypatch.setitem(narrow_cuda.CLUSTERS, case.split.cluster, case.clusters)
    x, weight = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments[:2])
    kernel = narrow_cuda.implementation(
        x, weight, activation=case.activation, residual=case.residual, out_dtype=case.out, split=case.split
    )
    return kernel(*arguments)


def expected(case: Case, arguments: list[np.ndarray]) -> np.ndarray:
    x, weight, residual = (a.astype(np.float64) for a in arguments)
    y = x @ weight.T
    if case.activation:
        gate, up = np.split(y, 2, axis=1)
        slope = {"silu": gate, "gelu_tanh": 2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)}[case.activation]
        y = gate / (1 + np.exp(-slope)) * up
    return y + residual if case.residual else y


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(case: Case, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = operands(case, seed)
    out, wanted = run(case, arguments, seed, monkeypatch), expected(case, arguments)
    assert out.dtype == case.out and out.shape == wanted.shape
    tolerance = 1e-6 if case.out == np.float32 else 4e-3
    np.testing.assert_allclose(out.astype(np.float64), wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())
