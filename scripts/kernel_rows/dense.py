"""Whole layers with a gated feed-forward for one token, in one launch: against float32, and beside what they read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from kernel_rows._measure import Row, rate, time_call

from jaxllm.kernels.cuda.timeline import phases
from jaxllm.kernels.dense_layer import cuda, reference

SHAPES: dict[str, tuple[int, tuple[int, int], int, int]] = {
    # D, heads of queries and of keys and values, F, H
    "llama-3.1-8b": (4096, (32, 8), 14336, 128),
    "llama-3.2-1b": (2048, (32, 8), 8192, 64),
    "llama-3.2-3b": (3072, (24, 8), 8192, 128),
    "qwen3-8b": (4096, (32, 8), 12288, 128),
}
HOW = {"activation": "silu", "scale": 128**-0.5, "eps": 1e-5}
CALLS = 4
"""Layers of a program, each with weights of its own."""


RIGHT = {
    # D, heads, F, H, layers, norms and biases, tokens
    "right": ((4096, (32, 8), 14336, 128, 1, False, 129), (1280, (20, 4), 1792, 64, 2, False, 900)),
    "also: several layers": ((2048, (16, 2), 3072, 128, 3, True, 513),),
    "also: contexts": ((4096, (32, 8), 14336, 128, 1, False, 1), (4096, (32, 8), 14336, 128, 1, False, 3000)),
}


def right(cases: tuple[Any, ...]) -> dict[str, Any]:
    """A token through layers by one kernel, against float32; the same each time it runs."""
    found: dict[str, Any] = {}
    worst = 0.0
    for D, heads, F, H, layers, more, tokens in cases:
        operands = reference.random_operands(
            D, heads, F, tokens, layers=layers, H=H, norms=more, bias=more, seed=tokens
        )
        kernel = jax.jit(cuda.implementation(operands, **HOW))
        results = [jax.tree.map(np.asarray, kernel(operands)) for _ in range(5)]
        first, *others = map(jax.tree.leaves, results)
        if not all(np.array_equal(a, b) for again in others for a, b in zip(first, again, strict=True)):
            found["not reproducible"] = f"{tokens} tokens, D {D}"
        error = reference.difference(operands, results[0], scale=HOW["scale"], eps=HOW["eps"])
        worst = max(worst, error if error == error else np.inf)
    return {"difference": worst, "cases": len(cases), "wrong": not worst < 1e-2 or bool(found), **found}


def together() -> dict[str, Any]:
    """A launch of as many layers as engines have gives the bits of as many launches."""
    operands = reference.random_operands(512, (4, 1), 768, 40, layers=36)
    found = jax.jit(cuda.implementation(operands, **HOW))(operands)
    one = jax.jit(cuda.implementation(operands._replace(layers=operands.layers[:1]), **HOW))
    x, pools = operands.x, []
    for layer in operands.layers:
        x, written = one(operands._replace(x=x, layers=(layer,)))
        pools += written
    same = map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves((x, tuple(pools))))
    return {"wrong": not all(same)}


def operands_of(shape: str, tokens: int) -> reference.Operands:
    D, heads, F, H = SHAPES[shape]
    return reference.random_operands(D, heads, F, tokens, layers=CALLS, H=H)


def launches(shape: str, tokens: int, together: int, **options: Any) -> Any:
    """A function of operands of CALLS layers, `together` of them a launch: what the launches give."""
    operands = operands_of(shape, tokens)
    kernel = cuda.launcher(operands._replace(layers=operands.layers[:together]), **HOW, **options)

    @partial(jax.jit, donate_argnums=1)
    def run(operands: reference.Operands, pools: list[jax.Array]) -> Any:
        x, written, times = operands.x, [], []
        layers = [layer._replace(kv_PYKOH=kv) for layer, kv in zip(operands.layers, pools, strict=True)]
        for first in range(0, CALLS, together):
            x, made, marks = kernel(operands._replace(x=x, layers=tuple(layers[first : first + together])))
            written += made
            times.append(marks)
        return x, written, times

    # Pools are written in place, so the program must own them.
    pools = [layer.kv_PYKOH for layer in operands.layers]
    rest = operands._replace(layers=tuple(layer._replace(kv_PYKOH=layer.norm) for layer in operands.layers))

    def again() -> Any:
        nonlocal pools
        x, pools, times = run(rest, pools)
        return x, times

    return again


def speed(shape: str, tokens: int, together: int = 1, **options: Any) -> dict[str, Any]:
    """Of a layer at one token, each with weights of its own, `together` in a launch."""
    D, (N, K), F, H = SHAPES[shape]
    seconds = time_call(launches(shape, tokens, together, **options), calls=CALLS)
    return rate(seconds, moved=2 * (D * ((2 * N + 2 * K) * H + 3 * F) + 2 * K * H * tokens))


def timeline(shape: str, tokens: int, together: int = 1) -> dict[str, Any]:
    """Where the time of a layer goes: of each phase the shortest, the median and the longest of all warps, in us."""
    run = launches(shape, tokens, together, timeline=True)
    for _ in range(20):
        _, times = run()
    found = phases(np.stack(jax.device_get(times))[1 if together == 1 else 0 :], cuda.PHASES)
    for name, three in found.items():
        print(f"    {name:24}" + "".join(f"{us:8.2f}" for us in three))
    return {"us": found["all"][1]}


def rows() -> Iterator[Row]:
    llama = "llama-3.1-8b"
    for name, cases in RIGHT.items():
        yield Row(name, partial(right, cases))
    yield Row("also: 36 layers together", together)
    yield Row("timeline at 192 tokens", partial(timeline, llama, 192))
    yield Row("timeline at 192 tokens, 4 together", partial(timeline, llama, 192, 4))
    yield Row(f"speed {llama} at 192 tokens", partial(speed, llama, 192))
    yield Row(f"speed {llama} at 192 tokens, 4 together", partial(speed, llama, 192, 4))
    for options in ({"owned": 100}, {"owned": 75}, {"depth": 5}, {"pause": 0}):
        name = ", ".join(f"{key} {value}" for key, value in options.items())
        yield Row(f"sweep {name}", partial(speed, llama, 192, 4, **options))
    for tokens in (1000, 8000, 32_000, 131_072):
        yield Row(f"long {llama} at {tokens} tokens", partial(speed, llama, tokens, 4))
    for shape in SHAPES:
        if shape != llama:
            yield Row(f"other {shape} at 192 tokens", partial(speed, shape, 192, 4))
