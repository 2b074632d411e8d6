"""Products of few tokens: against float32, and their speed beside what XLA makes of the same work, autotuned."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from kernel_rows._measure import BANDWIDTH, Row, rate, time_call

from jaxllm.kernels.linear import cuda, reference
from jaxllm.kernels.linear.cuda import Tiling

BF16, F32, FP8, INT8 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn, jnp.int8
EPS = 1e-5
LAYERS = 4
"""Copies of every weight, each product after the one before: together more than the second cache holds."""
SHAPES: dict[str, tuple[int, int, dict[str, Any]]] = {
    # Llama-3.1-8B: F, D, what stands around the product
    "qkv": (6144, 4096, {"norm": True}),
    "o": (4096, 4096, {"residual": True}),
    "gate_up": (28672, 4096, {"norm": True, "activation": "silu"}),
    "down": (4096, 14336, {"residual": True}),
    "lm_head": (128256, 4096, {"out_dtype": F32}),
}
SWEEPS: dict[tuple[str, int], tuple[Tiling, ...]] = {
    # rows of a tile, blocks of a cluster, warps, stages
    ("qkv", 1): (Tiling(16, 1, 8, 5), Tiling(16, 1, 16, 4), Tiling(16, 1, 8, 12), Tiling(32, 2, 8, 4)),
    ("gate_up", 1): (Tiling(16, 1, 8, 5), Tiling(16, 1, 16, 4), Tiling(16, 1, 8, 12), Tiling(32, 2, 8, 4)),
    ("gate_up", 16): (Tiling(16, 1, 8, 4), Tiling(32, 2, 8, 3), Tiling(32, 2, 4, 7), Tiling(16, 2, 16, 3)),
    ("down", 8): (Tiling(16, 2, 4, 10), Tiling(16, 4, 8, 8), Tiling(32, 4, 4, 8)),
    ("down", 16): (Tiling(16, 4, 4, 12), Tiling(16, 8, 4, 12), Tiling(32, 8, 4, 6)),
}


ALTERNATIVES = {1: Tiling(16, 1, 8, 8), 8: Tiling(16, 1, 8, 8), 16: Tiling(32, 2, 8, 4)}
"""Splits, by tokens, of a layer's products with 4,096 inputs that are timed beside the default."""


def values(key: int | jax.Array, *shape: int, dtype: Any = BF16) -> jax.Array:
    """Evenly spread over -1.7 .. 1.7, of mean square 1; integers -127 .. 127. Cheap to compile."""
    n = lax.iota(jnp.uint32, shape[0] * shape[1] if len(shape) == 2 else shape[0]) + jnp.asarray(
        key, jnp.uint32
    ) * jnp.uint32(0x9E3779B1)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        n = (n ^ (n >> shift)) * jnp.uint32(factor)
    n = (n ^ (n >> 16)).reshape(shape)
    if dtype == INT8:
        return ((n % 255).astype(jnp.int32) - 127).astype(INT8)
    return ((n.astype(F32) / 2.0**31 - 1) * 3**0.5).astype(dtype)


CASES: tuple[tuple[int, int, int, dict[str, Any]], ...] = (
    (1, 4096, 4096, {"residual": True}),
    (3, 6144, 4096, {"norm": True}),
    (8, 4096, 14336, {"residual": True}),
    (16, 3584, 4096, {"norm": True, "activation": "silu"}),
    (32, 6144, 4096, {"norm": True}),
    (5, 100, 576, {"norm": True, "activation": "gelu_tanh", "residual": True}),
    (9, 49152, 576, {"out_dtype": F32}),
    (1, 4096, 4096, {"dtype": FP8}),
    (16, 2048, 14336, {"dtype": FP8, "residual": True}),
    (8, 6144, 4096, {"dtype": INT8, "norm": True}),
)


