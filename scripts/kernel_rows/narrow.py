"""Products of 8 to 64 tokens on wgmma: against float32, and their speed beside what XLA makes of the same work."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from kernel_rows._measure import Row, difference, rate, time_call
from kernel_rows.linear import BF16, EPS, F32, LAYERS, SHAPES, feed, feeding, layer_products, values, weights

from jaxllm.kernels.linear import api, narrow_cuda, reference, wide_cuda
from jaxllm.kernels.linear.narrow_cuda import Split
from jaxllm.kernels.linear.product import ScaledTokens

O = 32
"""Tokens of a page."""

TOKENS = (8, 16, 24, 32, 64)
LLAMA_70B_TP4 = {
    "qkv": (2560, 8192, {}),
    "o": (8192, 2048, {"residual": True}),
    "gate_up": (14336, 8192, {"activation": "silu"}),
    "down": (8192, 7168, {"residual": True}),
}
SPLITS: dict[tuple[str, int], tuple[Split, ...]] = {
    # rows of a tile, blocks of a cluster, panels of 64 inputs: beside the default
    ("qkv", 8): (Split(64, 1, 4, fetch=128), Split(192, 4, 1)),
    ("o", 8): (Split(64, 2, 4, fetch=128), Split(128, 4, 2)),
    ("gate_up", 8): (Split(64, 1, 4), Split(128, 1, 2), Split(64, 2, 4), Split(64, 1, 4, fetch=128)),
    ("down", 8): (Split(64, 2, 4, fetch=128), Split(128, 2, 2)),
    ("gate_up", 32): (Split(64, 1, 4), Split(128, 1, 2), Split(64, 2, 4)),
    ("down", 32): (Split(128, 2, 2),),
    ("qkv", 64): (Split(192, 4, 1), Split(64, 1, 2)),
    ("o", 64): (Split(128, 4, 2), Split(128, 2, 2)),
    ("down", 64): (Split(128, 4, 2), Split(128, 2, 2)),
}


def right(shapes: dict[str, tuple[int, int, dict[str, Any]]]) -> dict[str, Any]:
    """Distance from float32 of every product at every number of tokens; those of few tokens are rows of the others."""

    def kernel(name: str, T: int) -> Any:
        F, D, options = shapes[name]
        x, weight = jax.ShapeDtypeStruct((T, D), BF16), jax.ShapeDtypeStruct((F, D), BF16)
        return narrow_cuda.implementation(
            x, weight, activation=options.get("activation"), residual="residual" in options
        )

    cases = [(name, T) for name in shapes for T in TOKENS]
    with ThreadPoolExecutor() as pool:
        kernels = dict(zip(cases, pool.map(lambda case: kernel(*case), cases), strict=True))

    def errors(name: str) -> list[jax.Array]:
        F, D, options = shapes[name]
        activation = options.get("activation")
        residual = values(5, TOKENS[-1], F // 2 if activation else F) * 8 if "residual" in options else None
        x, weight, residual = lax.optimization_barrier((values(1, TOKENS[-1], D), values(2, F, D), residual))
        wanted = reference.linear(
            x.astype(F32),
            weight.astype(F32),
            activation=activation,
            residual=None if residual is None else residual.astype(F32),
            matmul=lambda x, weight, dtype: jnp.matmul(x, weight.T, precision="highest"),
        )
        distances = []
        for T in TOKENS:
            found = kernels[name, T](x[:T], weight, None if residual is None else residual[:T])[0].astype(F32)
            distances.append(jnp.linalg.norm(found - wanted[:T]) / jnp.linalg.norm(wanted[:T]))
        return distances

    found: dict[str, Any] = {}
    for name in shapes:
        for T, error in zip(TOKENS, jax.jit(partial(errors, name))(), strict=True):
            found[f"{name} {T}"] = float(error)
    return found | {"wrong": not all(error < 0.01 for error in found.values())}


def seconds(name: str, T: int, split: Split | None) -> float:
    """Of one product; each waits for the one before."""
    F, D, options = SHAPES[name]
    x, residual = values(0, T, D), values(9, T, F) if "residual" in options else None
    run = narrow_cuda.implementation(
        x,
        jax.ShapeDtypeStruct((F, D), BF16),
        activation=options.get("activation"),
        residual=residual is not None,
        out_dtype=options.get("out_dtype", BF16),
        split=split,
    )

    def program(x: jax.Array, all_weights: list[jax.Array], residual: jax.Array | None) -> jax.Array:
        out = jnp.zeros((T, 1), BF16)
        for weight in all_weights:
            (out,) = run(feed(x, out), weight, residual)
        return out

    made = weights(name)
    return time_call(jax.jit(program), x, made, residual, calls=len(made), seconds=0.02) - feeding(T)


def products(names: tuple[str, ...], T: int) -> dict[str, Any]:
    """Microseconds of products alone, by the default split and by others."""
    found: dict[str, Any] = {}
    for name in names:
        default = narrow_cuda.splitting(T, *SHAPES[name][:2])
        for split in (default, *SPLITS.get((name, T), ())):
            label = f"{name} {split.rows}/{split.cluster}/{split.panels}"
            label += "" if split.fetch == 256 else f" fetch {split.fetch}"
            label += " stagger" if split.stagger else ""
            try:
                found[label] = seconds(name, T, split) * 1e6
            except Exception as error:  # the other splits go on
                found[label] = f"{type(error).__name__}: {error}".splitlines()[0][:80]
    return found


def cached(T: int) -> dict[str, Any]:
    """Microseconds of products whose weights the second-level cache holds, and of small ones: what a launch costs."""
    found: dict[str, Any] = {}
    for F, D, split in (
        (4096, 512, Split(128, 4, 2)),
        (4096, 512, Split(64, 2, 4)),
        (4096, 512, Split(64, 1, 4)),
        (4096, 4096, Split(128, 4, 2)),
        (4096, 4096, Split(64, 2, 4)),
        (8192, 2048, Split(64, 1, 4)),
    ):
        x, weight = values(0, T, D), (values(1, F, D) / 64).astype(BF16)
        run = narrow_cuda.implementation(x, weight, split=split)

        def program(x: jax.Array, weight: jax.Array, run: Any = run) -> jax.Array:
            out = jnp.zeros((T, 1), BF16)
            for _ in range(8):
                (out,) = run(feed(x, out), weight)
            return out

        took = time_call(jax.jit(program), x, weight, calls=8, seconds=0.02) - feeding(T)
        found[f"{F}x{D} {split.rows}/{split.cluster}/{split.panels}"] = took * 1e6
    return found


def own(
    x: jax.Array,
    weight: jax.Array,
    *,
    norm: reference.Norm | None = None,
    activation: str | None = None,
    residual: jax.Array | None = None,
    ahead: jax.Array | None = None,
    stagger: bool = False,
) -> jax.Array:
    """As `reference.linear`, by the kernel but for the norm."""
    x = x if norm is None else reference.rms_norm(x, norm)
    split = replace(narrow_cuda.splitting(x.shape[0], *weight.shape), stagger=stagger)
    run = narrow_cuda.implementation(x, weight, activation=activation, residual=residual is not None, split=split)
    return run(x, weight, residual)[0]


def xla(x: jax.Array, weight: jax.Array, *, ahead: jax.Array, **options: Any) -> jax.Array:
    return reference.linear(x, weight, **options)


def layer(T: int) -> dict[str, Any]:
    """The products of a layer as the model calls them, with the first 4,096 of qkv in place of attention."""
    names = ("qkv", "o", "gate_up", "down")
    given = [[weights(name)[i] for name in names] for i in range(LAYERS)]
    norm = (jnp.ones(4096, F32), EPS)

    def timed(linear: Any) -> float:
        run = jax.jit(partial(layer_products, linear, norm))
        return time_call(run, values(0, T, 4096), given, calls=LAYERS, seconds=0.02)

    found: dict[str, Any] = rate(timed(own), moved=sum(weight.nbytes for weight in given[0]))
    found["xla_us"] = timed(xla) * 1e6
    if T in (8, 64):
        found["stagger_us"] = timed(partial(own, stagger=True)) * 1e6
    return found | {f"{name}_us": seconds(name, T, None) * 1e6 for name in names}


def with_norms(norm: reference.Norm, x: jax.Array, given: list[list[jax.Array]]) -> jax.Array:
    """`layer_products` whose products make the norms, with the kernel for gated ones that the engine has."""
    y: jax.Array | ScaledTokens = reference.rms_norm(x, norm)
    blocked = wide_cuda.rows_for(x.shape[0]) if api.takes_blocks(x, given[0][2], "silu") else 0
    for qkv, o, gate_up, down in given:
        x, y = api.add_scaled(api.fused(y, qkv)[:, :4096], o, x, norm, blocked)
        x, y = api.add_scaled(api.fused(y, gate_up, activation="silu"), down, x, norm)
    return x


def with_kernels_for_norms(norm: reference.Norm, x: jax.Array, given: list[list[jax.Array]]) -> jax.Array:
    """As the engine has it otherwise."""
    for qkv, o, gate_up, down in given:
        x = api.fused(api.fused(x, qkv, norm=norm)[:, :4096], o, residual=x)
        x = api.fused(api.fused(x, gate_up, norm=norm, activation="silu"), down, residual=x)
    return x


def norms(T: int) -> dict[str, Any]:
    """A layer's products, with kernels for the norms between them (plain) and with norms that the products make, in
    turns; and how far apart the results are after several layers.
    """
    given = [[weights(name)[i] for name in ("qkv", "o", "gate_up", "down")] for i in range(LAYERS)]
    norm, x = (1 + values(3, 4096, dtype=F32) / 4, EPS), values(0, T, 4096)
    runs = {"us": jax.jit(partial(with_norms, norm)), "plain_us": jax.jit(partial(with_kernels_for_norms, norm))}
    error = difference(*(run(x, given) for run in runs.values()))
    found: dict[str, Any] = {"difference": error, "wrong": not error < 0.02}
    for again in ("", "again_"):
        for name, run in runs.items():
            found[again + name] = time_call(run, x, given, calls=LAYERS, seconds=0.02) * 1e6
    return found


def rows() -> Iterator[Row]:
    yield Row("right 8b", partial(right, {name: SHAPES[name] for name in ("qkv", "o", "gate_up", "down")}))
    yield Row("right 70b tp4", partial(right, LLAMA_70B_TP4))
    for T in (8, 32, 16, 2, 64, 128):
        yield Row(f"norms T={T}", partial(norms, T))
    for T in (64, 8, 32, 16, 1, 128):
        yield Row(f"layer T={T}", partial(layer, T))
    for T in (8, 32, 64):
        for names in (("gate_up", "down"), ("qkv", "o")):
            yield Row(f"products T={T} {' '.join(names)}", partial(products, names, T))
    for T in (8, 64):
        yield Row(f"cached T={T}", partial(cached, T))
        yield Row(f"lm_head T={T}", partial(products, ("lm_head",), T))
