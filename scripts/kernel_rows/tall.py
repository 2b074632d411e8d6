"""Gated products of thousands of tokens: against float32, and beside XLA's product and gate, as an engine has them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
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
F, D, _ = SHAPES["gate_up"]
RUNS = 3
SMALL = 4 * tall_cuda.COLUMNS
"""Rows of the weight: as many tiles as take a moment to compare with float32."""
Way = Callable[[jax.Array, jax.Array], jax.Array]


def xla(x: jax.Array, weight: jax.Array) -> jax.Array:
    """As the engine has it without the kernel."""
    return rows_api.gate(Product.of(reference.matmul(x, weight, BF16)), "silu")


def right() -> dict[str, Any]:
    """Distance from float32 with few rows of the weight, and of the whole product from XLA's."""
    gate_up = weights("gate_up")[0]
    small = gate_up[:SMALL]
    found: dict[str, Any] = {}
    run = jax.jit(tall_cuda.implementation(small, "silu"))
    for T in (300, 2000):
        x = values(1, T, D)
        with jax.default_matmul_precision("highest"):
            wanted = reference.linear(x.astype(F32), small.astype(F32), activation="silu")
        found[str(T)] = difference(run(x, small), wanted)
    x = values(2, 8000, D)
    whole = jax.jit(tall_cuda.implementation(gate_up, "silu"))(x, gate_up).astype(F32)
    wanted = jax.jit(xla, compiler_options=OPTIONS)(x, gate_up).astype(F32)
    found["whole"] = float(jnp.linalg.norm(whole - wanted) / jnp.linalg.norm(wanted))
    return found | {"wrong": not max(found.values()) < 0.01}


def chain(way: Way, x: jax.Array, made: list[jax.Array]) -> jax.Array:
    for weight in made:
        x = way(x, weight)[:, :D]
    return x


def kernels(T: int) -> dict[str, Any]:
    """Microseconds of each kernel, by a trace; `whole`: of one in a chain, with a copy of a part of its result.

    The chain is long enough for the chip to slow down to what its power allows; the trace is not.
    """
    made, x = weights("gate_up"), values(0, T, D)
    found: dict[str, Any] = {"floor": 2 * T * F * D / FLOPS * 1e6}
    for name, way in (("own", tall_cuda.implementation(made[0], "silu")), ("xla", xla)):
        run = jax.jit(partial(chain, way), compiler_options=OPTIONS)
        found[f"{name} whole"] = time_call(run, x, made, calls=len(made), seconds=0.06) * 1e6
        with tempfile.TemporaryDirectory() as folder:
            traced = record(folder, lambda run=run: jax.block_until_ready([run(x, made) for _ in range(RUNS)]))
        for kernel in traced:
            each = 1e3 * kernel.milliseconds / (RUNS * len(made))
            if each > 1:
                found[f"{name} {kernel.name[:24]}"] = each
    return found


def rows() -> Iterator[Row]:
    yield Row("right", right)
    for T in (8064, 8192, 2048):
        yield Row(f"T={T}", partial(kernels, T))