def right() -> dict[str, Any]:
    """Distance from float32 of all cases, in one program."""

    def case(
        T: int,
        F: int,
        D: int,
        *,
        norm: bool = False,
        activation: str | None = None,
        residual: bool = False,
        out_dtype: Any = BF16,
        dtype: Any = BF16,
    ) -> jax.Array:
        x, weight = values(1, T, D), values(2, F, D, dtype=dtype)
        scale = None if dtype == BF16 else (1 + values(3, F, dtype=F32) / 4) / (50 if dtype == INT8 else 1)
        norm_D = 1 + values(4, D, dtype=F32) / 4 if norm else None
        added = values(5, T, F // 2 if activation else F) * 8 if residual else None
        given = lax.optimization_barrier((x, weight, scale, norm_D, added))
        run = cuda.implementation(
            x, weight, eps=EPS if norm else None, activation=activation, residual=residual, out_dtype=out_dtype
        )
        found = run(*given).astype(F32)
        x, weight, scale, norm_D, added = given
        wide = weight.astype(F32) if scale is None else weight.astype(F32) * scale[:, None]
        wanted = reference.linear(
            x.astype(F32),
            wide,
            norm=None if norm_D is None else (norm_D, EPS),
            activation=activation,
            residual=None if added is None else added.astype(F32),
            matmul=lambda x, weight, dtype: jnp.matmul(x, weight.T, precision="highest"),
        )
        return jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)

    errors = jax.jit(lambda: [case(T, F, D, **options) for T, F, D, options in CASES])()
    found: dict[str, Any] = {}
    for (T, F, D, options), error in zip(CASES, errors, strict=True):
        label = " ".join(str(getattr(value, "__name__", value)) for item in options.items() for value in item)
        found[f"{T}x{F}x{D} {label}"] = float(error)
    return found | {"wrong": not all(float(error) < 0.01 for error in errors)}


@functools.cache
def weights(name: str, dtype: Any = BF16) -> list[jax.Array]:
    F, D, _ = SHAPES[name]
    count = 2 if name == "lm_head" else LAYERS
    make = jax.jit(
        lambda key: (values(key, F, D) / 64).astype(dtype) if dtype == BF16 else values(key, F, D, dtype=dtype)
    )
    return [make(jnp.uint32(i + 1)) for i in range(count)]


@functools.cache
def others(name: str, T: int, dtype: Any = BF16) -> tuple[jax.Array | None, ...]:
    """scale, the norm's weight and the residual."""
    F, D, options = SHAPES[name]
    scale = None if dtype == BF16 else jnp.full(F, 1 / 64, F32)
    return scale, jnp.ones(D, F32) if "norm" in options else None, values(9, T, F) if "residual" in options else None


def kernel(name: str, T: int, split: Tiling | None = None, dtype: Any = BF16) -> Callable[..., jax.Array]:
    F, D, options = SHAPES[name]
    return cuda.implementation(
        jax.ShapeDtypeStruct((T, D), BF16),
        jax.ShapeDtypeStruct((F, D), dtype),
        eps=EPS if "norm" in options else None,
        activation=options.get("activation"),
        residual="residual" in options,
        out_dtype=options.get("out_dtype", BF16),
        split=split,
    )


def feed(x: jax.Array, out: jax.Array) -> jax.Array:
    """x, once `out` is there."""
    return lax.optimization_barrier(x + out[:, :1].astype(x.dtype) * 1e-30)


@functools.cache
def feeding(T: int) -> float:
    """Seconds that `feed` takes."""

    def program(x: jax.Array) -> jax.Array:
        for _ in range(64):
            x = feed(x, x)
        return x

    return time_call(jax.jit(program), values(0, T, 4096), calls=64)


def seconds(run: Callable[..., jax.Array], name: str, T: int, dtype: Any = BF16) -> float:
    """Of one product; each waits for the one before."""
    x = values(0, T, SHAPES[name][1])

    def program(x: jax.Array, all_weights: list[jax.Array], rest: tuple[Any, ...]) -> jax.Array:
        out = jnp.zeros((T, 1), BF16)
        for weight in all_weights:
            out = run(feed(x, out), weight, *rest)
        return out

    made = weights(name, dtype)
    return time_call(jax.jit(program), x, made, others(name, T, dtype), calls=len(made)) - feeding(T)


