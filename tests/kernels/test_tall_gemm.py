"""The kernel for gated products of many tokens, run on the emulator, against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.kernels.cuda import call, rtc
from jaxllm.kernels.linear import api, tall_cuda
from tests.kernels.emulator.emulator import EmulatorError
from tests.kernels.emulator.launches import Launches

BF16 = np.dtype(ml_dtypes.bfloat16)
SLOW = pytest.mark.slow


def operands(T: int, F: int, D: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((T, D)).astype(BF16), (rng.standard_normal((F, D)) * 0.05).astype(BF16)


def run(x, weight, seed: int, monkeypatch: pytest.MonkeyPatch, activation: str = "silu") -> np.ndarray:
    """What `tall_cuda.implementation` launches, on the emulator, by four blocks at most."""
    Launches(monkeypatch, seed)
    monkeypatch.setattr(tall_cuda, "CLUSTERS", 2)
    return tall_cuda.implementation(jax.ShapeDtypeStruct(weight.shape, weight.dtype), activation)(x, weight)


def expected(x: np.ndarray, weight: np.ndarray, activation: str = "silu") -> np.ndarray:
    gate, up = np.split(x.astype(np.float64) @ weight.astype(np.float64).T, 2, axis=1)
    slope = {"silu": gate, "gelu_tanh": 2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)}[activation]
    return gate / (1 + np.exp(-slope)) * up


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=SLOW)])
@pytest.mark.parametrize(
    ("T", "F", "D", "activation"),
    [
        (300, 512, 320, "silu"),
        pytest.param(128, 768, 256, "gelu_tanh", marks=SLOW),
        pytest.param(2500, 512, 256, "silu", marks=SLOW),
    ],
)
def test_equals_float64(T, F, D, activation, seed, monkeypatch) -> None:
    """With odd seeds copies land at once. More tiles than blocks, the last ones of tokens that are not there."""
    x, weight = operands(T, F, D)
    out, wanted = run(x, weight, seed, monkeypatch, activation), expected(x, weight, activation)
    assert out.dtype == BF16 and out.shape == wanted.shape
    np.testing.assert_allclose(out.astype(np.float64), wanted, rtol=4e-3, atol=4e-3 * np.abs(wanted).max())


BROKEN = {
    "a_stage_freed_early": ("if (step > 0) free_stage(before);", "free_stage(stage.freed());"),
    "halves_of_one_block": ("work.column() / 8 + work.rank * W_BOX", "work.column() / 8"),
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
    source = (rtc.SOURCES / "tall_gemm.cu").read_text()
    assert source.count(right) == 1
    (tmp_path / "tall_gemm.cu").write_text(source.replace(right, wrong))
    monkeypatch.setattr(rtc, "SOURCES", tmp_path)
    x, weight = operands(300, 512, 448)
    with pytest.raises((AssertionError, EmulatorError)):
        for seed in (0, 1):
            out = run(x, weight, seed, monkeypatch)
            wanted = expected(x, weight)
            np.testing.assert_allclose(out.astype(np.float64), wanted, rtol=4e-3, atol=4e-3 * np.abs(wanted).max())


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for many tokens and plain weights, where tiles fill the chip; elsewhere as before."""
    used = []

    def implementation(weight, activation):
        used.append(activation)
        return lambda x, weight: jnp.zeros((len(x), len(weight) // 2), x.dtype)

    monkeypatch.setattr(tall_cuda, "implementation", implementation)

    def require(kernel):
        if kernel != tall_cuda.KERNEL:
            raise NotImplementedError("another")

    monkeypatch.setattr(call, "require", require)
    D, F = 256, 28672
    norm = (jnp.ones(D), 1e-5)

    def uses(T: int, dtype=jnp.bfloat16, **how) -> bool:
        used.clear()
        x, weight = (jax.ShapeDtypeStruct((n, D), dtype) for n in (T, F))
        found = jax.eval_shape(lambda x, weight: api.linear(x, weight, **how), x, weight)
        assert found.shape == (T, F // 2 if "activation" in how else F)
        return bool(used)

    assert uses(1024, norm=norm, activation="silu") and uses(8064, activation="gelu_tanh")
    assert not uses(1000, activation="silu")
    assert not uses(1100, activation="silu"), "half of the last tiles of tokens would be nothing"
    assert not uses(1024, jnp.float32, activation="silu")
    assert not uses(1024)
    assert not uses(1024, activation="silu", bias_F=jnp.ones(F, jnp.bfloat16))
