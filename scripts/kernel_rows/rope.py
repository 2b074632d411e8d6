"""Rotation and page writes: against the reference, and the time of both."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernel_rows._measure import Row, difference, rate, time_call

from jaxllm.kernels.rope_write import cuda, reference

N, K, H, O, PAGES = 32, 8, 128, 32, 4096
CALLS = 16


def run(tokens: int, norm: bool, dtype: Any) -> dict[str, Any]:
    """Several calls over pools of their own, given away as the engine does."""
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.standard_normal((tokens, N + 2 * K, H)), jnp.bfloat16)
    angle = rng.uniform(0, 6, (tokens, 1, H // 2)).astype(np.float32)
    where = rng.permutation((PAGES - 1) * O)[:tokens].astype(np.int32)
    place = jnp.asarray(where // O + 1), jnp.asarray(where % O)
    norms = [jnp.asarray(rng.uniform(0.5, 2, H), jnp.float32) if norm else None for _ in range(2)]
    rope = jnp.cos(angle), jnp.sin(angle)
    pool = jnp.zeros((PAGES, 2, K, O, H), dtype)
    kernel = cuda.choose(qkv, *rope, pool, *place, *norms, eps=1e-5)
    plain = partial(reference.rope_write, eps=1e-5)
    found, wanted = (jax.jit(f)(qkv, *rope, pool, *place, *norms) for f in (kernel, plain))
    errors = [difference(a, b) for a, b in zip(found, wanted, strict=True)]

    def chain(call: Any, qkv: jax.Array, pool: jax.Array) -> tuple[jax.Array, jax.Array]:
        for _ in range(CALLS):
            q, pool = call(qkv, *rope, pool, *place, *norms)
            qkv = jnp.concatenate([q, qkv[:, N:]], axis=1)
        return qkv, pool

    moved = tokens * H * (2 * (2 * N + 2 * K) + 2 * K * jnp.dtype(dtype).itemsize)
    out: dict[str, Any] = {}
    for name, call in (("", kernel), ("reference_", plain)):
        program = jax.jit(partial(chain, call), donate_argnums=1)
        state = [program(qkv, jnp.zeros_like(pool))[1]]

        def again(program: Any = program, state: list = state) -> jax.Array:
            qkv_out, state[0] = program(qkv, state[0])
            return qkv_out

        seconds = time_call(again, calls=CALLS)
        out |= {name + key: value for key, value in rate(seconds, moved=moved).items()}
    coarse = jnp.dtype(dtype).itemsize == 1
    return out | {"difference": max(errors), "wrong": not max(errors) < (0.02 if coarse else 3e-3)}


def rows() -> Iterator[Row]:
    """Each time includes one concatenation, which ties a call to the one before."""
    for tokens in (1, 64, 8192):
        yield Row(f"rope and write T={tokens}", partial(run, tokens, False, jnp.bfloat16))
    yield Row("rope and write T=64 with norms", partial(run, 64, True, jnp.bfloat16))
    yield Row("rope and write T=64 fp8 pages", partial(run, 64, False, jnp.float8_e4m3fn))