def layer_products(
    linear: Callable[..., jax.Array], norm: Any, x: jax.Array, given: Sequence[Sequence[Any]]
) -> jax.Array:
    """The products of layers one after the other as the model calls them, each told of the weight that follows.

    given: qkv, o, gate_up and down of each layer. The first 4,096 columns of qkv take the place of attention.
    """
    for (qkv, o, gate_up, down), (following, *_) in zip(given, [*given[1:], given[0]], strict=True):
        y = linear(x, qkv, norm=norm, ahead=o)[:, :4096]
        x = linear(y, o, residual=x, ahead=gate_up)
        y = linear(x, gate_up, norm=norm, activation="silu", ahead=down)
        x = linear(y, down, residual=x, ahead=following)
    return x


def layer(T: int) -> dict[str, Any]:
    """The products of a layer as the model calls them, with the first 4,096 of qkv in place of attention."""
    names = ("qkv", "o", "gate_up", "down")
    given = [[weights(name)[i] for name in names] for i in range(LAYERS)]
    norm = (jnp.ones(4096, F32), EPS)

    def xla(x: jax.Array, weight: jax.Array, *, ahead: jax.Array, **options: Any) -> jax.Array:
        return reference.linear(x, weight, **options)

    def own(
        fetch: bool,
        split: Tiling | None,
        x: jax.Array,
        weight: jax.Array,
        *,
        ahead: jax.Array,
        norm: Any = None,
        activation: str | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        following = ahead if fetch else None
        eps = None if norm is None else EPS
        run = cuda.implementation(
            x,
            weight,
            eps=eps,
            activation=activation,
            residual=residual is not None,
            ahead=following,
            split=split if x.shape[1] == 4096 else None,
        )
        return run(x, weight, None, None if norm is None else norm[0], residual, following)

    x = values(0, T, 4096)
    moved = sum(weight.nbytes for weight in given[0])

    def timed(linear: Callable[..., jax.Array]) -> float:
        return time_call(jax.jit(partial(layer_products, linear, norm)), x, given, calls=LAYERS)

    found: dict[str, Any] = rate(timed(partial(own, False, None)), moved=moved)
    found["xla_us"] = timed(xla) * 1e6
    if T <= 8:
        found["ahead_us"] = timed(partial(own, True, None)) * 1e6
    if T in ALTERNATIVES:
        found["alternative_us"] = timed(partial(own, False, ALTERNATIVES[T])) * 1e6
    return found | {f"{name}_us": seconds(kernel(name, T), name, T) * 1e6 for name in names}


def sweep(name: str, T: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for split in (None, *SWEEPS[name, T]):
        label = "default" if split is None else f"{split.rows}/{split.cluster}/{split.warps}/{split.groups}"
        try:
            found[label] = seconds(kernel(name, T, split), name, T) * 1e6
        except Exception as error:  # the other splits go on
            found[label] = f"{type(error).__name__}: {error}".splitlines()[0][:80]
    return found


def speed(names: tuple[str, ...], T: int, dtype: Any = BF16) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        took = seconds(kernel(name, T, dtype=dtype), name, T, dtype)
        found[f"{name}_us"] = took * 1e6
        found[f"{name}_roof"] = weights(name, dtype)[0].nbytes / BANDWIDTH * 1e6
    return found


def rows() -> Iterator[Row]:
    yield Row("right", right)
    for T in (1, 8, 16, 32):
        yield Row(f"layer T={T}", partial(layer, T))
    for name, T in SWEEPS:
        yield Row(f"sweep {name} T={T}", partial(sweep, name, T))
    yield Row("lm_head T=1", partial(speed, ("lm_head",), 1))
    for dtype in (FP8, INT8):
        for T in (1, 16):
            yield Row(f"{dtype.__name__} T={T}", partial(speed, ("qkv", "o", "gate_up", "down"), T, dtype))
