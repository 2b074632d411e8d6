"""Products of few tokens in e4m3: against the same arithmetic in float32, and their speed beside what there is else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from kernel_rows._measure import BANDWIDTH, Row, rate, time_call
from kernel_rows.linear import BF16, EPS, F32, FP8, LAYERS, SHAPES, layer_products, values, weights

from jaxllm.formats import Format
from jaxllm.kernels.linear import fp8_cuda, quantized, reference
from jaxllm.kernels.linear.fp8_cuda import WIDE_TOKENS, Split
from jaxllm.kernels.linear.quantized import QuantizedWeight, quantize_tokens

NAMES = ("qkv", "o", "gate_up", "down")
OPTIONS = {"xla_gpu_enable_triton_gemm": False}
"""XLA's, as the engine sets them for fp8 weights: its own kernels take minutes to choose from."""
SPLITS: dict[tuple[str, int], tuple[Split, ...]] = {
    # rows of a tile, blocks of a cluster; warpgroups over the rows, and over the inputs; panels
    ("qkv", 1): (Split(48, 1, 1, 2, 2), Split(96, 2, 1, 2, 1)),
    ("o", 1): (Split(32, 1, 1, 2, 2), Split(64, 2, 1, 2, 1)),
    ("gate_up", 1): (Split(224, 1, 2, 1, 2), Split(256, 1, 2, 1, 1)),
    ("down", 1): (Split(32, 1, 1, 2, 2), Split(64, 2, 1, 2, 1)),
    ("qkv", 64): (Split(96, 2, 1, 2, 1), Split(96, 2, 2, 1, 2)),
    ("o", 64): (Split(64, 2, 1, 2, 1), Split(128, 4, 2, 1, 2)),
    ("gate_up", 64): (Split(224, 1, 2, 1, 1), Split(256, 1, 2, 1, 1)),
    ("down", 64): (Split(128, 4, 1, 2, 1), Split(64, 2, 1, 2, 1)),
}


def kernel(name: str, T: int, *, around: bool, split: Split | None = None) -> Callable[..., jax.Array]:
    """around: with what is around the product in it, from and to bfloat16; otherwise the product of e4m3 alone."""
    F, D, options = SHAPES[name]
    return fp8_cuda.implementation(
        jax.ShapeDtypeStruct((T, D), BF16 if around else FP8),
        F,
        eps=EPS if around and "norm" in options else None,
        activation=options.get("activation") if around else None,
        residual=around and "residual" in options,
        split=split,
    )


def right(counts: tuple[int, ...]) -> dict[str, Any]:
    """Distance from float32 of every product at every number of tokens."""
    cases = [(name, T, around) for name in NAMES for T in counts for around in ((True, False) if T == 2 else (T == 1,))]
    with ThreadPoolExecutor() as pool:
        kernels = dict(zip(cases, pool.map(lambda case: kernel(*case[:2], around=case[2]), cases), strict=True))

    def errors(name: str) -> list[jax.Array]:
        F, D, options = SHAPES[name]
        scale = 1 + values(3, F, dtype=F32) / 4
        norm_D, most = 1 + values(4, D, dtype=F32) / 4, counts[-1]
        residual = values(5, most, F // 2 if "activation" in options else F) * 8
        given = (values(1, most, D), values(2, F, D, dtype=FP8), scale, norm_D, residual)
        x, weight, scale, norm_D, residual = lax.optimization_barrier(given)
        distances = []
        for case, run in kernels.items():
            if case[0] != name:
                continue
            _, T, around = case
            y = reference.rms_norm(x[:T], (norm_D, EPS)) if around and "norm" in options else x[:T]
            # XLA otherwise quantises what it norms before that is rounded to bfloat16.
            numbers, of_token = quantize_tokens(lax.optimization_barrier(y))
            wanted = jnp.matmul(numbers.astype(F32), weight.astype(F32).T, precision="highest") * of_token * scale
            if around and "activation" in options:
                wanted = reference.gated(*jnp.split(wanted, 2, axis=1), options["activation"])
            if around and "residual" in options:
                wanted = wanted + residual[:T].astype(F32)
            given = (x[:T], None) if around else (numbers, of_token)
            found = run(*given, weight, scale, norm_D, residual[:T]).astype(F32)
            distances.append(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))
        return distances

    found: dict[str, Any] = {}
    for name in NAMES:
        labels = [f"{name} {T}{' around' * around}" for other, T, around in kernels if other == name]
        found |= dict(zip(labels, map(float, jax.jit(partial(errors, name), compiler_options=OPTIONS)()), strict=True))
    return found | {"wrong": not all(error < 0.005 for error in found.values())}


