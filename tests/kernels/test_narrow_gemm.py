"""The kernel for products of 8 to 128 tokens, run on the emulator, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jaxllm.kernels.cuda import call
from jaxllm.kernels.linear import narrow_cuda, reference
from jaxllm.kernels.linear.narrow_cuda import Split
from jaxllm.kernels.linear.product import BlockedTokens, ScaledTokens
from jaxllm.layers.linear import ColumnLinear, RowLinear
from jaxllm.layers.mlp import GatedMLP
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.stream import Unmultiplied, like, settle
from tests.kernels.emulator.launches import Launches

BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Case:
    """clusters: on the chip at once, fewer than tiles; stages: few, so that all are used again and again.

    parts: of sums of squares of a norm before the product; scaled: there is one after it.
    """

    tokens: int
    features: int
    inputs: int
    split: Split
    clusters: int
    stages: int = 2
    activation: str | None = None
    residual: bool = False
    out: np.dtype = BF16
    parts: int = 0
    scaled: bool = False
    blocked: int = 0


CASES = [
    # rows of a tile, blocks of a cluster, panels of 64 inputs in a stage
    Case(7, 256, 2560, Split(64, 2, 4), clusters=2, residual=True, scaled=True),
    Case(61, 208, 1280, Split(128, 4, 1, stagger=True), clusters=1, stages=3, activation="silu", parts=5),
]
MORE = [
    Case(8, 128, 2560, Split(64, 2, 4), clusters=2, residual=True),
    Case(5, 200, 256, Split(64, 1, 1), clusters=2, parts=130),
    Case(30, 200, 384, Split(128, 1, 1), clusters=1, residual=True, scaled=True, parts=64),
    Case(50, 256, 512, Split(64, 2, 2), clusters=2, residual=True, scaled=True, blocked=64),
    Case(5, 200, 256, Split(64, 1, 1), clusters=2, out=np.dtype(np.float32)),
    Case(13, 384, 768, Split(64, 4, 1, fetch=128, stagger=True), clusters=2, residual=True),
    Case(24, 384, 640, Split(192, 4, 1), clusters=2, residual=True),
    Case(64, 256, 256, Split(256, 1, 1), clusters=1, activation="gelu_tanh", residual=True),
    Case(100, 320, 512, Split(64, 4, 1), clusters=2, residual=True, out=np.dtype(np.float32)),
]


def operands(case: Case, seed: int) -> list[np.ndarray]:
    """x, weight and the residual, NaNs where the case has none."""
    rng, (T, F, D) = np.random.default_rng(seed), (case.tokens, case.features, case.inputs)
    residual = rng.standard_normal((T, F // 2 if case.activation else F)) if case.residual else np.full(8, np.nan)
    given = [a.astype(BF16) for a in (rng.standard_normal((T, D)), rng.standard_normal((F, D)) * 0.05, residual)]
    squares = rng.uniform(1, 2, (max(1, case.parts), narrow_cuda.columns_for(T))).astype(np.float32)
    squares[:, T:] = np.nan
    return [*given, squares, rng.uniform(0.5, 1.5, F).astype(np.float32)]


EPS = 1e-2


def run(case: Case, arguments: list[np.ndarray], seed: int, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """What `narrow_cuda.implementation` launches, on the emulator."""
    Launches(monkeypatch, seed)
    monkeypatch.setattr(narrow_cuda, "splitting", lambda *_: case.split)
    monkeypatch.setattr(Split, "stages", lambda *_, **__: case.stages)
    monkeypatch.setitem(narrow_cuda.CLUSTERS, case.split.cluster, case.clusters)
    x, weight = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments[:2])
    kernel = narrow_cuda.implementation(
        x,
        weight,
        activation=case.activation,
        residual=case.residual,
        out_dtype=case.out,
        parts=case.parts,
        eps=EPS,
        scaled=case.scaled,
        blocked=case.blocked,
    )
    return kernel(*arguments)


def expected(case: Case, arguments: list[np.ndarray]) -> np.ndarray:
    x, weight, residual, squares, _ = (a.astype(np.float64) for a in arguments)
    if case.parts:
        x /= np.sqrt(squares.sum(axis=0)[: case.tokens] / case.inputs + EPS)[:, None]
    y = x @ weight.T
    if case.activation:
        gate, up = np.split(y, 2, axis=1)
        slope = {"silu": gate, "gelu_tanh": 2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)}[case.activation]
        y = gate / (1 + np.exp(-slope)) * up
    return y + residual if case.residual else y


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)], ids=str)
def test_equals_float64(case: Case, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = operands(case, seed)
    (out, *norm), wanted = run(case, arguments, seed, monkeypatch), expected(case, arguments)
    assert out.dtype == case.out and out.shape == wanted.shape
    tolerance = 1e-6 if case.out == np.float32 else 4e-3
    np.testing.assert_allclose(out.astype(np.float64), wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())
    assert len(norm) == 2 * case.scaled
    if case.scaled:
        made, (values, squares) = out.astype(np.float64), norm
        if case.blocked:
            values = np.array(BlockedTokens(jnp.asarray(values), case.tokens).plain())
        np.testing.assert_array_equal(values, (out.astype(np.float32) * arguments[4]).astype(BF16))
        np.testing.assert_allclose(squares.sum(axis=0)[: case.tokens], (made * made).sum(axis=1), rtol=1e-5)


@pytest.mark.slow
def test_a_token_does_not_depend_on_the_others_or_on_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(9, 64, 512, Split(64, 4, 1), clusters=1)
    arguments = operands(case, 0)
    (before,) = run(case, arguments, 0, monkeypatch)
    arguments[0][[0, 8]] = 3
    (after,) = run(case, arguments, 2, monkeypatch)
    np.testing.assert_array_equal(before[1:8].view(np.uint16), after[1:8].view(np.uint16))
    assert (before[0] != after[0]).any()


@pytest.mark.parametrize("tokens", [1, 8, 16, 24, 32, 64, 128])
@pytest.mark.parametrize(
    ("features", "inputs"),
    [(3072, 4096), (4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (2560, 8192), (8192, 2048), (8192, 7168)],
)
def test_the_split_fills_the_chip(tokens: int, features: int, inputs: int) -> None:
    split, columns = narrow_cuda.splitting(tokens, features, inputs), narrow_cuda.columns_for(tokens)
    clusters, stages = split.clusters(features), split.stages(columns, features)
    assert clusters <= narrow_cuda.CLUSTERS[split.cluster] and clusters * split.cluster >= 80
    rounds = -(-split.tiles(features) // clusters)
    read = rounds * split.rows * inputs // split.cluster  # by the busiest block
    assert read <= features * inputs / 80
    assert stages >= 3 and stages * split.rows * split.panels * 128 >= 64 << 10  # under way


def test_what_it_refuses() -> None:
    def shape(*size: int, dtype: np.dtype = BF16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype)

    for x, weight, options in (
        (shape(2, 64, dtype=np.dtype(np.float32)), shape(64, 64), {}),
        (shape(2, 64), shape(64, 64, dtype=np.dtype(np.float32)), {}),
        (shape(2, 96), shape(64, 96), {}),
        (shape(2, 64), shape(60, 64), {}),
        (shape(129, 64), shape(64, 64), {}),
        (shape(2, 64), shape(64, 64), {"activation": "gelu"}),
    ):
        with pytest.raises(NotImplementedError):
            narrow_cuda.implementation(x, weight, **options)
    with pytest.raises(NotImplementedError, match="no GPU"):
        narrow_cuda.matmul(jnp.zeros((8, 64), jnp.bfloat16), jnp.zeros((64, 64), jnp.bfloat16))


def test_products_make_the_norms_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the table says so; without a GPU the same program says the same."""
    T, D, F = 5, 512, 768
    rng = np.random.default_rng(0)
    monkeypatch.setattr("jaxllm.layers.linear.param", nnx.Param)
    monkeypatch.setattr("jaxllm.layers.norm.param", nnx.Param)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) / 16, BF16)

    first, norm = (
        RMSNorm(jnp.asarray(rng.uniform(1, 2, D), np.float32), 1e-5),
        RMSNorm(random(D).astype(np.float32), 1e-5),
    )
    qkv, out = ColumnLinear(random(F, D)), RowLinear(random(D, D), axes=())
    mlp = GatedMLP(ColumnLinear(random(2 * F, D)), RowLinear(random(D, F), axes=()), "silu")
    x = random(T, D) * 16

    def layer() -> tuple[bool, list[jax.Array]]:
        stream = out(x, residual=x)
        scaled = mlp.gate_up.takes_scaled(like(stream), "silu")
        assert isinstance(stream, Unmultiplied) == scaled
        x_TD, y_TD, left = norm.settle(stream, scaled=scaled)
        assert isinstance(y_TD, ScaledTokens) == scaled
        stream = mlp(y_TD, left, residual=x_TD)
        total, y_TD, left = first.settle(stream, scaled=qkv.takes_scaled(like(stream)))
        product = qkv.product(y_TD, left, (), in_parts=False)
        return scaled, [total, product.finish(), settle(stream)[0], settle(stream, (norm.weight[...], 1e-5))[0]]

    before, wanted = layer()
    made = []
    monkeypatch.setattr(call, "require", lambda kernel: None)
    monkeypatch.setattr(call, "compile_or_refuse", lambda kernel, source, macros: made.append(macros) or "")
    monkeypatch.setattr(narrow_cuda, "SCALED", ((4, 8),))
    after, found = layer()
    assert (before, after) == (False, True)
    assert {(bool(macros["PARTS"]), macros["SCALED"]) for macros in made} == {(True, 0), (False, 1), (False, 0)}
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=0.02, atol=0.02)
    for tokens in (3, 9):
        assert not qkv.takes_scaled(jax.ShapeDtypeStruct((tokens, D), BF16))
    monkeypatch.setenv("JAXLLM_CUDA", "+narrow_norm")
    assert qkv.takes_scaled(jax.ShapeDtypeStruct((3, D), BF16)) and not qkv.takes_scaled(
        jax.ShapeDtypeStruct((3, D), np.dtype(np.float32))
    )


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the table; elsewhere XLA does the same."""
    monkeypatch.setattr(call, "require", lambda kernel: None)
    monkeypatch.setattr(call, "compile_or_refuse", lambda kernel, source, macros: "")
    monkeypatch.setitem(narrow_cuda.MEGABYTES, "plain", ())
    monkeypatch.setitem(narrow_cuda.MEGABYTES, "gated", ((8, 64, 1),))
    rng = np.random.default_rng(0)
    weight, norm_D = jnp.asarray(rng.standard_normal((256, 512)), BF16), jnp.asarray(rng.uniform(1, 2, 512), np.float32)
    for T, activation, used in ((8, "silu", True), (7, "silu", False), (65, "silu", False), (8, None, False)):
        x = jnp.asarray(rng.standard_normal((T, 512)), BF16)
        options = {"norm": (norm_D, 1e-5), "activation": activation}
        if not used:
            with pytest.raises(NotImplementedError, match=f"{T} tokens"):
                narrow_cuda.linear(x, weight, residual_TF=None, **options)
            continue
        found = narrow_cuda.linear(x, weight, residual_TF=None, **options)
        np.testing.assert_array_equal(found, reference.linear(x, weight, **options))
    monkeypatch.setenv("JAXLLM_CUDA", "+narrow_gemm")
    for T, used in ((1, False), (7, True), (128, True), (129, False)):
        x = jnp.zeros((T, 512), BF16)
        if used:
            narrow_cuda.choose(x, weight, gated=False)
        else:
            with pytest.raises(NotImplementedError, match=f"{T} tokens"):
                narrow_cuda.choose(x, weight, gated=False)
