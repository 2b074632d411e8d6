"""The kernels for experts of few tokens, run on the emulator, against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.formats import Format
from jaxllm.kernels.cuda import call
from jaxllm.kernels.grouped_matmul import cuda
from jaxllm.kernels.grouped_matmul.cuda import Tiling
from jaxllm.kernels.linear.quantized import QuantizedWeight, dequantize, quantize

BF16 = np.dtype(ml_dtypes.bfloat16)


def operands(kind: str, T: int, X: int, E: int, D: int, F: int, seed: int = 0):
    """One token's experts are all different; `elsewhere`: half of them are somebody else's."""
    rng = np.random.default_rng(seed)
    chosen = np.stack([rng.permutation(E)[:X] for _ in range(T)])
    if kind == "one":
        chosen = np.tile(np.arange(X) + E - X, (T, 1))
    if kind == "elsewhere":
        chosen = np.where(rng.random((T, X)) < 0.5, np.where(rng.random((T, X)) < 0.5, -1, E), chosen)
    x, gate_up, down = (rng.standard_normal(s).astype(BF16) for s in ((T, D), (E, 2 * F, D), (E, D, F)))
    weights = rng.random((T, X), np.float32)
    return x, chosen.astype(np.int32), weights, gate_up, down


def expected(x, chosen, weights, gate_up, down, slope=lambda gate: gate, then=lambda y: y) -> np.ndarray:
    """then: what becomes of what comes after the first product, in bf16."""
    out = np.zeros(x.shape)
    for t, e, w in zip(np.repeat(np.arange(len(x)), chosen.shape[1]), chosen.flat, weights.flat, strict=True):
        if 0 <= e < len(gate_up):
            gate, up = np.split(gate_up[e].astype(np.float64) @ x[t].astype(np.float64), 2)
            y = then((gate / (1 + np.exp(-slope(gate))) * up).astype(BF16)).astype(np.float64)
            out[t] += w * (down[e].astype(np.float64) @ y)
    return out


CASES = [
    # kind, T, X, E, D, F, splits
    ("even", 1, 8, 16, 96, 32, (Tiling(1, 1, 1, 4, 1, 2), Tiling(1, 2, 1, 2, 3, 1))),
    ("elsewhere", 7, 4, 6, 64, 64, None),
    ("elsewhere", 40, 3, 5, 320, 96, (Tiling(2, 3, 6, 4, 2, 2), Tiling(1, 4, 3, 4, 1, 2))),
]
MORE = [
    ("one", 40, 2, 5, 64, 32, None),
    ("even", 1, 2, 8, 512, 96, None),
    ("even", 8, 3, 5, 288, 160, (Tiling(1, 1, 1, 8, 2, 2), Tiling(1, 1, 1, 4, 2, 2))),
    ("one", 8, 8, 11, 64, 32, None),
    ("even", 16, 4, 8, 256, 64, None),
    ("even", 70, 2, 3, 64, 64, (Tiling(1, 1, 2, 2, 1, 2), Tiling(2, 2, 4, 1, 2, 2))),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)], ids=str)
def test_equals_float64(case, seed: int, emulated) -> None:
    *sizes, splits = case
    arrays = operands(*sizes)
    emulated.seed = seed
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (arrays[0], arrays[1], arrays[3], arrays[4])]
    run = cuda.implementation(*shapes, activation="silu", of=sizes[3] + 2, splits=splits)
    out = np.asarray(run(*map(jnp.asarray, arrays)))
    wanted = expected(*arrays)
    assert out.dtype == np.float32
    assert np.abs(out - wanted).max() < 6e-3 * np.abs(wanted).max()
    few = sizes[1] <= 8 and sizes[1] * sizes[2] <= 64
    assert emulated.ran == ([] if few else [cuda.LIST]) + [cuda.KERNEL, cuda.KERNEL]


def scaled(wide: np.ndarray, group: int | None, seed: int) -> QuantizedWeight:
    """A weight in e4m3 with scales that differ a thousandfold."""
    rng, D = np.random.default_rng(seed), wide.shape[2]
    size = np.exp(rng.uniform(-3.5, 3.5, (*wide.shape[:2], -(-D // (group or D)))))
    size = np.repeat(size, group or D, axis=2)[..., :D] / 30
    return quantize(jnp.asarray(wide.astype(np.float32) * size, jnp.float32), Format("fp8", group=group))


QUANTIZED = [
    # kind, T, X, E, D, F, group, splits
    ("elsewhere", 7, 4, 6, 384, 192, 128, None),
]
MORE_QUANTIZED = [
    ("elsewhere", 30, 3, 5, 512, 128, None, (Tiling(2, 2, 2, 2, 2, 2), Tiling(2, 4, 2, 1, 1, 2))),
    ("even", 1, 8, 16, 192, 64, None, (Tiling(1, 1, 1, 2, 1, 2), Tiling(1, 2, 1, 1, 1, 1))),
    ("one", 20, 2, 3, 256, 64, 64, (Tiling(2, 2, 4, 2, 1, 2), Tiling(1, 1, 2, 1, 1, 2))),
    ("even", 40, 2, 3, 320, 128, None, None),
    ("even", 40, 2, 3, 320, 128, 64, (Tiling(1, 3, 3, 2, 2, 2), Tiling(1, 2, 3, 2, 1, 2))),
    ("even", 2, 2, 4, 64, 64, None, None),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "case", [*QUANTIZED, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_QUANTIZED)], ids=str
)
def test_e4m3_equals_float64(case, seed: int, emulated) -> None:
    """Weights with scales of rows, or of groups of inputs, that differ a thousandfold."""
    *sizes, group, splits = case
    x, chosen, weights, *both = operands(*sizes)
    kept = [scaled(wide, group, seed) for wide in both]
    emulated.seed = seed
    of_x, of_chosen = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, chosen))
    run = cuda.implementation(of_x, of_chosen, *kept, activation="silu", of=sizes[3] + 2, splits=splits)
    out = np.asarray(run(*map(jnp.asarray, (x, chosen, weights)), *kept))
    wanted = expected(x, chosen, weights, *(np.asarray(dequantize(w, jnp.float32)) for w in kept))
    assert np.abs(out - wanted).max() < 6e-3 * np.abs(wanted).max()


@pytest.mark.slow
def test_gelu(emulated) -> None:
    arrays = operands("even", 3, 2, 4, 64, 32)
    arrays = (*arrays[:3], (arrays[3].astype(np.float32) / 8).astype(BF16), arrays[4])
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (arrays[0], arrays[1], arrays[3], arrays[4])]
    out = cuda.implementation(*shapes, activation="gelu_tanh", of=4)(*map(jnp.asarray, arrays))
    wanted = expected(*arrays, slope=lambda gate: 2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))
    assert np.abs(out - wanted).max() < 6e-3 * np.abs(wanted).max()


def test_a_token_of_no_number_spoils_no_other(emulated) -> None:
    """Nor does its place among the others change a token's result."""
    arrays = operands("one", 20, 2, 3, 64, 32)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (arrays[0], arrays[1], arrays[3], arrays[4])]
    run = cuda.implementation(*shapes, activation="silu", of=3)
    before = np.asarray(run(*map(jnp.asarray, arrays)))
    arrays[0][3] = np.nan
    emulated.seed = 2
    after = np.asarray(run(*map(jnp.asarray, arrays)))
    rest = np.arange(20) != 3
    np.testing.assert_array_equal(before[rest], after[rest])
    assert np.isnan(after[3]).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_list_has_every_pair_once(seed: int, emulated) -> None:
    rng = np.random.default_rng(seed)
    chosen = np.stack([rng.permutation(70)[:8] for _ in range(150)]).astype(np.int32) - 2
    emulated.seed = seed
    (records,) = [np.asarray(cuda.make_list(1200, 64, 16)(chosen))]
    assert records.shape == (cuda.records(1200, 64, 16), 17)
    used = records[records[:, 0] >= 0]
    assert (records[len(used) :] == -1).all()  # those of no work are the last ones
    pairs = used[:, 1:]
    inside = (chosen.ravel() >= 0) & (chosen.ravel() < 64)
    np.testing.assert_array_equal(np.sort(pairs[pairs >= 0]), np.flatnonzero(inside))
    assert (chosen.ravel()[pairs] == used[:, :1])[pairs >= 0].all()
    counts = np.bincount(chosen.ravel()[inside], minlength=64)
    assert len(used) == (-(-counts // 16)).sum()


def test_records_are_enough() -> None:
    for columns in (8, 24):
        for counts in ([1] * 10, [columns + 1] * 10, [columns * 10] + [1] * 9):
            pairs = sum(counts)
            assert sum(-(-c // columns) for c in counts) <= cuda.records(pairs, 10, columns)


def test_splits() -> None:
    for T, X, E in ((1, 8, 128), (16, 8, 128), (64, 8, 128), (256, 8, 128), (64, 2, 8)):
        columns = cuda.columns(T, X, E)
        for D in (96, 768, 2048, 4096, 14336):
            split = cuda.tiling(T, columns, D)
            assert split.columns == max(columns, 8 // split.span)
            assert split.shared * split.blocks <= call.MAX_SHARED
            assert split.registers(cuda.WIDE) <= cuda.REGISTERS
            for values in (cuda.Values(1), cuda.Values(1, 128)):
                split = cuda.tiling(T, columns, max(D, 128), values)
                assert split.shared * split.blocks <= call.MAX_SHARED
                assert split.registers(values) + cuda.ADDRESSES <= 65536 // (split.warps * 32 * split.blocks)
    assert [cuda.columns(T, 8, 128) for T in (1, 16, 64, 128, 256)] == [4, 4, 8, 16, 24]


def test_what_the_kernel_cannot_do() -> None:
    def of(T=1, X=2, E=4, D=64, F=32, dtype=jnp.bfloat16):
        shapes = ((T, D), dtype), ((T, X), jnp.int32), ((E, 2 * F, D), dtype), ((E, D, F), dtype)
        return [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    for arguments, activation in (
        (of(dtype=jnp.float32), "silu"),
        (of(), "gelu"),
        (of(D=48), "silu"),
        (of(F=48), "silu"),
    ):
        with pytest.raises(NotImplementedError):
            cuda.implementation(*arguments, activation=activation, of=4)
