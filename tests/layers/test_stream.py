"""Sums that wait for the next norm, products that their consumers finish, and e4m3 between them: the same numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.formats import Format
from jaxllm.kernels.linear import api, reference
from jaxllm.kernels.linear.parts import partial_sums, parts_of
from jaxllm.kernels.linear.product import Product, QuantizedTokens
from jaxllm.kernels.linear.quantized import quantize
from jaxllm.kernels.rows import api as rows
from jaxllm.layers.linear import ColumnLinear, RowLinear
from jaxllm.layers.mlp import GatedMLP
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.stream import Unadded, like, settle
from jaxllm.parallel.params import ParamSpec, Segment

F32, BF16 = jnp.float32, jnp.bfloat16


def spec(*shape: int, dtype: Any = F32) -> ParamSpec:
    return ParamSpec(shape, np.dtype(dtype), (None,) * len(shape), (Segment(None, 0, shape[0]),))


def filled(module: nnx.Module, seed: int) -> Any:
    """The module with random numbers of mean square 1 / inputs."""
    state = nnx.state(module)
    rng = np.random.default_rng(seed)
    nnx.update(module, jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype) / 16, state))
    return module


@pytest.mark.parametrize("bias", [False, True])
def test_a_sum_that_waits_for_the_norm(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    linear = filled(RowLinear(spec(64, 4096), spec(64) if bias else None, axes=()), 0)
    norm = filled(RMSNorm(spec(64), 1e-5), 1)
    rng = np.random.default_rng(2)
    x, residual = (jnp.asarray(rng.standard_normal((5, n)), F32) for n in (4096, 64))
    at_once = linear(x, residual=residual)
    assert isinstance(at_once, jax.Array)
    monkeypatch.setattr(rows, "adds", lambda residual, quantised: True)
    waits = linear(x, residual=residual)
    assert isinstance(waits, Unadded) and waits.product.sums.ndim == (2 if bias else 3)
    assert (like(waits).shape, like(waits).dtype) == (at_once.shape, at_once.dtype)
    np.testing.assert_allclose(settle(waits)[0], at_once, atol=1e-5)
    total, normed, again = norm.settle(waits)
    assert again is None
    np.testing.assert_allclose(total, at_once, atol=1e-5)
    np.testing.assert_allclose(normed, norm(at_once), atol=1e-5)
    # Without a residual nothing waits.
    np.testing.assert_allclose(residual + linear(x), at_once, atol=1e-5)


def test_parts_are_as_many_as_keep_a_gpu_busy() -> None:
    assert [parts_of(64, F, D) for F, D in ((4096, 4096), (4096, 14336), (6144, 4096), (28672, 4096))] == [8, 8, 4, 1]
    assert [parts_of(T, 4096, 4096) for T in (1, 128, 256, 8192)] == [8, 4, 2, 1]
    assert parts_of(1, 64, 576) == 1 and parts_of(8, 576, 1536) == 2
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.standard_normal(s), BF16) for s in ((3, 1024), (40, 1024)))
    sums = partial_sums(x, weight, 4)
    assert (sums.shape, sums.dtype) == ((4, 3, 40), F32)
    found = Product(sums, None, None, np.dtype(BF16)).finish()
    np.testing.assert_allclose(found.astype(F32), reference.matmul(x, weight), rtol=2**-7, atol=0.1)


def test_activations_that_come_quantised() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((40, 256)), BF16)
    weight = quantize(jnp.asarray(rng.standard_normal((512, 256)), F32), Format("fp8"))
    assert api.multiplies_e4m3(x, weight) and api.multiplies_e4m3(x[:1], weight)
    for other, kept in ((x.astype(F32), weight), (x, quantize(jnp.ones((512, 256)), Format("int8")))):
        assert not api.multiplies_e4m3(other, kept)
    norm = jnp.linspace(0.5, 1.5, 256), 1e-5
    wanted = api.linear(x, weight, norm=norm)
    found = api.linear(rows.quantized_norm(x, norm), weight)
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(wanted, np.float32))
    gated = api.gated(x, weight, "silu", quantised=True)
    assert isinstance(gated, QuantizedTokens) and gated.shape == (40, 256) and gated.dtype == BF16
    wide = api.gated(x, weight, "silu")
    down = quantize(jnp.asarray(rng.standard_normal((64, 256)), F32), Format("fp8"))
    a, b = (np.asarray(api.linear(y, down), np.float32) for y in (gated, wide))
    np.testing.assert_array_equal(a, b)


def test_mlp_of_fp8_weights_hands_e4m3_on(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    weights = [quantize(jnp.asarray(rng.standard_normal(s) / 16, F32), Format("fp8")) for s in ((512, 256), (256, 256))]
    mlp = GatedMLP(ColumnLinear(spec(512, 256)), RowLinear(spec(256, 256), axes=()), "silu")
    norm = filled(RMSNorm(spec(256), 1e-5), 1)
    mlp.gate_up.weight, mlp.down.weight = ({...: weight} for weight in weights)  # indexed by an ellipsis, as parameters
    x = jnp.asarray(rng.standard_normal((40, 256)), BF16)
    wanted = reference.linear(x, weights[0], norm=(norm.weight[...], norm.eps), activation="silu", matmul=api.matmul)
    wanted = x + api.matmul(wanted, weights[1], BF16)
    seen = []
    plain = rows.quantized_gate
    monkeypatch.setattr(rows, "quantized_gate", lambda *a: seen.append(1) or plain(*a))
    found = mlp(x, norm, residual=x)
    assert seen
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(wanted, np.float32))
