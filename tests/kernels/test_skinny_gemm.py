"""The kernel for products of few tokens, run on the emulator, against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.kernels.cuda import call
from jaxllm.kernels.linear import cuda
from jaxllm.kernels.linear.cuda import Tiling
from tests.kernels.emulator.launches import Launches

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True)
class Case:
    """clusters: of the grid; fewer than tiles, and each works on several."""

    tokens: int
    features: int
    inputs: int
    split: Tiling
    clusters: int = 3
    weight: np.dtype = BF16
    eps: float | None = None
    activation: str | None = None
    residual: bool = False
    out: np.dtype = BF16


CASES = [
    # rows of a tile, blocks of a cluster, warps, stages
    Case(1, 64, 512, Tiling(16, 1, 4, 3), out=np.dtype(np.float32)),
    Case(1, 100, 256, Tiling(16, 1, 2, 2), clusters=2, residual=True),
    Case(3, 80, 576, Tiling(16, 2, 4, 2), clusters=2, out=np.dtype(np.float32)),
    Case(9, 96, 640, Tiling(32, 2, 4, 3), eps=1e-6, residual=True, clusters=1),
    Case(16, 128, 1024, Tiling(32, 1, 4, 4), eps=1e-5, activation="silu", clusters=2),
    Case(17, 72, 544, Tiling(32, 2, 2, 3), activation="gelu_tanh", residual=True, clusters=1),
    Case(32, 64, 2048, Tiling(32, 4, 4, 3), eps=1e-5, clusters=1),
    Case(3, 48, 4096, Tiling(16, 8, 2, 3), residual=True, clusters=2),
    Case(5, 160, 1088, Tiling(32, 2, 4, 3), weight=E4M3, residual=True, clusters=2),
    Case(8, 64, 2048, Tiling(16, 1, 8, 3), weight=E4M3, eps=1e-5, activation="silu"),
    Case(2, 96, 704, Tiling(32, 2, 2, 2), weight=np.dtype(np.int8), eps=1e-5, activation="gelu_tanh"),
]


def operands(case: Case, seed: int) -> list[np.ndarray]:
    """x, weight, scale, norm, residual; those that the case does not have hold NaNs."""
    rng, (T, F, D) = np.random.default_rng(seed), (case.tokens, case.features, case.inputs)
    weight = rng.standard_normal((F, D)) * (0.05 if case.weight == BF16 else 40)
    weight = np.clip(np.rint(weight), -128, 127) if case.weight == np.int8 else weight
    scale = rng.uniform(0.001, 0.002, F) if case.weight != BF16 else np.full(F, np.nan)
    norm = rng.uniform(0.5, 1.5, D) if case.eps is not None else np.full(D, np.nan)
    residual = rng.standard_normal((T, F // 2 if case.activation else F)) if case.residual else np.full(8, np.nan)
    return [
        rng.standard_normal((T, D)).astype(BF16),
        weight.astype(case.weight),
        scale.astype(np.float32),
        norm.astype(np.float32),
        residual.astype(BF16),
    ]


def run(case: Case, arguments: list[np.ndarray], seed: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """What `cuda.implementation` launches, on the emulator."""
    Launches(monkeypatch, seed, grid=(case.clusters * case.split.cluster,))
    x, weight = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments[:2])
    kernel = cuda.implementation(
        x,
        weight,
        eps=case.eps,
        activation=case.activation,
        residual=case.residual,
        out_dtype=case.out,
        split=case.split,
    )
    return kernel(*arguments)


def expected(case: Case, arguments: list[np.ndarray]) -> np.ndarray:
    x, weight, scale, norm, residual = (a.astype(np.float64) for a in arguments)
    if case.weight != BF16:
        weight = weight * scale[:, None]
    if case.eps is not None:
        x = x / np.sqrt((x * x).mean(1, keepdims=True) + case.eps) * norm
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


def test_a_token_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(9, 64, 320, Tiling(32, 2, 2, 3), eps=1e-5, activation="silu")
    arguments = operands(case, 0)
    before = run(case, arguments, 0, monkeypatch)
    arguments[0][[0, 8]] = 3
    after = run(case, arguments, 2, monkeypatch)
    np.testing.assert_array_equal(before[1:8].view(np.uint16), after[1:8].view(np.uint16))
    assert (before[0] != after[0]).any()


@pytest.mark.parametrize("dtype", [E4M3, np.dtype(np.int8)], ids=str)
def test_every_value_of_a_quantised_weight_is_exact(dtype: np.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.arange(256, dtype=np.uint8)
    if dtype == E4M3:
        codes = np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8)  # not the NaNs
    case = Case(1, 256, 64, Tiling(32, 1, 2, 2), weight=dtype, out=np.dtype(np.float32))
    arguments = operands(case, 0)
    weight = np.zeros((256, 64), np.uint8)
    weight[np.arange(256), np.arange(256) % 64] = codes
    arguments[:3] = [np.ones((1, 64), BF16), weight.view(dtype), np.ones(256, np.float32)]
    out = run(case, arguments, 0, monkeypatch)
    np.testing.assert_array_equal(out[0], codes.view(dtype).astype(np.float32))


@pytest.mark.parametrize("tokens", [1, 8, 16, 32])
@pytest.mark.parametrize("itemsize", [1, 2])
@pytest.mark.parametrize(
    ("features", "inputs"),
    [(48, 576), (576, 1536), (3072, 4096), (4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (128256, 4096)],
)
def test_the_split_fills_the_chip(tokens: int, itemsize: int, features: int, inputs: int) -> None:
    split = cuda.tiling(tokens, features, inputs * itemsize, itemsize)
    grid = split.grid(features)
    assert split.shared(tokens, inputs * itemsize, itemsize) <= call.MAX_SHARED
    assert grid <= call.SMS and not grid % split.cluster
    rounds = -(-features // split.rows) / (grid // split.cluster)
    if features >= (3072 if itemsize == 2 else 4096) and (itemsize == 2 or tokens <= 16):
        part = split.turns(inputs * itemsize) * split.warps * 128
        read = math.ceil(rounds) * split.rows * part  # by the busiest block
        assert read < features * inputs * itemsize / call.SMS / 0.9
        assert split.warps * (split.stages - 1) * 128 * split.rows >= 40 << 10


def test_what_it_refuses() -> None:
    def shape(*size: int, dtype: np.dtype = BF16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype)

    for x, weight, options in (
        (shape(2, 64, dtype=np.dtype(np.float32)), shape(8, 64), {}),
        (shape(2, 64), shape(8, 64, dtype=np.dtype(np.float32)), {}),
        (shape(2, 48), shape(8, 48), {}),
        (shape(33, 64), shape(8, 64), {}),
        (shape(2, 64), shape(8, 64), {"activation": "gelu"}),
    ):
        with pytest.raises(NotImplementedError):
            cuda.implementation(x, weight, **options)
    with pytest.raises(NotImplementedError, match="no GPU"):
        cuda.matmul(jnp.zeros((1, 64), jnp.bfloat16), jnp.zeros((8, 64), jnp.bfloat16))
