"""Experts on their tokens, against a loop over tokens and experts."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.bins import Bins
from jaxllm.formats import Format
from jaxllm.kernels.cuda import call, rtc
from jaxllm.kernels.grouped_matmul import api, cuda, reference, ring_cuda, tiles_cuda
from jaxllm.kernels.linear.quantized import QuantizedWeight, dequantize, quantize

CHOICES = ("even", "one", "few", "elsewhere")


def choose(kind: str, rng: np.random.Generator, T: int, X: int, E: int) -> np.ndarray:
    """The experts of each token: random, all the same, among X + 1 of them, or half of them somebody else's."""
    if kind == "one":
        return np.tile(np.arange(X) + E - X, (T, 1))
    among = X + 1 if kind == "few" else E
    chosen = np.stack([rng.permutation(among)[:X] for _ in range(T)])
    return np.where(rng.random((T, X)) < 0.5, E + 3, chosen) if kind == "elsewhere" else chosen


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def plain(x, chosen, weights, gate_up, down) -> np.ndarray:
    out = np.zeros(x.shape, np.float64)
    for t, e, w in zip(np.repeat(np.arange(len(x)), chosen.shape[1]), chosen.flat, weights.flat, strict=True):
        if 0 <= e < len(gate_up):
            gate, up = np.split(gate_up[e].astype(np.float64) @ x[t], 2)
            out[t] += w * (down[e].astype(np.float64) @ (silu(gate) * up))
    return out


def case(kind: str, T: int, X: int, E: int, D: int = 12, F: int = 10):
    rng = np.random.default_rng(T + X + E)
    x = rng.standard_normal((T, D), np.float32)
    chosen = choose(kind, rng, T, X, E).astype(np.int32)
    weights = rng.random((T, X), np.float32)
    gate_up = rng.standard_normal((E, 2 * F, D), np.float32)
    down = rng.standard_normal((E, D, F), np.float32)
    return x, chosen, weights, gate_up, down


@pytest.mark.parametrize(("T", "X", "E"), [(1, 2, 8), (reference.FEW, 3, 5), (200, 2, 16), (200, 1, 1), (129, 4, 4)])
def test_experts(T: int, X: int, E: int) -> None:
    run = jax.jit(lambda *a: api.experts(*a, activation="silu", of=E))
    for kind in CHOICES:
        arrays = case("even" if kind == "few" and X == E else kind, T, X, E)
        out = run(*arrays)
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, plain(*arrays), atol=1e-4, err_msg=kind)


def test_rounds_are_as_many_as_the_fullest_expert_needs() -> None:
    """Otherwise the test above would see no overflow: here one expert has 200 tokens and room for 32."""
    assert reference.places(200, 1, 16) == 32
    x, _, weights, gate_up, down = case("even", 200, 1, 16)
    chosen = np.full((200, 1), 9, np.int32)
    out = reference.experts(*map(jnp.asarray, (x, chosen, weights, gate_up, down)), activation="silu", of=16)
    np.testing.assert_allclose(out, plain(x, chosen, weights, gate_up, down), atol=1e-4)


@pytest.mark.parametrize("T", [8, 200])
def test_biases_and_clamped_gates(T: int) -> None:
    """gpt-oss's experts: large enough that gates and ups are clamped."""
    x, chosen, weights, gate_up, down = case("even", T, 2, 8)
    rng = np.random.default_rng(T)
    first, second = rng.standard_normal((8, 20), np.float32), rng.standard_normal((8, 12), np.float32)
    run = jax.jit(lambda *a, b: api.experts(*a, activation="swiglu_clamped", of=8, biases=b))
    found = run(x, chosen, weights, 3 * gate_up, down, b=(first, second))
    wanted = np.zeros(x.shape)
    for t, e, w in zip(np.repeat(np.arange(T), 2), chosen.flat, weights.flat, strict=True):
        gate, up = np.split(3 * gate_up[e].astype(np.float64) @ x[t] + first[e], 2)
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
        wanted[t] += w * (down[e].astype(np.float64) @ ((up + 1) * gate / (1 + np.exp(-1.702 * gate))) + second[e])
    np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize("T", [8, 200])
