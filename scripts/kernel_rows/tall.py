"""Products of thousands of tokens: against float32, and beside what XLA makes of the same work in an engine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from kernel_rows._measure import FLOPS, Row, difference, time_call
from kernel_rows.linear import BF16, F32, SHAPES, values, weights

from jaxllm.bench.profile import record
from jaxllm.kernels.linear import reference, tall_cuda
from jaxllm.kernels.linear.product import Product
from jaxllm.kernels.rows import api as rows_api

OPTIONS = {"xla_gpu_enable_triton_gemm": False}
"""As in the engine's steps of so many tokens."""
RUNS = 3
WAYS: dict[str, dict[str, Any]] = {
    "used": {},
    "lag 2": {"lag": 2},
    "four": {"cluster": 4, "across": 4},
    "four, lag 2": {"cluster": 4, "across": 4, "lag": 2},
    "across 16": {"across": 16},
}
SMALL = 4 * tall_cuda.COLUMNS
"""Rows of the weight: as many tiles as take a moment to compare with float32."""
Way = Callable[[jax.Array, jax.Array, "jax.Array | None"], jax.Array]


def xla(activation: str | None, x: jax.Array, weight: jax.Array, residual: jax.Array | None) -> jax.Array:
    """As the engine has it without the kernel."""
    product = Product.of(reference.matmul(x, weight, BF16))
    y = product.finish() if activation is None else rows_api.gate(product, activation)
    return y if residual is None else residual + y


def options_of(name: str) -> dict[str, Any]:
    around = SHAPES[name][2]
    return {"activation": around.get("activation"), "residual": bool(around.get("residual"))}


def right() -> dict[str, Any]:
    """Distance from float32 with few rows of the weight, and of a whole product from XLA's."""
    found: dict[str, Any] = {}
    for name in ("gate_up", "o"):
        D, how = SHAPES[name][1], options_of(name)
        weight = weights(name)[0][:SMALL]
        with ThreadPoolExecutor() as pool:  # they compile side by side
            make = partial(tall_cuda.implementation, weight, **how)
            runs = list(pool.map(lambda way, make=make: make(**way), WAYS.values()))
        for T in (300, 2000):
            x, residual = values(1, T, D), values(2, T, SMALL) if how["residual"] else None
            with jax.default_matmul_precision("highest"):
                exact = (x.astype(F32), weight.astype(F32))
                wanted = reference.linear(*exact, activation=how["activation"], residual=residual)
            for label, run in zip(WAYS, runs, strict=True):
                found[f"{name} {T} {label}"] = difference(jax.jit(run)(x, weight, residual), wanted)
    x, weight = values(2, 8000, SHAPES["gate_up"][1]), weights("gate_up")[0]
    whole = jax.jit(tall_cuda.implementation(weight, "silu"))(x, weight, None).astype(F32)
    wanted = jax.jit(partial(xla, "silu"), compiler_options=OPTIONS)(x, weight, None).astype(F32)
    found["whole"] = float(jnp.linalg.norm(whole - wanted) / jnp.linalg.norm(wanted))
    return found | {"wrong": not max(found.values()) < 0.01}


def chain(way: Way, residual: bool, x: jax.Array, made: list[jax.Array]) -> jax.Array:
    T, D = x.shape
    for weight in made:
        y = way(x, weight, values(3, T, weight.shape[0]) if residual else None)
        x = y[:, :D] if y.shape[1] >= D else jnp.tile(y, (1, -(-D // y.shape[1])))[:, :D]
    return x


def kernels(name: str, T: int) -> dict[str, Any]:
    """Microseconds of each kernel, by a trace; `whole`: of one in a chain, with what makes of its result new tokens.

    The chain is long enough for the chip to slow down to what its power allows; the trace is not.
    """
    F, D, _ = SHAPES[name]
    how = options_of(name)
    made, x = weights(name), values(0, T, D)
    found: dict[str, Any] = {"floor": 2 * T * F * D / FLOPS * 1e6}
    with ThreadPoolExecutor() as pool:
        make = partial(tall_cuda.implementation, made[0], **how)
        own = list(pool.map(lambda way: make(**way), WAYS.values()))
    for label, way in zip((*WAYS, "xla"), (*own, partial(xla, how["activation"])), strict=True):
        run = jax.jit(partial(chain, way, how["residual"]), compiler_options=OPTIONS)
        found[f"{label} whole"] = time_call(run, x, made, calls=len(made), seconds=0.06) * 1e6
        with tempfile.TemporaryDirectory() as folder:
            traced = record(folder, lambda run=run: jax.block_until_ready([run(x, made) for _ in range(RUNS)]))
        for kernel in traced:
            each = 1e3 * kernel.milliseconds / (RUNS * len(made))
            if each > 1:
                found[f"{label} {kernel.name[:24]}"] = each
    return found


def rows() -> Iterator[Row]:
    yield Row("right", right)
    for name in ("gate_up", "qkv", "o", "down"):
        for T in (8064, 8192, 2048):
            yield Row(f"{name} T={T}", partial(kernels, name, T))
