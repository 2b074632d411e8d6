"""The kernel of norm, router and choice, run on the emulator, against the router of the layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.kernels.cuda import call
from jaxllm.kernels.linear.reference import rms_norm
from jaxllm.kernels.router import cuda
from jaxllm.kernels.router.cuda import Choice

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def emulated(emulated, monkeypatch):
    monkeypatch.setattr(call, "require", lambda kernel: None)
    return emulated


def run(T: int, E: int, D: int, choice: Choice, bias: bool = False, seed: int = 0):
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((T, D)).astype(BF16), rng.standard_normal((E, D)).astype(BF16)
    norm = (rng.uniform(0.5, 1.5, D) / D**0.5).astype(np.float32)
    bias_E = rng.uniform(0, 1, E).astype(np.float32) if bias else None
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, weight)]
    return (x, norm, weight, bias_E), cuda.implementation(*shapes, choice, bias=bias)(x, norm, weight, bias_E)


def check(arguments, found, choice: Choice) -> None:
    x, norm, weight, bias = arguments
    y, chosen, weights = found
    wanted = np.asarray(rms_norm(jnp.asarray(x), (jnp.asarray(norm), choice.eps)), np.float32)
    np.testing.assert_allclose(y.astype(np.float32), wanted, rtol=8e-3)
    assert (y.astype(np.float32) == wanted).mean() > 0.99
    logits = y.astype(np.float64) @ weight.astype(np.float64).T
    score = 1 / (1 + np.exp(-logits)) if choice.sigmoid else np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    ranked = score if bias is None else score + bias
    np.testing.assert_array_equal(chosen, np.argsort(-ranked, axis=1, kind="stable")[:, : choice.chosen])
    wanted = np.take_along_axis(score, chosen, 1)
    wanted = wanted / wanted.sum(1, keepdims=True) if choice.normalise else wanted
    np.testing.assert_allclose(weights, wanted * choice.scale, rtol=1e-4)


CASES = [
    (1, 128, 288, Choice(8, 1e-6), False),
    (11, 40, 512, Choice(4, 1e-5, normalise=False, sigmoid=True, scale=2.5), True),
    (3, 8, 96, Choice(2, 1e-5), False),
    pytest.param(9, 256, 64, Choice(8, 1e-6, normalise=False), False, marks=pytest.mark.slow),
    pytest.param(2, 64, 2080, Choice(6, 1e-6, sigmoid=True), True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("T", "E", "D", "choice", "bias"), CASES)
def test_equals_float64(T: int, E: int, D: int, choice: Choice, bias: bool, seed: int, emulated) -> None:
    emulated.seed = seed
    arguments, found = run(T, E, D, choice, bias, seed)
    check(arguments, found, choice)
    logits = (found[0].astype(np.float64) @ arguments[2].astype(np.float64).T).astype(np.float32)
    chosen, weights = cuda.choose_by_logits(logits, choice, bias=bias)(logits, arguments[3])
    np.testing.assert_array_equal(chosen, found[1])
    np.testing.assert_allclose(weights, found[2], rtol=1e-4)


def test_ties_and_what_is_not_a_number(emulated) -> None:
    T, E, D, choice = 3, 8, 96, Choice(2, 1e-5)
    x, weight = np.ones((T, D), BF16), np.zeros((E, D), BF16)
    x[1] = np.nan
    weight[[3, 6]] = 0.5
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, weight)]
    run = cuda.implementation(*shapes, choice, bias=False)
    _, chosen, weights = run(x, np.ones(D, np.float32), weight, None)
    np.testing.assert_array_equal(chosen[[0, 2]], [[3, 6]] * 2)
    np.testing.assert_allclose(weights[[0, 2]], 0.5)
    # Also then it chooses different experts, which exist.
    assert sorted(set(chosen[1])) == sorted(chosen[1]) and (chosen >= 0).all() and (chosen < E).all()
    assert np.isnan(weights[1]).all()


def test_what_the_kernel_cannot_do() -> None:
    def of(T=1, D=64, E=8, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((T, D), dtype), jax.ShapeDtypeStruct((E, D), dtype)

    for arguments, chosen in ((of(D=48), 2), (of(dtype=jnp.float32), 2), (of(), 9), (of(D=16384), 2)):
        with pytest.raises(NotImplementedError):
            cuda.implementation(*arguments, Choice(chosen, 1e-5), bias=False)
