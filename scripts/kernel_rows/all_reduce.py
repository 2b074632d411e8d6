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

from jaxllm.kernels.all_reduce import api, cuda
from jaxllm.kernels.linear.reference import rms_norm
from jaxllm.mapping import Mapping
from jaxllm.parallel.mesh import make_mesh

CALLS = 64
WAYS = (1, 2)
"""Shots of a sum."""
TIMEOUT_MS = 2000
Sum = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def open_group(numbered: bool = True) -> tuple[Mesh, api.Group]:
    """Over all GPUs."""
    mesh = make_mesh(Mapping(tp=len(jax.devices())))
    group = api.Group.open(mesh, ("tp",), numbered=numbered)
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


def parts(mesh: Mesh, tokens: int, width: int, dtype: Any) -> jax.Array:
    """Small integers, others on each rank: [ranks, T, D]."""
    ranks = mesh.shape["tp"]
    values = np.random.default_rng(tokens).integers(-8, 8, (ranks, tokens, width))
    return jax.device_put(jnp.asarray(values, dtype), NamedSharding(mesh, PartitionSpec("tp")))


def right(dtype: Any, shots: int, numbered: bool = True) -> dict[str, Any]:
    """200 sums in a row of a program, of several sizes, and 50 programs in a row: the exact sums; and norms."""
    mesh, group = open_group(numbered)
    ranks, wrong = group.ranks, 0
    add_up = partial(api.all_reduce, ranks=ranks, shots=shots, numbered=numbered, timeout_ms=TIMEOUT_MS)
    try:
        for tokens in (1, 3, 32):

            def chain(words: jax.Array, x: jax.Array) -> jax.Array:
                def step(_: jax.Array, y: jax.Array) -> jax.Array:
                    # The mean of the ranks' values of y - all the same - and x: an integer that stays small.
                    return add_up(x + y, None, words)[0] - ranks * y

                return lax.fori_loop(0, 200, step, jnp.zeros_like(x))

            def once(words: jax.Array, x: jax.Array) -> jax.Array:
                return add_up(x, x[::-1], words)[0]

            def norms(words: jax.Array, x: jax.Array) -> jax.Array:
                """By how much they are wrong, beside the sum."""
                norm = (jnp.linspace(0.5, 2, x.shape[1]), 1e-5)
                found, normed = add_up(x, x[::-1], words, norm=norm)
                assert normed is not None
                error = normed.astype(jnp.float32) - rms_norm(found.astype(jnp.float32), norm)
                return jnp.where(jnp.abs(error) < 0.03, 0, 1).astype(x.dtype)

            x = parts(mesh, tokens, 4096, dtype)
            total = np.asarray(x, np.float32).sum(0)
            run = program(mesh, group, chain)
            wrong += int((np.asarray(run(group.array, x), np.float32) != total).sum())
            run = program(mesh, group, once)
            outs = [run(group.array, x) for _ in range(50)]
            wanted = total + np.asarray(x, np.float32)[:, ::-1]
            wrong += sum(int((np.asarray(out, np.float32) != wanted).sum()) for out in outs)
            if dtype == jnp.bfloat16:
                wrong += int(np.asarray(program(mesh, group, norms)(group.array, x), np.float32).sum())
            group.raise_if_failed()
    finally:
        group.close()
    return {"ranks": ranks, "wrong_elements": wrong, "wrong": wrong > 0}


def times(tokens: int, width: int, *, alone: bool = False, norm: bool = False, numbered: bool = True) -> dict[str, Any]:
    """Microseconds of a sum of [T, D] bfloat16 with a residual; alone: in a program without collectives of XLA."""
    mesh, group = open_group(numbered)
    by = (jnp.full(width, 0.5, jnp.float32), 1e-5) if norm else None

    def chain(add_up: Sum, words: jax.Array, x: jax.Array) -> jax.Array:
        y = x
        for _ in range(CALLS):
            y = add_up(y, x, words)
        return y if alone else y + lax.psum(y[:1, :8].sum(), "tp").astype(y.dtype)

    def own(shots: int, y: jax.Array, x: jax.Array, words: jax.Array) -> jax.Array:
        options: dict[str, Any] = {"shots": shots, "numbered": numbered, "timeout_ms": TIMEOUT_MS}
        out, normed = api.all_reduce(y, x, words, group.ranks, by, **options)
        return out if normed is None else normed

    def xla(y: jax.Array, x: jax.Array, words: jax.Array) -> jax.Array:
        out = x + lax.psum(y, "tp")
        return out if by is None else rms_norm(out, by)

    ways: dict[str, Sum] = {"us": partial(own, 1)}
    ways |= {"two_shots_us": partial(own, 2)} if group.ranks > 2 and tokens > 1 else {}
    ways |= {} if alone else {"psum_us": xla}
    try:
        x = parts(mesh, tokens, width, jnp.bfloat16) * jnp.bfloat16(1e-20)
        out: dict[str, Any] = {}
        for name, add_up in ways.items():
            try:
                run = program(mesh, group, partial(chain, add_up))
                out[name] = 1e6 * time_call(run, group.array, x, calls=CALLS)
            except NotImplementedError:
                out[name] = "too large"
        group.raise_if_failed()
    finally:
        group.close()
    return out


