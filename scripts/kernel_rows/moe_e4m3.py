"""Mixtures of experts with weights in e4m3: as the rows of `moe`, beside half of the bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from kernel_rows._measure import Row, difference
from kernel_rows.moe import BF16, choices, speed, weights

from jaxllm.formats import Format
from jaxllm.kernels.grouped_matmul import cuda, ring_cuda, tiles_cuda
from jaxllm.kernels.grouped_matmul.cuda import Tiling
from jaxllm.kernels.grouped_matmul.ring_cuda import Tiling as Ring
from jaxllm.kernels.linear.quantized import dequantize, quantize, quantize_tokens, round_e4m3

SWEEPS: dict[int, dict[str, tuple[Any, tuple[Any, Any]]]] = {
    # tokens (Qwen3-30B-A3B) -> a kernel, and splits of its two products
    1: {
        "few rows": (cuda.implementation, (Tiling(2, 2, 1, 8, 2, 3), Tiling(2, 2, 1, 6, 1, 4))),
        "ring of more rows": (ring_cuda.implementation, (Ring(2, 1, 4, 4, 2), Ring(2, 1, 3, 5, 2))),
    },
    16: {"ring of fewer rows": (ring_cuda.implementation, (Ring(1, 1, 8, 3, 2), Ring(1, 1, 6, 4, 2)))},
    64: {
        "more rows": (cuda.implementation, (Tiling(2, 4, 2, 8, 1, 2), Tiling(2, 4, 2, 6, 1, 3))),
        "ring of fewer rows": (ring_cuda.implementation, (Ring(1, 1, 8, 3, 2), Ring(1, 1, 6, 4, 2))),
        "ring of more warps": (ring_cuda.implementation, (Ring(2, 1, 8, 2, 2), Ring(2, 1, 6, 2, 2))),
    },
}
ROWS, BLOCKS = Format("fp8"), Format("fp8", group=128)
"""e4m3 with a scale of each row, and as checkpoints with blocks of 128 x 128 have it."""


RIGHT: dict[str, tuple[Any, tuple[tuple[int, int, int, int, int], ...], float]] = {
    # a kernel, T, X, E, D, F of weights with scales of rows, then of blocks, and the largest difference
    "ring": (ring_cuda, ((1, 8, 16, 2048, 768), (14, 8, 32, 512, 384)), 6e-3),
    "decode": (cuda, ((64, 8, 16, 512, 384), (1, 8, 16, 2048, 768)), 6e-3),
    "tiles": (tiles_cuda, ((600, 2, 4, 512, 256), (600, 2, 4, 512, 256)), 2e-2),
}


def right(kind: str) -> dict[str, Any]:
    """Against float32, some choices being somebody else's; tiles against activations that are rounded as they do."""
    module, sizes, limit = RIGHT[kind]
    found: dict[str, float] = {}
    for (T, X, E, D, F), (name, format) in zip(sizes, (("rows", ROWS), ("blocks", BLOCKS)), strict=True):
        rng = np.random.default_rng(T)
        shapes = (T, D), (E, 2 * F, D), (E, D, F)
        x, *wide = (jnp.asarray(rng.standard_normal(s, np.float32) / s[-1] ** 0.5, BF16) for s in shapes)
        gate_up, down = (quantize(weight, format) for weight in wide)
        weight = jnp.asarray(rng.random((T, X)), jnp.float32)
        chosen = np.where(rng.random((T, X)) < 0.2, E + 1, choices(E, X, T, 1)[0]).astype(np.int32)
        kernel = jax.jit(module.implementation(x, chosen, gate_up, down, activation="silu", of=E))
        out = kernel(x, chosen, weight, gate_up, down)
        numbers = (dequantize(w, jnp.float32) for w in (gate_up, down))
        found[name] = difference(out, one_by_one(x, chosen, weight, *numbers, rounded=module is tiles_cuda))
    return {**found, "wrong": not all(error < limit for error in found.values())}


@partial(jax.jit, static_argnames="rounded")
@jax.default_matmul_precision("highest")
def one_by_one(
    x: jax.Array, chosen: jax.Array, weight: jax.Array, gate_up: jax.Array, down: jax.Array, *, rounded: bool
) -> jax.Array:
    """All experts of all tokens, one after the other, in float32."""

    def as_taken(x: jax.Array) -> jax.Array:
        if not rounded:
            return x.astype(jnp.float32)
        _, scale = quantize_tokens(x)
        # Not by conversions there and back, which XLA leaves out.
        return round_e4m3(x.astype(jnp.float32) / scale) * scale

    def add(out: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        number, gate_up, down = expert
        gate, up = jnp.split(x @ gate_up.T, 2, axis=1)
        y = as_taken((jax.nn.silu(gate) * up).astype(BF16)) @ down.T
        return out + jnp.where(chosen == number, weight, 0).sum(axis=1, keepdims=True) * y, None

    x = as_taken(x)
    return lax.scan(add, jnp.zeros(x.shape, jnp.float32), (jnp.arange(len(gate_up)), gate_up, down))[0]


def rows() -> Iterator[Row]:
    for kind in RIGHT:
        yield Row(f"right {kind}", partial(right, kind))
    shape, tiles = "qwen3-30b-a3b", tiles_cuda.implementation
    for T in (1, 16, 64):
        for kind, module in (("ring", ring_cuda), ("decode", cuda)):
            for name, format in (("", ROWS), (" blocks", BLOCKS)):
                run = partial(speed, shape, T, implementation=module.implementation, format=format)
                yield Row(f"{kind} {shape} T={T}{name}", run)
    for T in (256, 8192):
        for name, format in (("", ROWS), (" blocks", BLOCKS)):
            row = f"{'prefill' if T > 1000 else 'tiles'} {shape} T={T}{name}"
            yield Row(row, partial(speed, shape, T, implementation=tiles, format=format))
    for T, splits in SWEEPS.items():
        for name, (kernel, split) in splits.items():
            yield Row(f"sweep T={T} {name}", partial(speed, shape, T, split, kernel, format=ROWS))
    weights.cache_clear()
