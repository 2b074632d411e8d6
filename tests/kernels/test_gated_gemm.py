"""The kernel for gated products of many tokens, run on the emulator, against float64."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.kernels.cuda import call, rtc
from jaxllm.kernels.linear import api, gated_cuda
from tests.kernels.emulator.emulator import EmulatorError, Kernels

BF16 = np.dtype(ml_dtypes.bfloat16)
SLOW = pytest.mark.slow


def operands(T: int, F: int, D: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((T, D)).astype(BF16), (rng.standard_normal((F, D)) * 0.05).astype(BF16)


def run(x, weight, seed: int, monkeypatch: pytest.MonkeyPatch, activation: str = "silu", **how) -> np.ndarray:
    """What `gated_cuda.implementation` launches, on the emulator, by four blocks at most."""
    ran: list[Kernels] = []

    def compile_ptx(kernel, source, macros):
        ran.append(Kernels(rtc.SOURCES / f"{source}.cu", macros))
        return ""

    def launch(name, ptx, operands, results, *, grid, threads, shared):
        shapes = [(result.shape, np.dtype(result.dtype)) for result in results]
        operands = [np.asarray(x) for x in operands]
        return ran[0].run(name, operands, shapes, grid=grid, threads=threads, shared=shared, seed=seed)

    monkeypatch.setattr(call, "compile_or_refuse", compile_ptx)
    monkeypatch.setattr(call, "launch", launch)
    monkeypatch.setattr(call, "SMS", 4)
    return gated_cuda.implementation(jax.ShapeDtypeStruct(weight.shape, weight.dtype), activation, **how)(x, weight)


def expected(x: np.ndarray, weight: np.ndarray, activation: str = "silu") -> np.ndarray:
    gate, up = np.split(x.astype(np.float64) @ weight.astype(np.float64).T, 2, axis=1)
    slope = {"silu": gate, "gelu_tanh": 2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)}[activation]
    return gate / (1 + np.exp(-slope)) * up


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=SLOW)])
@pytest.mark.parametrize(
    ("T", "F", "D", "activation", "stacked"),
    [
        (300, 512, 192, "silu", True),
        (300, 1024, 192, "silu", False),
        pytest.param(128, 768, 128, "gelu_tanh", True, marks=SLOW),
        pytest.param(1030, 512, 320, "silu", True, marks=SLOW),
        pytest.param(2200, 512, 128, "silu", False, marks=SLOW),
    ],
)
def test_equals_float64(T, F, D, activation, stacked, seed, monkeypatch) -> None:
    """With odd seeds copies land at once. More tiles than blocks, the last ones of tokens that are not there."""
    x, weight = operands(T, F, D)
    out, wanted = run(x, weight, seed, monkeypatch, activation, stacked=stacked), expected(x, weight, activation)
    assert out.dtype == BF16 and out.shape == wanted.shape
    np.testing.assert_allclose(out.astype(np.float64), wanted, rtol=4e-3, atol=4e-3 * np.abs(wanted).max())


BROKEN = {
    "a_stage_freed_early": ("if (step > 0) free_stage(before);", "free_stage(stage.freed());"),
    "halves_of_one_block": ("column / 8 + rank * W_BOX", "column / 8"),
    "rows_of_the_gate_alone": ("{row, row * OUT_FEATURES, row * 8}", "{row, row * 8, row * 16}"),
    "bytes_of_this_block": ("barrier_expect(full, STAGE)", "barrier_expect(full, STAGE - W_BYTES / 2)"),
    "not_waited_for": ("barrier_wait(stage.full(), stage.phase);", ""),
    "copied_over": ("cluster_barrier_wait(stage.freed(), stage.phase ^ 1);", ""),
}


@pytest.mark.parametrize(
    "what", [name if i % 3 == 0 else pytest.param(name, marks=SLOW) for i, name in enumerate(BROKEN)]
)
def test_the_emulator_finds_mistakes(what: str, tmp_path, monkeypatch) -> None:
    for path in rtc.SOURCES.glob("*.cu*"):
        (tmp_path / path.name).write_text(path.read_text())
    right, wrong = BROKEN[what]
    source = (rtc.SOURCES / "gated_gemm.cu").read_text()
    assert source.count(right) == 1
    (tmp_path / "gated_gemm.cu").write_text(source.replace(right, wrong))
    monkeypatch.setattr(rtc, "SOURCES", tmp_path)
    x, weight = operands(300, 512, 448)
    with pytest.raises((AssertionError, EmulatorError)):
        for seed in (0, 1):
            out = run(x, weight, seed, monkeypatch)
            wanted = expected(x, weight)
            np.testing.assert_allclose(out.astype(np.float64), wanted, rtol=4e-3, atol=4e-3 * np.abs(wanted).max())


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for many tokens and plain weights, with the activation in it; elsewhere as before."""
    used = []

    def implementation(weight, activation):
        used.append(weight.shape)
        return lambda x, weight: x[:, : weight.shape[0] // 2] * 0

    monkeypatch.setattr(gated_cuda, "implementation", implementation)
    monkeypatch.setattr(gated_cuda, "USED", True)
    monkeypatch.setattr(call, "require", lambda kernel: None)
    weight = jax.ShapeDtypeStruct((gated_cuda.FEATURES, gated_cuda.FEATURES), jnp.bfloat16)
    for T, dtype, taken in ((1024, jnp.bfloat16, True), (1000, jnp.bfloat16, False), (1024, jnp.float32, False)):
        x = jax.ShapeDtypeStruct((T, gated_cuda.FEATURES), dtype)
        with contextlib.suppress(NotImplementedError):
            jax.eval_shape(lambda x, weight: gated_cuda.gated(x, weight, "silu"), x, weight)
        assert bool(used) == taken
        used.clear()
    norm = (jnp.ones(gated_cuda.FEATURES), 1e-5)
    x = jax.ShapeDtypeStruct((2048, gated_cuda.FEATURES), jnp.bfloat16)
    found = jax.eval_shape(lambda x, weight: api.gated(x, weight, "silu", norm=norm), x, weight)
    assert found.shape == (2048, gated_cuda.FEATURES // 2) and used
