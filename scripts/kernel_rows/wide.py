"""Gated products of 64 to 256 tokens with activations in blocks: against float32, and beside what XLA and the kernels
between products make of the same work in an engine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from kernel_rows._measure import BANDWIDTH, FLOPS, Row, difference, time_call
from kernel_rows.linear import BF16, EPS, F32, LAYERS, SHAPES, values, weights

from jaxllm.bench.profile import record
from jaxllm.kernels.linear import reference, wide_cuda
from jaxllm.kernels.linear.parts import dtype_of, partial_sums, parts_of
from jaxllm.kernels.linear.product import BlockedTokens, Product
from jaxllm.kernels.rows import cuda as rows_cuda

OPTIONS = {"xla_gpu_enable_triton_gemm": False}
"""As in the engine's steps of so many tokens."""
F, D, _ = SHAPES["gate_up"]


SMALL = 4 * wide_cuda.COLUMNS
"""Rows of the weight: as many tiles as take a moment to compare with float32."""
TOKENS = (256, 200, 192, 128, 100, 64)


def right() -> dict[str, Any]:
    """Distance from float32 of a product of few rows, and of the norm that makes its activations from that which does
    not; and of the whole product from XLA's.
    """
    product, residual, norm_D = values(1, 256, D), values(2, 256, D), 1 + values(4, D, dtype=F32) / 4
    weight = weights("gate_up")[0][:SMALL]
    with ThreadPoolExecutor() as pool:
        kernels = list(pool.map(lambda T: wide_cuda.implementation(T, weight, "silu"), TOKENS))

    def errors(product: jax.Array, residual: jax.Array, norm_D: jax.Array, weight: jax.Array) -> list[Any]:
        wanted = normed(product, residual, norm_D, 0)
        assert isinstance(wanted, jax.Array)
        out = reference.linear(
            wanted.astype(F32),
            weight.astype(F32),
            activation="silu",
            matmul=lambda x, weight, dtype: jnp.matmul(x, weight.T, precision="highest"),
        )
        distances = []
        for T, kernel in zip(TOKENS, kernels, strict=True):
            x = normed(product[:T], residual[:T], norm_D, wide_cuda.rows_for(T))
            assert isinstance(x, BlockedTokens)
            found = kernel(x, weight).astype(F32)
            error = jnp.linalg.norm(found - out[:T]) / jnp.linalg.norm(out[:T])
            distances.append((error, jnp.sum(x.plain() != wanted[:T])))
        return distances

    found: dict[str, Any] = {}
    wrong = False
    made = jax.jit(errors, compiler_options=OPTIONS)(product, residual, norm_D, weight)
    for T, (error, different) in zip(TOKENS, made, strict=True):
        found[str(T)] = float(error)
        wrong = wrong or not float(error) < 0.01 or int(different) > 0
        if int(different):
            found[f"{T} numbers that differ after the norm"] = int(different)
    one, other = (
        jax.jit(half, compiler_options=OPTIONS)(Product.of(product), residual, norm_D, weights("gate_up")[0])[1]
        for half in (own, engine)
    )
    found["256 whole"] = difference(one, other)
    return found | {"wrong": wrong or not found["256 whole"] < 0.01}


def normed(product: jax.Array, residual: jax.Array, norm_D: jax.Array, blocked: int) -> Any:
    made = Product.of(product)
    run = rows_cuda.norm_kernel(made, eps=EPS, residual=True, quantised=False, blocked=blocked)
    return run(made, residual, norm_D)[1]


Linear = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""(product, residual, norm, weight) -> the sum of the first two, and act(gate) * up of its norm's product."""


def own(product: Product, residual: jax.Array, norm_D: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    T = residual.shape[0]
    run = rows_cuda.norm_kernel(product, eps=EPS, residual=True, quantised=False, blocked=wide_cuda.rows_for(T))
    x, y = run(product, residual, norm_D)
    assert x is not None and isinstance(y, BlockedTokens)
    return x, wide_cuda.implementation(T, weight, "silu")(y, weight)


def engine(product: Product, residual: jax.Array, norm_D: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As the engine has it without the kernel."""
    run = rows_cuda.norm_kernel(product, eps=EPS, residual=True, quantised=False)
    x, y = run(product, residual, norm_D)
    assert x is not None and isinstance(y, jax.Array)
    out = Product.of(reference.matmul(y, weight, BF16))
    gated = rows_cuda.gate_kernel(out, "silu", quantised=False)(out)
    assert isinstance(gated, jax.Array)
    return x, gated


RUNS = 5


def chain(half: Any, x: jax.Array, made: list[jax.Array]) -> jax.Array:
    y, norm_D = x, jnp.ones(D, F32)
    for weight in made:
        x, y = half(Product.of(y[:, :D]), x, norm_D, weight)
    return y


def kernels(T: int) -> dict[str, Any]:
    """Microseconds of each kernel of norm, product and gate, by a trace; `sum` of all of them."""
    made, x = weights("gate_up"), values(0, T, D)
    found: dict[str, Any] = {"floor": max(2 * T * F * D / FLOPS, made[0].nbytes / BANDWIDTH) * 1e6}
    for name, half in (("", own), ("xla ", engine)):
        run = jax.jit(partial(chain, half), compiler_options=OPTIONS)
        jax.block_until_ready(run(x, made))
        with tempfile.TemporaryDirectory() as folder:
            traced = record(folder, lambda run=run: jax.block_until_ready([run(x, made) for _ in range(RUNS)]))
        total = 0.0
        for kernel in traced:
            each = 1e3 * kernel.milliseconds / (RUNS * len(made))
            total += each
            if each > 0.3:
                found[name + kernel.name[:24]] = each
        found[name + "sum"] = total
    return found


def layer(T: int) -> dict[str, Any]:
    """Microseconds of a layer's products and what is between, with the first 4,096 of qkv in place of attention."""
    names = ("qkv", "o", "gate_up", "down")
    given = [[weights(name)[i] for name in names] for i in range(LAYERS)]
    norm_D = jnp.ones(D, F32)

    def added(x: jax.Array, weight: jax.Array) -> Product:
        parts = parts_of(T, *weight.shape)
        return Product(partial_sums(x, weight, parts, dtype_of(x)), None, None, x.dtype)

    def program(half: Any, x: jax.Array, given: list[list[jax.Array]]) -> jax.Array:
        product = Product.of(x)
        for qkv, o, gate_up, down in given:
            run = rows_cuda.norm_kernel(product, eps=EPS, residual=True, quantised=False)
            total, normed = run(product, x, norm_D)
            assert total is not None and isinstance(normed, jax.Array)
            y = lax.optimization_barrier(reference.matmul(normed, qkv, BF16))[:, :D]
            x, y = half(added(y, o), total, norm_D, gate_up)
            product = added(y, down)
        return product.sums

    found: dict[str, Any] = {}
    runs = {
        name: jax.jit(partial(program, half), compiler_options=OPTIONS) for name, half in (("", own), ("xla_", engine))
    }
    for again in ("us", "again_us"):
        for name, run in runs.items():
            found[name + again] = time_call(run, values(0, T, D), given, calls=LAYERS, seconds=0.03) * 1e6
    return found


def rows() -> Iterator[Row]:
    yield Row("right", right)
    for T in (256, 128, 64):
        yield Row(f"kernels T={T}", partial(kernels, T))
    for T in (256, 128):
        yield Row(f"layer T={T}", partial(layer, T))