def test_a_token_of_no_number_spoils_no_other(T: int) -> None:
    x, chosen, weights, gate_up, down = case("even", T, 2, 8)
    wanted = plain(x, chosen, weights, gate_up, down)
    x[3] = np.nan
    out = np.asarray(reference.experts(*map(jnp.asarray, (x, chosen, weights, gate_up, down)), activation="silu", of=8))
    rest = np.arange(T) != 3
    np.testing.assert_allclose(out[rest], wanted[rest], atol=1e-4)


def test_bfloat16() -> None:
    x, chosen, weights, gate_up, down = case("even", 100, 2, 8)
    low = [jnp.asarray(a, jnp.bfloat16) for a in (x, gate_up, down)]
    out = api.experts(low[0], chosen, weights, low[1], low[2], activation="silu", of=8)
    x, gate_up, down = (np.asarray(a, np.float32) for a in low)
    wanted = plain(x, chosen, weights, gate_up, down)
    assert np.abs(np.asarray(out) - wanted).max() < 0.02 * np.abs(wanted).max()


def test_bins() -> None:
    wanted = np.array([[0, 2], [2, 5], [2, 0], [-1, 1], [2, 2]], np.int32)
    bins = Bins.sort(wanted, 3)
    assert bins.count_B.tolist() == [2, 1, 4]
    assert bins.tokens(0, 2).tolist() == [[0, 2], [3, 5], [0, 1]]
    assert bins.tokens(2, 2).tolist() == [[5, 5], [5, 5], [2, 4]]
    place, here = bins.places(wanted, 2, 2)
    assert here.tolist() == [[False] * 2, [False] * 2, [True, False], [False] * 2, [True, True]]
    assert place[2, 0] == 4 and place[4].tolist() == [5, 5]


@pytest.fixture
def hopper(monkeypatch):
    """Programs are made for an H200, with kernels of no code."""
    monkeypatch.setattr(rtc, "version", lambda: (13, 0))
    monkeypatch.setattr(rtc, "compile_ptx", lambda source, macros: f"// {source}")
    monkeypatch.setattr(call, "_refused", {})
    monkeypatch.delenv("JAXLLM_CUDA", raising=False)
    call.describe_target("9.0")
    yield
    call.describe_target(None)


RING, SKINNY, TILES = ["grouped_ring"] * 2, ["grouped_skinny"] * 2, ["grouped_tiles"] * 2


@pytest.mark.parametrize(
    ("T", "F", "kept", "kernels"),
    [
        (1, 128, jnp.bfloat16, RING),
        (16, 128, jnp.bfloat16, ["grouped_list", *RING]),
        (30, 128, jnp.bfloat16, ["grouped_list", *SKINNY]),
        (40, 96, jnp.bfloat16, ["grouped_list", *SKINNY]),
        (40, 128, jnp.bfloat16, ["grouped_list", *TILES]),
        (300, 128, jnp.bfloat16, ["grouped_list", *TILES]),
        (300, 96, jnp.bfloat16, []),  # no tile of 256 rows
        (2, 128, jnp.float32, []),
        (1, 128, Format("fp8"), RING),
        (2, 192, Format("fp8"), SKINNY),  # rows of a line and a half
        (2, 96, Format("fp8"), []),  # rows of 96 bytes
        (30, 192, Format("fp8", group=64), ["grouped_list", *SKINNY]),
        (30, 192, Format("fp8", group=32), []),  # a scale for fewer inputs than a load has
        (300, 128, Format("fp8"), ["grouped_list", *TILES]),
        (300, 128, Format("fp8", group=32), ["grouped_list", *TILES]),
        (300, 128, Format("fp8", group=48), []),
        (2, 128, Format("int8"), []),
    ],
)
def test_which_kernels_a_program_has(T: int, F: int, kept: Any, kernels: list[str], hopper) -> None:
    assert kernels_of(T, F, kept) == kernels


