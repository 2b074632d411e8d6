"""Sums that wait for the next norm, products that their consumers finish, and e4m3 between them: the same numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxllm.formats import Format
from jaxllm.kernels.linear import api, reference
from jaxllm.kernels.linear.parts import dtype_of, partial_sums, parts_of
from jaxllm.kernels.linear.product import Product, QuantizedTokens
from jaxllm.kernels.linear.quantized import quantize
from jaxllm.kernels.rows import api as rows
from jaxllm.layers.linear import ColumnLinear, RowLinear
from jaxllm.layers.mlp import GatedMLP
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.stream import Unadded, like, settle
from jaxllm.mapping import Mapping
from jaxllm.parallel.collectives import Exchange, exchanging, gather_rows, sum_later, sum_partial
from jaxllm.parallel.mesh import make_mesh
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
    sums = partial_sums(x, weight, 4, F32)
    assert (sums.shape, sums.dtype) == ((4, 3, 40), F32)
    found = Product(sums, None, None, np.dtype(BF16)).finish()
    np.testing.assert_allclose(found.astype(F32), reference.matmul(x, weight), rtol=2**-7, atol=0.1)
    rounded = Product(partial_sums(x, weight, 4, BF16), None, None, np.dtype(BF16))
    assert rounded.sums.dtype == BF16
    np.testing.assert_allclose(rounded.finish().astype(F32), reference.matmul(x, weight), rtol=2**-6, atol=0.3)


@pytest.mark.parametrize("parts", [2, 4])
def test_rounded_sums_of_parts_are_as_near_as_a_rounded_product(parts: int) -> None:
    """Of a product and a residual that are added in float32; both are compared with float64."""
    rng = np.random.default_rng(parts)
    x, weight, residual = (jnp.asarray(rng.standard_normal(s), BF16) for s in ((160, 1024), (96, 1024), (160, 96)))
    wide_x, wide_weight, wide_residual = (np.asarray(a, np.float64) for a in (x, weight, residual))
    exact = wide_x @ wide_weight.T + wide_residual

    def error(dtype: Any) -> float:
        sums = partial_sums(x, weight, parts, dtype)
        # As the kernel for residual and norm does: sums in float32 are rounded once they are one.
        total = sums.astype(F32).sum(axis=0)
        total = total.astype(BF16).astype(F32) if dtype == F32 else total
        found = (total + residual.astype(F32)).astype(BF16)
        return float(np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact))

    assert dtype_of(x) == BF16 and dtype_of(x[:127]) == F32
    assert error(BF16) < 1.1 * error(F32) < 0.004


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


@pytest.mark.parametrize("eight", [False, True])
def test_sums_over_ranks_take_products_unfinished(eight: bool) -> None:
    """Where the exchange is for that, it gets products with scales and gives e4m3."""
    mesh, got = make_mesh(Mapping(tp=2)), []
    rng = np.random.default_rng(5)
    x, residual = (jnp.asarray(rng.standard_normal((33, n)), BF16) for n in (128, 64))
    weight = quantize(jnp.asarray(rng.standard_normal((64, 128)) / 8, BF16), Format("fp8"))
    norm_weight = jnp.asarray(rng.uniform(0.5, 2, 64), F32)

    def add_up(part, residual, group, ranks, norm=None, quantised=False):  # type: ignore[no-untyped-def]
        got.append((isinstance(part, Product), quantised))
        whole = part.finish() if isinstance(part, Product) else part
        total = (residual + jax.lax.psum(whole.astype(F32), "tp")).astype(BF16)
        normed = reference.rms_norm(total, norm)
        return total, rows.quantize(normed) if quantised else normed

    def step(x_TD: jax.Array, residual_TD: jax.Array, norm_D: jax.Array, group: jax.Array) -> Any:
        made = api.product(x_TD, weight)
        assert made.token_scale is not None
        with exchanging(Exchange(group, ("tp",), add_up, quantises=eight)):
            stream = sum_later(made, ("tp",), (), residual_TD)
            total, normed = settle(stream, (norm_D, 1e-5), quantised=True)
        if isinstance(normed, QuantizedTokens):
            normed = (normed.values.astype(F32) * normed.scale).astype(BF16)
        return total, normed

    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P(), P(), P(mesh.axis_names)), out_specs=(P(), P()), check_vma=False
    )
    total, normed = mapped(x, residual, norm_weight, jnp.zeros((2, 8), jnp.uint32))
    assert got == [(eight, eight)]
    wanted = residual.astype(F32) + 2 * api.product(x, weight).finish().astype(F32)
    np.testing.assert_allclose(np.asarray(total, np.float32), wanted, atol=0.03, rtol=0.01)
    right = np.asarray(reference.rms_norm(total.astype(F32), (norm_weight, 1e-5)))
    np.testing.assert_allclose(np.asarray(normed, np.float32), right, rtol=0.08, atol=0.02)


@pytest.mark.parametrize("order", [("ep", "tp"), ("tp", "ep")])
def test_rows_go_by_the_exchange_of_their_axes(order: tuple[str, str]) -> None:
    """Rows are scattered and gathered in the order of the ranks: another one than the group's is XLA's."""
    mesh, used = make_mesh(Mapping(tp=2, ep=2)), []

    def scatter(x, residual, group, ranks):  # type: ignore[no-untyped-def]
        used.append("scatter")
        out = jax.lax.psum_scatter(x, ("ep", "tp"), tiled=True)
        return out if residual is None else residual + out

    def gather(x, group, ranks):  # type: ignore[no-untyped-def]
        used.append("gather")
        return jax.lax.all_gather(x, ("ep", "tp"), tiled=True)

    def step(x_TD: jax.Array, residual_TD: jax.Array, group: jax.Array) -> jax.Array:
        with exchanging(Exchange(group, ("ep", "tp"), lambda *_: None, scatter, gather)):  # type: ignore[arg-type, return-value]
            own = sum_partial(x_TD[0], order, order, residual_TD)
            return gather_rows(own, order)

    x = jnp.arange(4 * 8 * 3.0).reshape(4, 8, 3)
    residual = jnp.arange(24.0).reshape(8, 3)
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(("ep", "tp")), P(order), P(mesh.axis_names)),
        out_specs=P(),
        check_vma=False,
    )
    found = mapped(x, residual, jnp.zeros((4, 12), jnp.uint32))
    np.testing.assert_array_equal(found, residual + x.sum(axis=0))
    assert used == (["scatter", "gather"] if order == ("ep", "tp") else [])