def seconds(name: str, T: int, split: Split | None = None, *, around: bool = False) -> float:
    """Of one product; each waits for the one before, by what it is given."""
    F, D, options = SHAPES[name]
    run = kernel(name, T, around=around, split=split)
    x, of_token = (values(0, T, D) if around else values(0, T, D, dtype=FP8)), jnp.ones((T, 1), F32)
    scale, norm_D = jnp.full(F, 1 / 64, F32), jnp.ones(D, F32)
    residual = values(9, T, F) if "residual" in options else jnp.zeros(8, BF16)

    def following(x: jax.Array, of_token: jax.Array, out: jax.Array) -> tuple[jax.Array, jax.Array]:
        tiny = out[:, :1] * 1e-30
        if around:
            return lax.optimization_barrier((x + tiny.astype(BF16), of_token))
        return lax.optimization_barrier((x, of_token + tiny.astype(F32)))

    def program(x: jax.Array, of_token: jax.Array, all_weights: list[jax.Array], *rest: jax.Array) -> jax.Array:
        out = jnp.zeros((T, 1), BF16)
        for weight in all_weights:
            x, of_token = following(x, of_token, out)
            out = run(x, of_token, weight, *rest)
        return out

    def between(x: jax.Array, of_token: jax.Array) -> tuple[jax.Array, jax.Array]:
        for _ in range(32):
            x, of_token = following(x, of_token, x[:, :1].astype(BF16) if around else of_token.astype(BF16))
        return x, of_token

    made = weights(name, FP8)
    took = time_call(jax.jit(program), x, of_token, made, scale, norm_D, residual, calls=len(made), seconds=0.02)
    return took - time_call(jax.jit(between), x, of_token, calls=32, seconds=0.01)


def products(T: int) -> dict[str, Any]:
    """Microseconds of each product alone, and the sum of them; with few tokens with what is around it."""
    around = T <= WIDE_TOKENS
    found = {f"{name}_us": seconds(name, T, around=around) * 1e6 for name in NAMES}
    floor = sum(weights(name, FP8)[0].nbytes for name in NAMES) / BANDWIDTH * 1e6
    return {"sum_us": sum(found.values()), "floor_us": floor} | found


def layer(T: int) -> dict[str, Any]:
    """The products of a layer with what is around them, with the first 4,096 of qkv in place of attention."""
    scales = {name: jnp.full((SHAPES[name][0], 1), 1 / 64, F32) for name in NAMES}
    given = [
        [QuantizedWeight(weights(name, FP8)[i], scales[name], None, Format("fp8")) for name in NAMES]
        for i in range(LAYERS)
    ]
    norm = (jnp.ones(4096, F32), EPS)

    def apart(
        matmul: Any, x: jax.Array, weight: QuantizedWeight, *, ahead: QuantizedWeight, **options: Any
    ) -> jax.Array:
        return reference.linear(x, weight, **options, matmul=matmul)

    def eight(x: jax.Array, weight: QuantizedWeight, dtype: Any) -> jax.Array:
        numbers, of_token = quantize_tokens(x)
        run = fp8_cuda.implementation(numbers, weight.shape[0], out_dtype=dtype)
        return run(numbers, of_token, weight.values, weight.scale)

    def own(
        fetched: int,
        x: jax.Array,
        weight: QuantizedWeight,
        *,
        ahead: QuantizedWeight,
        norm: reference.Norm | None = None,
        activation: str | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        eps, has, following = None if norm is None else EPS, residual is not None, ahead.values if fetched else None
        run = fp8_cuda.implementation(
            x, weight.shape[0], eps=eps, activation=activation, residual=has, ahead=following, fetched=fetched
        )
        return run(x, None, weight.values, weight.scale, None if norm is None else norm[0], residual, following)

    x = values(0, T, 4096)
    moved = sum(weight.values.nbytes for weight in given[0])

    def timed(linear: Callable[..., jax.Array]) -> float:
        run = jax.jit(partial(layer_products, linear, norm), compiler_options=OPTIONS)
        return time_call(run, x, given, calls=LAYERS, seconds=0.02)

    found: dict[str, Any] = rate(timed(partial(own, 0) if T <= WIDE_TOKENS else partial(apart, eight)), moved=moved)
    if T <= WIDE_TOKENS:
        for fetched in (48, 96):
            found[f"ahead_{fetched}_us"] = timed(partial(own, fetched * 1024)) * 1e6
    found["xla_us"] = timed(partial(apart, quantized.matmul)) * 1e6
    return found


def splits(T: int) -> dict[str, Any]:
    """Microseconds of products alone by the default split and by others."""
    found: dict[str, Any] = {}
    for name in NAMES:
        default = fp8_cuda.splitting(T, *SHAPES[name][:2])
        for split in (default, *SPLITS[name, T]):
            label = f"{name} {split.rows}/{split.cluster}/{split.across}/{split.deep}/{split.panels}"
            try:
                found[label] = seconds(name, T, split) * 1e6
            except Exception as error:  # the other splits go on
                found[label] = f"{type(error).__name__}: {error}".splitlines()[0][:80]
    return found


def rows() -> Iterator[Row]:
    yield Row("right T=1 2 8", partial(right, (1, 2, 8)))
    yield Row("right T=16 33 64", partial(right, (16, 33, 64)))
    for T in (1, 8, 16, 32, 64):
        yield Row(f"layer T={T}", partial(layer, T))
    for T in (1, 8, 16, 32, 64):
        yield Row(f"products T={T}", partial(products, T))
    for T in (1, 64):
        yield Row(f"splits T={T}", partial(splits, T))
