"""Small sums over two or more GPUs: right, many times in a row, and the time beside XLA's all-reduce."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kernel_rows._measure import Row, time_call

from jaxllm.kernels.all_reduce import api
from jaxllm.kernels.linear.reference import rms_norm
from jaxllm.mapping import Mapping
from jaxllm.parallel.mesh import make_mesh

D = 4096
CALLS = 64
TIMEOUT_MS = 2000
Sum = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def open_group() -> tuple[Mesh, api.Group]:
    """Over all GPUs."""
    mesh = make_mesh(Mapping(tp=len(jax.devices())))
    group = api.Group.open(mesh, ("tp",))
    if group is None:
        raise RuntimeError("no group: the warning says why")
    return mesh, group


def program(mesh: Mesh, group: api.Group, body: Callable[..., Any]) -> Callable[..., Any]:
    """body(group, x of this rank) -> like x, on every rank."""
    specs = (group.spec, PartitionSpec("tp"))
    mapped = jax.shard_map(
        lambda words, x: body(words, x[0])[None],
        mesh=mesh,
        in_specs=specs,
        out_specs=PartitionSpec("tp"),
        check_vma=False,
    )
    return jax.jit(mapped)


def parts(mesh: Mesh, tokens: int, dtype: Any) -> jax.Array:
    """Small integers, others on each rank: [ranks, T, D]."""
    ranks = mesh.shape["tp"]
    values = np.random.default_rng(tokens).integers(-8, 8, (ranks, tokens, D))
    return jax.device_put(jnp.asarray(values, dtype), NamedSharding(mesh, PartitionSpec("tp")))


def right(dtype: Any) -> dict[str, Any]:
    """200 sums in a row of a program, of several sizes, and 50 programs in a row: equal to the exact sums."""
    mesh, group = open_group()
    ranks, wrong = group.ranks, 0
    try:
        for tokens in (1, 3, 64):

            def chain(words: jax.Array, x: jax.Array) -> jax.Array:
                def step(_: jax.Array, y: jax.Array) -> jax.Array:
                    # The mean of the ranks' values of y - all the same - and x: an integer that stays small.
                    s = api.all_reduce(x + y, None, words, ranks, timeout_ms=TIMEOUT_MS)[0]
                    return s - ranks * y

                return lax.fori_loop(0, 200, step, jnp.zeros_like(x))

            def once(words: jax.Array, x: jax.Array) -> jax.Array:
                return api.all_reduce(x, x[::-1], words, ranks, timeout_ms=TIMEOUT_MS)[0]

            x = parts(mesh, tokens, dtype)
            total = np.asarray(x, np.float32).sum(0)
            run = program(mesh, group, chain)
            wrong += int((np.asarray(run(group.array, x), np.float32) != total).sum())
            run = program(mesh, group, once)
            outs = [run(group.array, x) for _ in range(50)]
            wanted = total + np.asarray(x, np.float32)[:, ::-1]
            wrong += sum(int((np.asarray(out, np.float32) != wanted).sum()) for out in outs)
            group.raise_if_failed()
    finally:
        group.close()
    return {"ranks": ranks, "wrong_elements": wrong, "wrong": wrong > 0}


def times(tokens: int, *, alone: bool = False, norm: bool = False) -> dict[str, Any]:
    """Microseconds of a sum of [T, D] bfloat16 with a residual; alone: in a program without collectives of XLA."""
    mesh, group = open_group()
    by = (jnp.full(D, 0.5, jnp.float32), 1e-5) if norm else None

    def chain(add_up: Sum, words: jax.Array, x: jax.Array) -> jax.Array:
        y = x
        for _ in range(CALLS):
            y = add_up(y, x, words)
        return y if alone else y + lax.psum(y[:1, :8].sum(), "tp").astype(y.dtype)

    def own(y: jax.Array, x: jax.Array, words: jax.Array) -> jax.Array:
        out, normed = api.all_reduce(y, x, words, group.ranks, by, timeout_ms=TIMEOUT_MS)
        return out if normed is None else normed

    def xla(y: jax.Array, x: jax.Array, words: jax.Array) -> jax.Array:
        out = x + lax.psum(y, "tp")
        return out if by is None else rms_norm(out, by)

    try:
        x = parts(mesh, tokens, jnp.bfloat16) * jnp.bfloat16(1e-20)
        out = {}
        for name, add_up in (("us", own), ("psum_us", xla)):
            if alone and add_up is xla:
                continue
            run = program(mesh, group, partial(chain, add_up))
            out[name] = 1e6 * time_call(run, group.array, x, calls=CALLS)
        group.raise_if_failed()
    finally:
        group.close()
    return out


def rows() -> Iterator[Row]:
    """None on one GPU."""
    if len(jax.devices()) < 2:
        return
    yield Row("all-reduce bf16 right", partial(right, jnp.bfloat16))
    yield Row("all-reduce f32 right", partial(right, jnp.float32))
    for tokens in (1, 16, 64, 256):
        yield Row(f"all-reduce T={tokens}", partial(times, tokens))
    for tokens in (1, 64):
        yield Row(f"all-reduce and norm T={tokens}", partial(times, tokens, norm=True))
    yield Row("all-reduce T=1 and no NCCL", partial(times, 1, alone=True))
