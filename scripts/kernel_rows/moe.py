"""Mixtures of experts: against float32, and their speed beside the bytes of the experts that somebody chose."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernel_rows._measure import FLOPS, Row, difference, rate, time_call

from jaxllm.formats import Format
from jaxllm.kernels.cuda.timeline import ends, phases
from jaxllm.kernels.grouped_matmul import cuda, reference, ring_cuda, tiles_cuda
from jaxllm.kernels.grouped_matmul.cuda import Tiling
from jaxllm.kernels.linear.quantized import Weight, quantize
from jaxllm.kernels.moe_token import cuda as one_token
from jaxllm.kernels.moe_token import reference as layers
from jaxllm.kernels.router import cuda as router

BF16 = jnp.bfloat16
E4M3_FLOPS = 1440e12
"""1/s of dense products in e4m3, measured."""
SHAPES: dict[str, tuple[int, int, int, int]] = {
    # E, X, D, F
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "mixtral-8x7b tp2": (8, 2, 4096, 7168),
}
TOKENS = {"qwen3-30b-a3b": (1, 8, 16, 64, 256), "mixtral-8x7b": (1, 16, 64), "mixtral-8x7b tp2": (1,)}
MANY_TOKENS = {"qwen3-30b-a3b": (8192, 256, 512), "mixtral-8x7b": (8192, 64), "mixtral-8x7b tp2": ()}
SWEEPS: dict[int, dict[str, tuple[Tiling, Tiling]]] = {
    # tokens (Qwen3-30B-A3B) -> splits of the two products: span, tiles of rows, of columns, warps, depth, blocks
    1: {
        "half lines": (Tiling(1, 1, 1, 8, 8, 2), Tiling(1, 2, 1, 8, 3, 2)),
        "half the loads": (Tiling(2, 2, 1, 8, 2, 3), Tiling(2, 2, 1, 6, 1, 4)),
        "large blocks": (Tiling(2, 4, 1, 8, 2, 2), Tiling(2, 4, 1, 6, 1, 4)),
    },
    64: {
        "half lines": (Tiling(1, 2, 1, 8, 4, 2), Tiling(1, 2, 1, 8, 3, 2)),
        "small blocks": (Tiling(2, 2, 2, 8, 2, 3), Tiling(2, 2, 2, 6, 1, 4)),
        "four columns": (Tiling(2, 4, 1, 8, 2, 2), Tiling(2, 2, 1, 6, 2, 4)),
    },
    256: {
        "whole lines": (Tiling(2, 2, 6, 8, 1, 2), Tiling(2, 2, 6, 6, 1, 2)),
        "large blocks": (Tiling(1, 4, 3, 8, 1, 2), Tiling(1, 4, 3, 8, 1, 2)),
    },
}


@cache
def weights(shape: str, format: Format | None = None) -> tuple[Weight, Weight]:
    """Gate and up, and down, of a size that keeps the results near one."""
    E, _, D, F = SHAPES[shape]

    @partial(jax.jit, static_argnums=(1, 2))
    def make(key: jax.Array, shape: tuple[int, ...], scale: float) -> Weight:
        wide = jax.random.normal(key, shape, BF16) * scale
        return wide if format is None else quantize(wide, format)

    first, second = jax.random.split(jax.random.key(0))
    return make(first, (E, 2 * F, D), D**-0.5), make(second, (E, D, F), F**-0.5)


def choices(E: int, X: int, T: int, count: int) -> np.ndarray:
    """Even routing: int32 [count, T, X]."""
    rng = np.random.default_rng(T)
    return np.argsort(rng.random((count, T, E)), axis=2)[:, :, :X].astype(np.int32)


def speed(
    shape: str,
    T: int,
    splits: tuple[Tiling, Tiling] | None = None,
    implementation: Any = cuda.implementation,
    format: Format | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Of the experts and the addition of the residual, each call with other experts."""
    E, X, D, F = SHAPES[shape]
    calls = 8 if T <= 64 else 3
    chosen = choices(E, X, T, calls)
    gate_up, down = weights(shape, format)
    x = jax.random.normal(jax.random.key(1), (T, D), BF16)
    weight_TX = jnp.full((T, X), 1 / X, jnp.float32)
    options |= {} if splits is None else {"splits": splits}
    kernel = implementation(x, chosen[0], gate_up, down, activation="silu", of=E, **options)

    def chain(experts: Any, x: jax.Array, chosen: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        for choice in chosen:
            x = x + experts(x, choice, weight_TX, gate_up, down).astype(BF16)
        return x

    arguments = x, jnp.asarray(chosen), gate_up, down
    seconds = time_call(jax.jit(partial(chain, kernel)), *arguments, calls=calls)
    active = np.mean([len(np.unique(choice)) for choice in chosen])
    each = 2 if format is None else 1 + 4 / (format.group or D)
    flops = T * X * 6 * F * D * (1 if format is None else FLOPS / E4M3_FLOPS)
    return {**rate(seconds, moved=active * 3 * F * D * each, flops=flops), "active": float(active)}


def route(T: int) -> dict[str, Any]:
    """The kernel of norm, router and choice, Qwen3-30B-A3B; each call on the residual stream with its norm added."""
    E, X, D, _ = SHAPES["qwen3-30b-a3b"]
    x, weight = (jax.random.normal(jax.random.key(n), (n, D), BF16) for n in (T, E))
    norm_D = jnp.full(D, D**-0.5, jnp.float32)
    router.check()
    kernel = router.implementation(x, weight, router.Choice(X, 1e-6), bias=False)

    def chain(x: jax.Array, weight: jax.Array) -> jax.Array:
        for _ in range(16):
            y, chosen, weights = kernel(x, norm_D, weight, None)
            x = x + y * (weights.sum(axis=1) + chosen[:, 0])[:, None].astype(BF16)
        return x

    return {"us": time_call(jax.jit(chain), x, weight, calls=16) * 1e6}


def right() -> dict[str, Any]:
    """Error against float32, of even and of uneven choices, some of them somebody else's."""
    found: dict[str, Any] = {}
    worst, count = 0.0, 0
    plain = jax.jit(partial(reference.experts, activation="silu", of=16))
    few = ((1, 8, 16, 2048, 768), (8, 2, 8, 1024, 1792), (64, 8, 16, 512, 384), (200, 2, 16, 256, 96))
    many = ((600, 2, 4, 512, 256), (1000, 4, 16, 256, 384))
    cases = [
        *((cuda, c) for c in few),
        *((ring_cuda, c) for c in (*few[:2], (20, 2, 16, 512, 384))),
        *((tiles_cuda, c) for c in many),
    ]
    for module, (T, X, E, D, F) in cases:
        implementation = module.implementation
        rng = np.random.default_rng(T)
        x, gate_up, down = (
            jnp.asarray(rng.standard_normal(s, np.float32) / s[-1] ** 0.5, BF16)
            for s in ((T, D), (E, 2 * F, D), (E, D, F))
        )
        weight = jnp.asarray(rng.random((T, X)), jnp.float32)
        kernel = jax.jit(implementation(x, choices(E, X, T, 1)[0], gate_up, down, activation="silu", of=16))
        for kind in ("even", "one", "elsewhere"):
            chosen = choices(E, X, T, 1)[0]
            if kind == "one":
                chosen = np.tile(np.arange(X, dtype=np.int32) + E - X, (T, 1))
            if kind == "elsewhere":
                chosen = np.where(rng.random((T, X)) < 0.5, E + 1, chosen).astype(np.int32)
            out = kernel(x, chosen, weight, gate_up, down)
            again = kernel(x, chosen, weight, gate_up, down)
            with jax.default_matmul_precision("highest"):
                wide = (a.astype(jnp.float32) for a in (gate_up, down))
                wanted = plain(x.astype(jnp.float32), chosen, weight, *wide)
            error = difference(out, wanted)
            worst, count = max(worst, error if error == error else np.inf), count + 1
            if not np.array_equal(out, again):
                found["not reproducible"] = f"T={T} {kind}"
    return {"difference": worst, "cases": count, "wrong": not worst < 6e-3 or bool(found), **found}


HEADS = {"qwen3-30b-a3b": (32, 4), "mixtral-8x7b": (32, 8)}
"""Of queries, and of keys and values."""
QK_SCALE = one_token.HEAD_DIM**-0.5


def layers_right() -> dict[str, Any]:
    """A token through three layers by one kernel, against float32; the same each time it runs, and layer by layer."""
    found: dict[str, Any] = {}
    worst, cases = 0.0, 0
    how: dict[str, Any] = {"activation": "silu", "scale": QK_SCALE}
    choice = router.Choice(8, 1e-6)
    for heads, norms, tokens in (((32, 4), True, 129), ((32, 4), True, 3000), ((16, 8), False, 513)):
        operands = layers.random_operands(2048, heads, 64, 768, tokens, layers=3, norms=norms, seed=tokens)
        together, alone = (one_token.implementation(operands, choice, most=most, **how) for most in (3, 1))
        kernel = jax.jit(together)
        results = [jax.tree.map(np.asarray, each(operands)) for each in (kernel, kernel, kernel, jax.jit(alone))]
        for again in results[1:]:
            if not all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (results[0], again)), strict=True)):
                found["not reproducible"] = f"{tokens} tokens, {heads} heads"
        first = layers.Operands(operands.token, operands.layers[:1])
        one = jax.jit(one_token.implementation(first, choice, **how))(first)
        error = layers.difference(first, one, choice, QK_SCALE)
        worst, cases = max(worst, error if error == error else np.inf), cases + 1
    return {"difference": worst, "cases": cases, "wrong": not worst < 1e-2 or bool(found), **found}