def ways_right(numbered: bool) -> dict[str, Any]:
    """Every shot, with the rows of a norm over clusters: 100 sums in a row of a program, and 30 programs in a row."""
    mesh, group = open_group(numbered)
    out: dict[str, Any] = {"ranks": group.ranks}
    try:
        for shots, tokens in ((1, 1), (1, 32), (2, 3), (2, 32)):
            if shots == 2 and group.ranks == 2:
                continue
            options = {"shots": shots, "numbered": numbered, "clusters": 8, "timeout_ms": TIMEOUT_MS}
            add_up = partial(api.all_reduce, ranks=group.ranks, **options)
            weight = jnp.linspace(0.5, 2, 8192)

            def check(words: jax.Array, x: jax.Array, add_up: Any = add_up, weight: jax.Array = weight) -> jax.Array:
                """1000 for each time that an element was wrong; each sum depends on the one before."""

                def step(_: jax.Array, wrong: jax.Array) -> jax.Array:
                    found, normed = add_up(x + wrong, x[::-1], words, norm=(weight, 1e-5))
                    assert normed is not None
                    wanted = x[::-1].astype(jnp.float32) + lax.psum(x.astype(jnp.float32), "tp")
                    near = jnp.abs(normed.astype(jnp.float32) - rms_norm(wanted, (weight, 1e-5))) < 0.05
                    bad = ~near | (found.astype(jnp.float32) != wanted)
                    return wrong + jnp.where(bad, 1000, 0).astype(x.dtype)

                return lax.fori_loop(0, 100, step, jnp.zeros_like(x))

            run = program(mesh, group, check)
            x = parts(mesh, tokens, 8192, jnp.bfloat16)
            outs = [run(group.array, x) for _ in range(5)]
            out[f"{shots} shots T={tokens}"] = sum(int((np.asarray(o, np.float32) != 0).sum()) for o in outs)
            group.raise_if_failed()
    finally:
        group.close()
    return out | {"wrong": any(count for name, count in out.items() if name != "ranks")}


def ways(numbered: bool) -> dict[str, Any]:
    """Microseconds of a sum of [T, 8192] bfloat16 with residual and norm, by the ways that have to be chosen from."""
    mesh, group = open_group(numbered)
    norm = (jnp.full(8192, 0.5, jnp.float32), 1e-5)
    out: dict[str, Any] = {}
    # Tokens, shots, blocks of a row.
    wanted = [
        (1, 1, 8),
        (64, 2, 8),
        (256, 2, 8),
        (64, 1, 8),
        (1, 1, 1),
        (64, 1, 1),
        (16, 2, 8),
        (16, 1, 8),
        (256, 2, 1),
    ]
    try:
        for tokens, shots, clusters in wanted[: 4 if numbered else None]:
            if shots == 2 and group.ranks == 2:
                continue
            options = {"shots": shots, "numbered": numbered, "clusters": clusters, "timeout_ms": TIMEOUT_MS}
            add_up = partial(api.all_reduce, ranks=group.ranks, norm=norm, **options)
            # A short program would show how fast the host launches it on all GPUs.
            calls = 3 * CALLS if tokens < 64 else CALLS

            def chain(words: jax.Array, x: jax.Array, add_up: Any = add_up, calls: int = calls) -> jax.Array:
                y = x
                for _ in range(calls):
                    y = add_up(y, x, words)[1]
                return y

            x = parts(mesh, tokens, 8192, jnp.bfloat16)
            name = f"T={tokens} {shots} shots {clusters} blocks us"
            try:
                run = program(mesh, group, chain)
                out[name] = 1e6 * time_call(run, group.array, x, calls=calls, seconds=0.02)
            except NotImplementedError:
                out[name] = "too large"
            group.raise_if_failed()
    finally:
        group.close()
    return out


