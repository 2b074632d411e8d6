"""The kernel for gated products of up to 256 tokens, run on the emulator, against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jaxllm.kernels.cuda import call
from jaxllm.kernels.linear import api, narrow_cuda, wide_cuda
from jaxllm.kernels.linear.product import BlockedTokens, Product, ScaledTokens
from jaxllm.layers.linear import ColumnLinear, RowLinear
from jaxllm.layers.mlp import GatedMLP
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.stream import Unadded, like, settle
from tests.kernels.emulator.launches import Launches

BF16 = np.dtype(ml_dtypes.bfloat16)


def operands(T: int, F: int, D: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((T, D)).astype(BF16), (rng.standard_normal((F, D)) * 0.05).astype(BF16)


def blocked(x: np.ndarray) -> BlockedTokens:
    """NaNs in the rows beyond the tokens."""
    rows = wide_cuda.rows_for(len(x))
    values = np.array(BlockedTokens.of(jnp.asarray(x), rows).values)
    values[:, len(x) :] = np.nan
    return BlockedTokens(values, len(x))


def run(
    x: np.ndarray,
    weight: np.ndarray,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
    activation: str = "silu",
    stages: tuple[int, int] | None = None,
    squares: np.ndarray | None = None,
) -> np.ndarray:
    """What `wide_cuda.implementation` launches, on the emulator."""
    Launches(monkeypatch, seed)
    like = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
    if stages is not None:
        monkeypatch.setattr(wide_cuda, "stages", lambda *_: stages)
    if squares is None:
        return wide_cuda.implementation(len(x), like, activation)(blocked(x), weight)
    return wide_cuda.implementation(len(x), like, activation, squares.shape, EPS)(blocked(x), weight, squares)


def expected(x: np.ndarray, weight: np.ndarray, activation: str) -> np.ndarray:
    gate, up = np.split(x.astype(np.float64) @ weight.astype(np.float64).T, 2, axis=1)
    slope = {"silu": gate, "gelu_tanh": 2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)}[activation]
    return gate / (1 + np.exp(-slope)) * up


SLOW = pytest.mark.slow
EPS = 1e-2


@pytest.mark.parametrize(
    ("T", "F", "D", "activation", "stages", "seed"),
    [
        # tokens, features, inputs; stages of tokens and of the weight
        (100, 448, 384, "silu", (2, 3), 1),
        (255, 448, 256, "silu", (2, 2), 0),
        pytest.param(100, 448, 384, "silu", (2, 3), 0, marks=SLOW),
        pytest.param(130, 448, 384, "silu", (3, 2), 1, marks=SLOW),
        pytest.param(255, 448, 320, "silu", (2, 2), 1, marks=SLOW),
        *(
            pytest.param(*case, seed, marks=SLOW)
            for seed in (0, 1)
            for case in (
                (192, 448, 640, "gelu_tanh", None),
                (128, 896, 512, "silu", (3, 3)),
                (256, 448, 640, "silu", None),
                (7, 448, 512, "silu", None),
            )
        ),
    ],
)
def test_equals_float64(T, F, D, activation, stages, seed, monkeypatch) -> None:
    """With odd seeds copies land at once."""
    x, weight = operands(T, F, D)
    out, wanted = run(x, weight, seed, monkeypatch, activation, stages), expected(x, weight, activation)
    assert out.dtype == BF16 and out.shape == wanted.shape
    np.testing.assert_allclose(out.astype(np.float64), wanted, rtol=4e-3, atol=4e-3 * np.abs(wanted).max())


@pytest.mark.parametrize(("T", "C", "parts"), [(61, 64, 18), pytest.param(120, 128, 5, marks=SLOW)])
def test_after_a_norm_whose_factors_are_left(T: int, C: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = operands(T, 448, 256)
    squares = np.random.default_rng(1).uniform(1, 2, (parts, C)).astype(np.float32)
    squares[:, T:] = np.nan
    out = run(x, weight, 1, monkeypatch, stages=(2, 3), squares=squares)
    factors = 1 / np.sqrt(squares.astype(np.float64).sum(axis=0)[:T] / 256 + EPS)
    wanted = expected(x.astype(np.float64) * factors[:, None], weight, "silu")
    np.testing.assert_allclose(out.astype(np.float64), wanted, rtol=4e-3, atol=4e-3 * np.abs(wanted).max())


def test_a_layer_uses_it_after_its_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """And without a GPU the same program says the same."""
    T, D, F = 130, 512, 2 * wide_cuda.COLUMNS
    rng = np.random.default_rng(0)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) / 8, jnp.bfloat16)

    x, part, norm_D, gate_up, down = (random(*s) for s in ((T, D), (T, D), (D,), (F, D), (D, F // 2)))

    def param(value: jax.Array) -> nnx.Param:
        return nnx.Param(value)

    monkeypatch.setattr("jaxllm.layers.linear.param", param)
    monkeypatch.setattr("jaxllm.layers.norm.param", param)
    norm = RMSNorm(norm_D.astype(jnp.float32), 1e-5)
    mlp = GatedMLP(ColumnLinear(gate_up), RowLinear(down, axes=()), "silu")

    def half() -> tuple[int, jax.Array]:
        stream = Unadded(Product.of(part), x)
        blocked = mlp.gate_up.blocks(like(stream), "silu")
        x_TD, y_TD, left = norm.settle(stream, blocked=blocked)
        assert isinstance(y_TD, BlockedTokens) == bool(blocked)
        return blocked, settle(mlp(y_TD, left, residual=x_TD))[0]

    before, wanted = half()
    made = []
    monkeypatch.setattr(call, "require", lambda kernel: None)
    monkeypatch.setattr(call, "compile_or_refuse", lambda kernel, source, macros: made.append(kernel) or "")
    monkeypatch.setattr(call, "SMS", F // wide_cuda.COLUMNS)
    monkeypatch.setattr(wide_cuda, "TOKENS", ((129, 256),))
    after, found = half()
    assert (before, after) == (0, 192) and wide_cuda.KERNEL in made
    np.testing.assert_array_equal(found, wanted)
    # A sum that is there already: a norm alone makes the blocks.
    made.clear()
    summed = settle(Unadded(Product.of(part), x))[0]
    np.testing.assert_array_equal(settle(mlp(summed, norm, residual=summed))[0], wanted)
    assert set(made) == {"residual_norm", wide_cuda.KERNEL}
    for tokens, wider, activation in ((128, gate_up, "silu"), (257, gate_up, "silu"), (200, gate_up, "gelu")):
        assert not api.takes_blocks(jax.ShapeDtypeStruct((tokens, D), jnp.bfloat16), wider, activation)
    monkeypatch.setattr(call, "SMS", 4)
    assert mlp.gate_up.blocks(like(x), "silu") == 0


def test_the_products_before_it_make_its_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tokens for which `narrow_cuda` makes those; without a GPU the program says the same."""
    T, D, F = 40, 512, 2 * wide_cuda.COLUMNS
    rng = np.random.default_rng(0)
    x, out_DD, norm_D, gate_up = (
        jnp.asarray(rng.standard_normal(s) / 8, jnp.bfloat16) for s in ((T, D), (D, D), (D,), (F, D))
    )
    monkeypatch.setattr("jaxllm.layers.linear.param", nnx.Param)
    monkeypatch.setattr("jaxllm.layers.norm.param", nnx.Param)
    norm, out, up = RMSNorm(norm_D.astype(jnp.float32), 1e-5), RowLinear(out_DD, axes=()), ColumnLinear(gate_up)

    def half() -> tuple[bool, jax.Array]:
        stream = out(x, residual=x)
        scaled, blocked = up.takes_scaled(like(stream), "silu"), up.blocks(like(stream), "silu")
        _, y_TD, left = norm.settle(stream, blocked=blocked, scaled=scaled)
        assert isinstance(y_TD, ScaledTokens) == scaled
        return scaled, up.gated(y_TD, "silu", left, (), quantised=False)

    before, wanted = half()
    made = []
    monkeypatch.setattr(call, "require", lambda kernel: None)
    monkeypatch.setattr(call, "compile_or_refuse", lambda kernel, source, macros: made.append((kernel, macros)) or "")
    monkeypatch.setattr(call, "SMS", F // wide_cuda.COLUMNS)
    monkeypatch.setattr(narrow_cuda, "SCALED", ((33, 64),))
    after, found = half()
    assert (before, after) == (False, True)
    assert {kernel: (macros["PARTS"] > 0, macros.get("BLOCKED")) for kernel, macros in made if "PARTS" in macros} == {
        wide_cuda.KERNEL: (True, None),
        narrow_cuda.KERNEL: (False, 64),
    }
    np.testing.assert_allclose(found.astype(np.float32), wanted.astype(np.float32), rtol=0.02, atol=0.02)


def test_blocked_tokens_and_back() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 192)), BF16)
    made = BlockedTokens.of(x, 64)
    assert made.values.shape == (3, 64, 64) and made.shape == x.shape
    np.testing.assert_array_equal(made.plain(), x)
    # row 3, panel 2, piece 5 is kept at 5 ^ 3
    np.testing.assert_array_equal(made.values[2, 3, 48:56], x[3, 128 + 40 : 128 + 48])