@cache
def many_layers(shape: str, tokens: int, count: int) -> layers.Operands:
    """Layers with weights of their own, but for the experts', which they share four by four."""
    E, _, D, F = SHAPES[shape]
    few = layers.random_operands(D, HEADS[shape], E, F, tokens, layers=min(4, count))
    pages = few.layers[0].kv_PYKOH
    each = []
    for i in range(count):
        layer = few.layers[i % len(few.layers)]
        keys = jax.random.split(jax.random.key(i), 3)
        qkv, output, of_router = (
            jax.random.normal(key, a.shape, BF16) * a.shape[1] ** -0.5
            for key, a in zip(keys, (layer.qkv, layer.output, layer.router), strict=True)
        )
        each.append(layer._replace(qkv=qkv, output=output, router=4 * of_router, kv_PYKOH=pages + 0))
    return layers.Operands(few.token, tuple(each))


def layers_speed(shape: str, tokens: int, count: int = 12, **options: Any) -> dict[str, Any]:
    """Of a layer among `count` of them that a token goes through."""
    E, X, D, F = SHAPES[shape]
    (N, K), H = HEADS[shape], one_token.HEAD_DIM
    operands = many_layers(shape, tokens, count)
    kernel = one_token.implementation(operands, router.Choice(X, 1e-6), activation="silu", scale=QK_SCALE, **options)
    token, each = operands
    pools = [layer.kv_PYKOH + 0 for layer in each]

    @partial(jax.jit, donate_argnums=1)
    def run(operands: layers.Operands, pools: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        pairs = zip(operands.layers, pools, strict=True)
        return kernel(layers.Operands(operands.token, tuple(a._replace(kv_PYKOH=kv) for a, kv in pairs)))

    def program(operands: layers.Operands) -> jax.Array:
        out, pools[:] = run(operands, pools)  # written in place
        return out

    weights = layers.Operands(token, tuple(layer._replace(kv_PYKOH=token.x) for layer in each))
    seconds = time_call(program, weights, calls=count)
    moved = 2 * (D * ((2 * N + 2 * K) * H + E + X * 3 * F) + 2 * K * H * tokens)
    return rate(seconds, moved=moved)


def layers_timeline(tokens: int, count: int = 12, **options: Any) -> dict[str, Any]:
    """Where the time of a layer goes: of each phase the shortest, the median and the longest of all warps, in us."""
    shape = "qwen3-30b-a3b"
    operands, choice = many_layers(shape, tokens, count), router.Choice(SHAPES[shape][1], 1e-6)
    kernel = jax.jit(one_token.launcher(operands, choice, activation="silu", scale=QK_SCALE, timeline=True, **options))
    for _ in range(10):
        times = kernel(operands)[2]
    found = phases(np.asarray(times)[1:-1], one_token.PHASES)
    for name, three in found.items():
        print(f"    {name:20}" + "".join(f"{us:8.2f}" for us in three))
    print("    when phases end: first, median, last warp with products; and with attention alone:")
    print("    its queries, units ('attention'), all of them ('merge'), and results ('wait for heads')")
    for name, groups in ends(np.asarray(times)[1:], one_token.PHASES, HEADS[shape][1]).items():
        print(f"    {name:20}" + " |".join("".join(f"{us:8.2f}" for us in three) for three in groups))
    return {"us": found["all"][1]}


def layers_predicted(count: int = 12) -> dict[str, Any]:
    """How many of a layer's experts the stream before its attention says: of the first 4 and 8 that it says, the share
    that is chosen (`token_prediction.cuh`)."""
    operands, X = many_layers("qwen3-30b-a3b", 192, count), SHAPES["qwen3-30b-a3b"][1]
    choice = router.Choice(X, 1e-6)

    @jax.jit
    def follow(token: layers.Token, layer: layers.Layer) -> tuple[jax.Array, jax.Array, jax.Array]:
        def scores(layer: layers.Layer, x: jax.Array) -> jax.Array:
            return (x.astype(jnp.float32) * layer.mlp_norm) @ layer.router.astype(jnp.float32).T

        how: dict[str, Any] = {"activation": "silu", "scale": QK_SCALE}
        silent = layer._replace(down=jnp.zeros_like(layer.down))
        middle, _ = layers.plain(layers.Operands(token, (silent,)), choice, **how)
        after, _ = layers.plain(layers.Operands(token, (layer,)), choice, **how)
        return after.astype(BF16), *(jax.lax.top_k(scores(layer, x)[0], X)[1] for x in (token.x, middle))

    token, found = operands.token, []
    for layer in operands.layers:
        x, *both = follow(token, layer)
        said, chosen = (np.asarray(experts) for experts in both)
        found.append([np.isin(said[:n], chosen).mean() for n in (4, X)])
        token = token._replace(x=x)
    first, all_of_them = np.mean(found, axis=0)
    return {"first_4": float(first), "first_8": float(all_of_them), "layers": count}


VARIANTS: tuple[dict[str, int], ...] = (
    {},
    {"LITTLE": 1},
    {"LITTLE": 1, "GUESS": 3},
    {"GUESS": 3},
    {"PAUSE": 0},
    {"LITTLE": 1, "PAUSE": 0},
)
"""Macros of `cuda/moe_layers.cu`."""


def rows() -> Iterator[Row]:
    yield Row("right", right)
    yield Row("layers right", layers_right)
    qwen3 = partial(layers_speed, "qwen3-30b-a3b")
    yield Row("layers qwen3-30b-a3b at 192 tokens", partial(qwen3, 192))
    yield Row("layers timeline at 192 tokens", partial(layers_timeline, 192))
    yield Row("layers predicted", layers_predicted)
    for macros in VARIANTS:
        name = ", ".join(f"{name} {value}" for name, value in macros.items()) or "none"
        yield Row(f"layers variant {name}", partial(qwen3, 192, macros=macros))
        yield Row(f"layers phases of variant {name}", partial(layers_timeline, 192, macros=macros))
    yield Row("layers qwen3-30b-a3b at 192 tokens, one a launch", partial(qwen3, 192, most=1))
    for tokens in (1000, 4000, 32_000):
        yield Row(f"layers qwen3-30b-a3b at {tokens} tokens", partial(qwen3, tokens))
    yield Row("layers qwen3-30b-a3b at 1000 tokens, alone", partial(qwen3, 1000, alone=8))
    many_layers.cache_clear()
    yield Row("layers mixtral-8x7b at 192 tokens", partial(layers_speed, "mixtral-8x7b", 192, count=4))
    many_layers.cache_clear()
    for T in (1, 64, 256):
        yield Row(f"router and one more kernel T={T}", partial(route, T))
    for shape, tokens in TOKENS.items():
        for T in tokens:
            yield Row(f"decode {shape} T={T}", partial(speed, shape, T))
        many = partial(speed, shape, implementation=tiles_cuda.implementation)
        for T in MANY_TOKENS[shape]:
            yield Row(f"{'prefill' if T > 1000 else 'tiles'} {shape} T={T}", partial(many, T))
        for T in {"qwen3-30b-a3b": (1, 16, 64), "mixtral-8x7b": (16,)}.get(shape, ()):
            yield Row(f"ring {shape} T={T}", partial(speed, shape, T, implementation=ring_cuda.implementation))
        if shape == "qwen3-30b-a3b":
            for T, ahead in ((1, 0), (1, 12_000_000), (8, 0)):
                yield Row(f"ahead={ahead} T={T}", partial(speed, shape, T, ahead=ahead))
        for T, splits in SWEEPS.items() if shape == "qwen3-30b-a3b" else ():
            for name, split in splits.items():
                yield Row(f"sweep T={T} {name}", partial(speed, shape, T, split))
        weights.cache_clear()
