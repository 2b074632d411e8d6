"""Rotation and page writes: against the reference, and the time of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from kernel_rows._measure import Row, difference, rate, time_call

from jaxllm.kernels.linear.product import Product
from jaxllm.kernels.rope_write import cuda, reference

N, K, H, O, PAGES = 32, 8, 128, 32, 4096
CALLS = 16
FP8 = jnp.float8_e4m3fn


def run(tokens: int, norm: bool, dtype: Any, parts: int = 0, scaled: bool = False) -> dict[str, Any]:
    """Several calls over pools of their own, given away as the engine does.

    parts, scaled: of a projection that is not finished.
    """
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.standard_normal((tokens, (N + 2 * K) * H)), jnp.bfloat16)
    angle = rng.uniform(0, 6, (tokens, 1, H // 2)).astype(np.float32)
    where = rng.permutation((PAGES - 1) * O)[:tokens].astype(np.int32)
    place = jnp.asarray(where // O + 1), jnp.asarray(where % O)
    norms = [jnp.asarray(rng.uniform(0.5, 2, H), jnp.float32) if norm else None for _ in range(2)]
    rope = jnp.cos(angle), jnp.sin(angle)
    pool = jnp.zeros((PAGES, 2, K, O, H), dtype)
    sums = jnp.asarray(rng.standard_normal((parts, *qkv.shape)), jnp.float32) if parts else qkv
    scales = [jnp.asarray(rng.uniform(0.5, 1, n), jnp.float32) if scaled else None for n in ((tokens, 1), qkv.shape[1])]
    product = Product(sums, scales[0], scales[1], qkv.dtype)
    kernel = cuda.choose(product, *rope, pool, *place, *norms, eps=1e-5)
    plain = partial(reference.rope_write, eps=1e-5)
    found, wanted = (jax.jit(f)(product, *rope, pool, *place, *norms) for f in (kernel, plain))
    errors = [difference(a, b) for a, b in zip(found, wanted, strict=True)]

    def chain(call: Any, product: Product, pool: jax.Array) -> tuple[jax.Array, jax.Array]:
        for _ in range(CALLS):
            q, pool = lax.optimization_barrier(call(product, *rope, pool, *place, *norms))
            first = q[:1, 0, :1].reshape((1,) * product.sums.ndim).astype(product.sums.dtype)
            sums = lax.dynamic_update_slice(product.sums, first, (0,) * product.sums.ndim)
            product = replace(product, sums=sums)
        return product.sums.reshape(-1)[:8], pool

    read = (N + 2 * K) * (4 * parts or 2)
    moved = tokens * H * (read + 2 * N + 2 * K * jnp.dtype(dtype).itemsize)
    out: dict[str, Any] = {}
    for name, call in (("", kernel), ("reference_", plain)):
        program = jax.jit(partial(chain, call), donate_argnums=1)
        state = [program(product, jnp.zeros_like(pool))[1]]

        def again(program: Any = program, state: list = state) -> jax.Array:
            out, state[0] = program(product, state[0])
            return out

        seconds = time_call(again, calls=CALLS)
        out |= {name + key: value for key, value in rate(seconds, moved=moved).items()}
    coarse = jnp.dtype(dtype).itemsize == 1
    return out | {"difference": max(errors), "wrong": not max(errors) < (0.02 if coarse else 3e-3)}


def rows() -> Iterator[Row]:
    """Each time includes the writing of one number, which ties a call to the one before."""
    for tokens in (1, 64, 8192):
        yield Row(f"rope and write T={tokens}", partial(run, tokens, False, jnp.bfloat16))
    for tokens, parts in ((8, 4), (64, 4), (256, 2)):
        yield Row(f"rope and write T={tokens} of {parts} sums", partial(run, tokens, False, jnp.bfloat16, parts))
    for tokens in (64, 8192):
        yield Row(f"rope and write T={tokens} of a scaled product", partial(run, tokens, False, FP8, 0, True))
    yield Row("rope and write T=64 with norms", partial(run, 64, True, jnp.bfloat16))
    yield Row("rope and write T=64 fp8 pages", partial(run, 64, False, FP8))
