"""The kernel for products of few tokens in e4m3, run on the emulator, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.formats import Format
from jaxllm.kernels.cuda import call
from jaxllm.kernels.linear import api, fp8_cuda, quantized, reference
from jaxllm.kernels.linear.fp8_cuda import Split
from jaxllm.kernels.linear.product import Activations, QuantizedTokens
from jaxllm.kernels.linear.quantized import QuantizedWeight, quantize, quantize_tokens
from tests.kernels.emulator.launches import Launches

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
F32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Case:
    tokens: int
    features: int
    inputs: int
    split: Split
    wide: bool = False
    eps: float | None = None
    activation: str | None = None
    residual: bool = False
    ahead: bool = False
    out: np.dtype = F32


CASES = [
    # rows of a tile, blocks of a cluster; warpgroups over the rows, and over the inputs; panels
    Case(3, 72, 640, Split(32, 1, 1, 1, 2), out=BF16),  # rows and lines that are not there
    Case(21, 128, 1408, Split(64, 2, 1, 2, 1), ahead=True),
    Case(3, 192, 2048, Split(64, 1, 1, 2, 1), wide=True, eps=1e-2, activation="silu", residual=True),
]
SLOW_CASES = [
    Case(1, 96, 1024, Split(32, 1, 1, 2, 1)),
    Case(8, 48, 2304, Split(48, 1, 1, 2, 2)),
    Case(16, 224, 512, Split(224, 1, 2, 1, 1), out=BF16),
    Case(33, 320, 384, Split(160, 1, 2, 1, 1)),
    Case(64, 96, 1024, Split(96, 4, 2, 1, 1)),
    Case(64, 192, 512, Split(128, 4, 2, 1, 1), activation="gelu_tanh", out=BF16),
    Case(1, 64, 1536, Split(32, 1, 1, 2, 1), wide=True, residual=True, out=BF16),
    Case(4, 128, 2048, Split(64, 2, 1, 2, 1), wide=True, eps=1e-5),
]


def operands(case: Case, seed: int) -> list[np.ndarray]:
    """x, its scales, the weight, its scales, the norm, the residual and the weight ahead.

    Those that the case does not have hold NaNs.
    """
    rng, (T, F, D) = np.random.default_rng(seed), (case.tokens, case.features, case.inputs)
    x, weight = (np.clip(rng.standard_normal(shape) * 100, -448, 448) for shape in ((T, D), (F, D)))
    scales = [rng.uniform(0.001, 0.002, (n, 1)).astype(np.float32) for n in (T, F)]
    norm = rng.uniform(0.5, 1.5, D) if case.eps is not None else np.full(D, np.nan)
    residual = rng.standard_normal((T, F // 2 if case.activation else F)) if case.residual else np.full(8, np.nan)
    if case.wide:
        x, scales[0] = x / 100, np.full(8, np.nan, np.float32)
    first = [x.astype(BF16 if case.wide else E4M3), scales[0], weight.astype(E4M3), scales[1]]
    ahead = np.zeros((24, 128), E4M3)  # 512 bytes of each block and a little more
    return [*first, norm.astype(np.float32), residual.astype(BF16), ahead]


def expected(case: Case, arguments: list[np.ndarray]) -> np.ndarray:
    x, x_scale, weight, scale, norm, residual, _ = (a.astype(np.float64) for a in arguments)
    if case.eps is not None:
        x = x / np.sqrt((x * x).mean(1, keepdims=True) + case.eps) * norm
    if case.wide:
        values, found = quantize_tokens(jnp.asarray(x.astype(BF16)))
        x, x_scale = (np.asarray(a).astype(np.float64) for a in (values, found))
    y = (x * x_scale) @ (weight * scale).T
    if case.activation:
        gate, up = np.split(y, 2, axis=1)
        slope = {"silu": gate, "gelu_tanh": 2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)}[case.activation]
        y = gate / (1 + np.exp(-slope)) * up
    return y + residual if case.residual else y


def run(case: Case, arguments: list[np.ndarray], seed: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """What `fp8_cuda.implementation` launches, on the emulator."""
    Launches(monkeypatch, seed)
    kernel = fp8_cuda.implementation(
        jax.ShapeDtypeStruct(arguments[0].shape, arguments[0].dtype),
        case.features,
        eps=case.eps,
        activation=case.activation,
        residual=case.residual,
        ahead=jax.ShapeDtypeStruct(arguments[-1].shape, E4M3) if case.ahead else None,
        out_dtype=case.out,
        split=case.split,
    )
    return kernel(*arguments)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES)], ids=str
)
def test_equals_float64(case: Case, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = operands(case, seed)
    out, wanted = run(case, arguments, seed, monkeypatch), expected(case, arguments)
    assert out.dtype == case.out and out.shape == wanted.shape
    tolerance = 1e-6 if case.out == F32 else 4e-3
    np.testing.assert_allclose(out.astype(np.float64), wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


def test_a_token_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[1]
    arguments = operands(case, 0)
    before = run(case, arguments, 0, monkeypatch)
    arguments[0][[0, 20]] = 3
    after = run(case, arguments, 2, monkeypatch)
    np.testing.assert_array_equal(before[1:20].view(np.uint32), after[1:20].view(np.uint32))
    assert (before[0] != after[0]).any()


@pytest.mark.parametrize(("tokens", "wide"), [(1, True), (4, True), (8, False), (16, False), (32, False), (64, False)])
@pytest.mark.parametrize(
    ("features", "inputs"), [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (10240, 8192), (8192, 28672)]
)
def test_the_split_fills_the_chip(tokens: int, wide: bool, features: int, inputs: int) -> None:
    wide = wide and inputs < 16384  # more do not fit
    split = fp8_cuda.splitting(tokens, features, inputs, wide=wide, gated=features == 28672)
    assert split.fits(tokens, inputs, wide) and split.shared(tokens, inputs, wide) <= call.MAX_SHARED
    blocks = split.grid(features)
    assert blocks / (-(-blocks // call.SMS) * call.SMS) > 0.9
    stages = split.stages(tokens, inputs, wide)
    assert (stages - 1) * split.lines * 128 * split.rows >= 48 << 10


def test_what_it_refuses() -> None:
    for shape, dtype, features, options in (
        ((65, 1024), E4M3, 64, {}),
        ((1, 1000), E4M3, 64, {}),
        ((1, 1024), E4M3, 60, {}),
        ((1, 1024), E4M3, 64, {"eps": 1e-5}),
        ((1, 1024), E4M3, 64, {"activation": "gelu"}),
        ((5, 1024), BF16, 64, {}),
        ((4, 8192), BF16, 8192, {"eps": 1e-5}),  # more than a thread has registers for
        ((1, 1024), F32, 64, {}),
    ):
        with pytest.raises(NotImplementedError):
            fp8_cuda.implementation(jax.ShapeDtypeStruct(shape, dtype), features, **options)
    weight = quantize(jnp.ones((64, 128), jnp.bfloat16), Format("fp8"))
    with pytest.raises(NotImplementedError, match="no GPU"):
        fp8_cuda.matmul(jnp.zeros((1, 128), jnp.bfloat16), weight)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """The kernel as if there were a GPU, and the macros of those that programs for one have."""
    compiled: list[dict[str, object]] = []

    def compile_ptx(kernel: str, source: str, macros: dict[str, object]) -> str:
        compiled.append({"KERNEL": kernel, **macros})
        return ""

    monkeypatch.setattr(call, "compile_or_refuse", compile_ptx)
    monkeypatch.setattr(call, "require", lambda kernel: None)
    monkeypatch.setattr(fp8_cuda, "MEGABYTES", ((1, 64, 240),))
    return compiled


def weight_of(features: int, inputs: int, kind: str = "fp8") -> QuantizedWeight:
    wide = np.random.default_rng(1).standard_normal((features, inputs))
    return quantize(jnp.asarray(wide, jnp.bfloat16), Format(kind))


def test_it_is_used_where_it_is_faster(used: list, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(tokens: int, weight: QuantizedWeight, dtype: np.dtype = BF16) -> bool:
        return fp8_cuda.is_chosen(jax.ShapeDtypeStruct((tokens, weight.shape[1]), dtype), weight)

    weight = weight_of(64, 128)
    assert chosen(1, weight) and chosen(64, weight) and not chosen(65, weight)
    assert not chosen(1, weight, F32) and not chosen(1, weight_of(64, 128, "int8")) and not chosen(1, weight_of(64, 96))
    monkeypatch.setattr(fp8_cuda, "MEGABYTES", ((9, 64, 240),))
    assert chosen(9, weight) and not chosen(8, weight)
    monkeypatch.setenv("JAXLLM_CUDA", "+skinny_fp8")
    assert chosen(8, weight)


@pytest.mark.parametrize("tokens", [2, 6])
def test_a_layer_has_the_same_arithmetic_without_it(tokens: int, used: list) -> None:
    """What a program for another device computes: tokens are quantised, whoever does it."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((tokens, 128)), jnp.bfloat16)
    norm, up, down = (
        (jnp.asarray(rng.uniform(0.5, 1.5, 128), jnp.float32), 1e-5),
        weight_of(512, 128),
        weight_of(128, 256),
    )

    quantised = api.multiplies_e4m3(jax.ShapeDtypeStruct((tokens, 256), jnp.bfloat16), down)
    assert quantised == api.multiplies_e4m3(x, up) == (tokens > 4)
    y = jax.jit(lambda x: api.gated(x, up, "silu", norm=norm, quantised=quantised))(x)
    found = jax.jit(lambda y: api.linear(y, down, residual=x))(y)
    ours = [macros for macros in used if macros["KERNEL"] == fp8_cuda.KERNEL]
    assert [(macros["WIDE"], macros["NORM"], macros["GATED"], macros["RESIDUAL"]) for macros in ours] == (
        [(1, 1, 1, 0), (1, 0, 0, 1)] if tokens == 2 else [(0, 0, 0, 0)] * 2
    )

    def exact(x: Activations, weight: QuantizedWeight, dtype: np.dtype) -> jax.Array:
        values, scale = (x.values, x.scale) if isinstance(x, QuantizedTokens) else quantize_tokens(x)
        y = jnp.matmul(values.astype(F32), weight.values.astype(F32).T) * scale * weight.scale[:, 0]
        return y.astype(dtype)

    def far(found: jax.Array, wanted: jax.Array) -> float:
        a, b = np.asarray(found, F32), np.asarray(wanted, F32)
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    assert isinstance(y, QuantizedTokens) == quantised
    wanted = reference.linear(x, up, norm=norm, activation="silu", matmul=exact)
    if isinstance(y, QuantizedTokens):  # another last bit of bfloat16 makes some e4m3 an eighth larger or smaller
        values, scale = quantize_tokens(wanted)
        assert far(y.values.astype(F32) * y.scale, values.astype(F32) * scale) < 0.02
    else:
        assert far(y, wanted) < 0.006
    assert far(found, exact(y, down, jnp.bfloat16) + x) < 0.003


def test_products_of_other_ranks_and_dtypes(used: list) -> None:
    x, weight = jnp.ones((2, 3, 128), jnp.bfloat16), weight_of(64, 128)
    for y in (x, x[:, :1]):
        found = jax.jit(api.matmul)(y, weight)
        assert found.dtype == jnp.float32 and found.shape == (*y.shape[:2], 64)
        np.testing.assert_allclose(found, product_of(y, weight), rtol=1e-6)
    assert {macros["OUT_FLOAT"] for macros in used if macros["KERNEL"] == fp8_cuda.KERNEL} == {1}


def product_of(x: jax.Array, weight: QuantizedWeight) -> np.ndarray:
    tokens = QuantizedTokens(*quantize_tokens(x.reshape(-1, x.shape[-1])), F32)
    return np.asarray(quantized.product(tokens, weight).finish()).reshape(*x.shape[:-1], -1)
