"""Rotation and page writes: against the reference, and the time of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, slots=True)
class Case:
    """norm: of queries and keys. dtype: of the pages. parts, scaled: of a projection that is not finished."""

    tokens: int
    norm: bool = False
    dtype: Any = jnp.bfloat16
    parts: int = 0
    scaled: bool = False

    def given(self) -> tuple[Product, tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array], list[jax.Array | None]]:
        """A projection, rotations, places and norms."""
        rng = np.random.default_rng(0)
        qkv = jnp.asarray(rng.standard_normal((self.tokens, (N + 2 * K) * H)), jnp.bfloat16)
        angle = rng.uniform(0, 6, (self.tokens, 1, H // 2)).astype(np.float32)
        where = rng.permutation((PAGES - 1) * O)[: self.tokens].astype(np.int32)
        place = jnp.asarray(where // O + 1), jnp.asarray(where % O)
        norms = [jnp.asarray(rng.uniform(0.5, 2, H), jnp.float32) if self.norm else None for _ in range(2)]
        sums = jnp.asarray(rng.standard_normal((self.parts, *qkv.shape)), jnp.float32) if self.parts else qkv
        sizes = (self.tokens, 1), qkv.shape[1]
        scales = [jnp.asarray(rng.uniform(0.5, 1, n), jnp.float32) if self.scaled else None for n in sizes]
        return Product(sums, *scales, qkv.dtype), (jnp.cos(angle), jnp.sin(angle)), place, norms

    def pool(self) -> jax.Array:
        return jnp.zeros((PAGES, 2, K, O, H), self.dtype)

    def ways(self) -> tuple[Any, Any]:
        """The kernel and the reference: of a projection, rotations, a pool, places and norms."""
        product, rope, place, norms = self.given()
        kernel = cuda.choose(product, *rope, self.pool(), *place, *norms, eps=1e-5)
        return kernel, partial(reference.rope_write, eps=1e-5)


CASES = {
    "T=1": Case(1),
    "T=64": Case(64),
    "T=8192": Case(8192),
    "T=8 of 4 sums": Case(8, parts=4),
    "T=64 of 4 sums": Case(64, parts=4),
    "T=256 of 2 sums": Case(256, parts=2),
    "T=64 of a scaled product": Case(64, dtype=FP8, scaled=True),
    "T=8192 of a scaled product": Case(8192, dtype=FP8, scaled=True),
    "T=64 with norms": Case(64, norm=True),
    "T=64 fp8 pages": Case(64, dtype=FP8),
}


def right() -> dict[str, Any]:
    """Each case against the reference."""
    found = {}
    for name, case in CASES.items():
        product, rope, place, norms = case.given()
        results = [jax.jit(way)(product, *rope, case.pool(), *place, *norms) for way in case.ways()]
        found[name] = max(difference(a, b) for a, b in zip(*results, strict=True))
    wrong = [name for name, error in found.items() if not error < (0.02 if CASES[name].dtype == FP8 else 3e-3)]
    return {"cases": len(found), "difference": max(found.values()), "wrong": "; ".join(wrong)}


def times(case: Case) -> dict[str, Any]:
    """Several calls over pools of their own, given away as the engine does."""
    product, rope, place, norms = case.given()

    def chain(call: Any, product: Product, pool: jax.Array) -> tuple[jax.Array, jax.Array]:
        for _ in range(CALLS):
            q, pool = lax.optimization_barrier(call(product, *rope, pool, *place, *norms))
            first = q[:1, 0, :1].reshape((1,) * product.sums.ndim).astype(product.sums.dtype)
            sums = lax.dynamic_update_slice(product.sums, first, (0,) * product.sums.ndim)
            product = replace(product, sums=sums)
        return product.sums.reshape(-1)[:8], pool

    read = (N + 2 * K) * (4 * case.parts or 2)
    moved = case.tokens * H * (read + 2 * N + 2 * K * jnp.dtype(case.dtype).itemsize)
    out: dict[str, Any] = {}
    for name, call in zip(("", "reference_"), case.ways(), strict=True):
        program = jax.jit(partial(chain, call), donate_argnums=1)
        state = [program(product, case.pool())[1]]

        def again(program: Any = program, state: list = state) -> jax.Array:
            out, state[0] = program(product, state[0])
            return out

        seconds = time_call(again, calls=CALLS)
        out |= {name + key: value for key, value in rate(seconds, moved=moved).items()}
    return out


def rows() -> Iterator[Row]:
    """Each time includes the writing of one number, which ties a call to the one before."""
    yield Row("right", right)
    for name, case in CASES.items():
        yield Row(f"rope and write {name}", partial(times, case))