@pytest.mark.parametrize("of", [4, 12], ids=["all experts", "a third of them"])
def test_weighted_sums_take_nothing_from_rows_that_nobody_wrote(of: int) -> None:
    rng = np.random.default_rng(of)
    chosen, weights = np.stack([rng.permutation(of)[:3] for _ in range(20)]), rng.random((20, 3), np.float32)
    chosen[7, 1] = -1
    here = (chosen >= 0) & (chosen < 4)
    y = np.where(here[:, :, None], rng.standard_normal((20, 3, 8), np.float32), np.nan)
    found = cuda.weighted(jnp.asarray(y), jnp.asarray(chosen), jnp.asarray(weights), 4, of)
    wanted = (np.where(here[:, :, None], y, 0) * weights[:, :, None]).sum(axis=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("turned_off", ["grouped_skinny", "grouped_skinny_quantized"])
def test_kernels_for_e4m3_are_turned_off_apart(turned_off: str, hopper, monkeypatch) -> None:
    monkeypatch.setenv("JAXLLM_CUDA", f"-{turned_off}")
    assert kernels_of(30, 128, Format("fp8")) == []
    assert kernels_of(30, 128, jnp.bfloat16) == (["grouped_list", *SKINNY] if turned_off.endswith("quantized") else [])


@pytest.mark.parametrize("module", [cuda, ring_cuda, tiles_cuda])
def test_checks_are_of_what_a_kernel_can_do(module: ModuleType, hopper, monkeypatch) -> None:
    """One that cannot do what its check at start wants is refused as if it were wrong."""
    done = []

    def compare(kernel: str, implementation: Any, sizes: Any, format: Format | None = None, **_: float) -> None:
        for T, X, E, D, F in sizes:
            x, chosen = jax.ShapeDtypeStruct((T, D), jnp.bfloat16), jax.ShapeDtypeStruct((T, X), jnp.int32)
            both = (weight(format or jnp.bfloat16, *shape) for shape in ((E, 2 * F, D), (E, D, F)))
            implementation(x, chosen, *both, activation="silu", of=E + 2)
            done.append(kernel)

    monkeypatch.setattr(cuda, "compare", compare)
    module.check()
    module.check_quantized()
    assert set(done) == {module.KERNEL, module.QUANTIZED}


def weight(kept: Any, *shape: int) -> Any:
    """A weight that is kept in a dtype or format."""
    if not isinstance(kept, Format):
        return jax.ShapeDtypeStruct(shape, kept)
    scale = jax.ShapeDtypeStruct((*shape[:2], kept.groups(shape[2])), jnp.float32)
    return QuantizedWeight(jax.ShapeDtypeStruct(shape, kept.dtype), scale, None, kept)


def kernels_of(T: int, F: int, kept: Any) -> list[str]:
    """The kernels of experts whose weights are kept in a dtype or format."""
    D, E, X = 256, 8, 2
    dtype = jnp.bfloat16 if isinstance(kept, Format) else kept

    shapes = ((T, D), dtype), ((T, X), jnp.int32), ((T, X), jnp.float32)
    run = jax.jit(lambda *a: api.experts(*a, activation="silu", of=E))
    arguments = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
    traced = run.trace(*arguments, weight(kept, E, 2 * F, D), weight(kept, E, D, F))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r'name = "(grouped_\w+)"', text)


@pytest.mark.parametrize(("T", "E", "format"), [(1, 8, Format("fp8")), (200, 16, Format("fp8", group=8))], ids=str)
def test_weights_in_e4m3(T: int, E: int, format: Format) -> None:
    """Experts are their dequantised numbers, wherever the tokens go."""
    run = jax.jit(lambda *a: api.experts(*a, activation="silu", of=E))
    for kind in CHOICES:
        *arrays, gate_up, down = case(kind, T, 2, E)
        kept = [quantize(jnp.asarray(weight), format) for weight in (gate_up, down)]
        wanted = plain(*arrays, *(np.asarray(dequantize(weight, jnp.float32)) for weight in kept))
        np.testing.assert_allclose(run(*arrays, *kept), wanted, atol=1e-4, err_msg=kind)