def apart(numbered: bool) -> dict[str, Any]:
    """Microseconds of a sum whose rows are scattered and then gathered, [ranks * T, 4096] bfloat16, as layers with
    experts have them; first whether it is right."""
    mesh, group = open_group(numbered)
    ranks = group.ranks
    out: dict[str, Any] = {}
    options: dict[str, Any] = {"numbered": numbered, "timeout_ms": TIMEOUT_MS}

    def own(x: jax.Array, residual: jax.Array, words: jax.Array) -> tuple[jax.Array, jax.Array]:
        mine = cuda.run(x, residual, words, ranks, kernel=cuda.SCATTER, **options)[0]
        return mine, cuda.run(mine, None, words, ranks, kernel=cuda.GATHER, **options)[0]

    def xla(x: jax.Array, residual: jax.Array, words: jax.Array) -> tuple[jax.Array, jax.Array]:
        mine = residual + lax.psum_scatter(x, "tp", tiled=True)
        return mine, lax.all_gather(mine, "tp", tiled=True)

    try:
        for tokens in (16, 128):
            x = parts(mesh, ranks * tokens, 4096, jnp.bfloat16)

            def differ(words: jax.Array, x: jax.Array, tokens: int = tokens) -> jax.Array:
                def step(_: jax.Array, wrong: jax.Array) -> jax.Array:
                    found, wanted = (way(x + wrong, x[:tokens], words) for way in (own, xla))
                    bad = sum((a != b).astype(jnp.float32).sum() for a, b in zip(found, wanted, strict=True))
                    return wrong + bad.astype(x.dtype)

                return jnp.broadcast_to(lax.fori_loop(0, 50, step, jnp.zeros((), x.dtype)), x.shape)

            out[f"T={tokens} wrong"] = int(np.asarray(program(mesh, group, differ)(group.array, x), np.float32).max())
            for name, way in (("us", own), ("xla us", xla)):

                def chain(words: jax.Array, x: jax.Array, way: Any = way, tokens: int = tokens) -> jax.Array:
                    for _ in range(CALLS):
                        x = way(x * 0.1, x[:tokens], words)[1]
                    return x

                run = program(mesh, group, chain)
                out[f"T={tokens} both {name}"] = 1e6 * time_call(run, group.array, x, calls=CALLS, seconds=0.02)
            group.raise_if_failed()
    finally:
        group.close()
    return out | {"wrong": any(count for name, count in out.items() if "wrong" in name)}


def rows() -> Iterator[Row]:
    """None on one GPU."""
    ranks = len(jax.devices())
    if ranks < 2:
        return
    yield Row("all-reduce ways, data only, right", partial(ways_right, False))
    yield Row("all-reduce ways, data only", partial(ways, False))
    yield Row("all-reduce ways, numbered", partial(ways, True))
    yield Row("all-reduce apart, data only", partial(apart, False))
    yield Row("all-reduce apart, numbered", partial(apart, True))
    for shots in WAYS if ranks > 2 else (1,):
        yield Row(f"all-reduce bf16 right, {shots} shots", partial(right, jnp.bfloat16, shots))
        yield Row(f"all-reduce f32 right, {shots} shots", partial(right, jnp.float32, shots))
    for shots in WAYS if ranks > 2 else (1,):
        name = f"all-reduce bf16 right, {shots} shots, data only"
        yield Row(name, partial(right, jnp.bfloat16, shots, numbered=False))
    for width in (4096, 8192) if ranks > 2 else (4096,):
        for tokens in (1, 16, 64, 256):
            # As the engine's steps have them: nothing but these sums in a program.
            name = f"all-reduce and norm T={tokens} D={width}, no NCCL"
            yield Row(name, partial(times, tokens, width, norm=True, alone=True))
    for tokens in (1, 16, 64, 256):
        yield Row(f"all-reduce T={tokens}", partial(times, tokens, 4096 if ranks == 2 else 8192))
    yield Row("all-reduce T=1 and no NCCL", partial(times, 1, 4096, alone=True))
