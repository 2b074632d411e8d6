"""Products of few tokens: against float32, and their speed beside what XLA makes of the same work, autotuned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from kernel_rows._measure import Row, difference, rate, time_call

from jaxllm.kernels.linear import api, cuda, reference
from jaxllm.kernels.linear.cuda import Tiling

BF16, F32, FP8, INT8 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn, jnp.int8
EPS = 1e-5
SHAPES: dict[str, tuple[int, int, dict[str, Any]]] = {
    # Llama-3.1-8B: F, D, what stands around the product
    "qkv": (6144, 4096, {"norm": True}),
    "o": (4096, 4096, {"residual": True}),
    "gate_up": (28672, 4096, {"norm": True, "activation": "silu"}),
    "down": (4096, 14336, {"residual": True}),
    "lm_head": (128256, 4096, {"out_dtype": F32}),
    "qkv tp2": (3072, 4096, {"norm": True}),
    "o tp2": (4096, 2048, {}),
    "gate_up tp2": (14336, 4096, {"norm": True, "activation": "silu"}),
    "down tp2": (4096, 7168, {}),
}
SWEEPS: dict[str, tuple[Tiling, ...]] = {
    # rows of a tile, blocks of a cluster, warps, groups of 64 bytes of a row in a stage
    "o": (
        Tiling(32, 1, 8, 16), Tiling(32, 1, 8, 8), Tiling(32, 1, 4, 8), Tiling(16, 1, 8, 16), Tiling(64, 2, 8, 8),
        Tiling(64, 2, 4, 8), Tiling(128, 4, 8, 8), Tiling(16, 1, 8, 32), Tiling(16, 1, 8, 64), Tiling(16, 1, 16, 64),
    ),
    "qkv": (Tiling(48, 1, 8, 16), Tiling(48, 1, 8, 8), Tiling(96, 2, 8, 8), Tiling(96, 2, 4, 4), Tiling(48, 2, 8, 8)),
    "gate_up": (
        Tiling(16, 1, 8, 32), Tiling(16, 1, 8, 64), Tiling(16, 1, 16, 64),
        Tiling(112, 1, 8, 8), Tiling(112, 1, 4, 4), Tiling(112, 2, 8, 8), Tiling(32, 1, 8, 16), Tiling(64, 2, 8, 8),
    ),
    "down": (
        Tiling(16, 1, 8, 64), Tiling(16, 1, 16, 64), Tiling(32, 1, 8, 16), Tiling(64, 2, 8, 16), Tiling(64, 2, 8, 8),
    ),
}  # fmt: skip


def random(key: int, *shape: int, dtype: Any = BF16) -> jax.Array:
    """About N(0, 1); integers -127 .. 127."""

    def make(key: jax.Array) -> jax.Array:
        values = jax.random.normal(key, shape, BF16)
        return jnp.clip(jnp.rint(values * 40), -127, 127).astype(dtype) if dtype == INT8 else values.astype(dtype)

    return jax.jit(make)(jax.random.key(key))


class Work:
    """`copies` of a product with different weights, each after the one before; the same for any implementation."""

    def __init__(
        self,
        T: int,
        F: int,
        D: int,
        *,
        norm: bool = False,
        activation: str | None = None,
        residual: bool = False,
        out_dtype: Any = BF16,
        dtype: Any = BF16,
    ):
        self.options = {"eps": EPS if norm else None, "activation": activation, "residual": residual}
        self.out_dtype = out_dtype
        self.moved = F * D * jnp.dtype(dtype).itemsize
        self.flops = 2 * T * F * D
        self.copies = int(np.clip(600e6 // self.moved, 2, 16))
        self.x = random(0, T, D)
        self.weights = [random(1 + i, F, D, dtype=dtype) for i in range(self.copies)]
        scale = random(98, F, dtype=F32)
        self.others = (
            None if dtype == BF16 else (1 + 0.1 * scale) / 64 / 64,
            1 + 0.1 * random(99, D, dtype=F32) if norm else None,
            random(100, T, F // 2 if activation else F) if residual else None,
        )

    def kernel(self, split: Tiling | None = None) -> Callable[..., jax.Array]:
        return cuda.implementation(self.x, self.weights[0], out_dtype=self.out_dtype, split=split, **self.options)

    def plain(self, x: jax.Array, weight: jax.Array, scale, norm_D, residual) -> jax.Array:  # type: ignore[no-untyped-def]
        """By XLA, as layers do it without the kernel."""
        norm = None if norm_D is None else (norm_D, EPS)
        if self.out_dtype == F32:
            return reference.matmul(x, weight)

        def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
            return reference.matmul(x, weight) if scale is None else reference.matmul(x, weight.astype(BF16)) * scale

        activation = self.options["activation"]
        return reference.linear(x, weight, norm=norm, activation=activation, residual=residual, matmul=matmul)

    def seconds(self, product: Callable[..., jax.Array]) -> float:
        """Of one; each is fed by a small kernel that waits for the one before."""

        def program(x: jax.Array, weights: list[jax.Array], others: tuple[Any, ...]) -> jax.Array:
            out = jnp.zeros((x.shape[0], 1), BF16)
            for weight in weights:
                out = product(feed(x, out), weight, *others)[:, :1].astype(BF16)
            return out

        return time_call(jax.jit(program), self.x, self.weights, self.others, calls=self.copies)

    def error(self) -> float:
        """Of the first product, against float32."""
        found = jax.jit(self.kernel())(self.x, self.weights[0], *self.others)
        scale, norm, residual = self.others
        with jax.default_matmul_precision("highest"):
            x, weight = self.x.astype(F32), self.weights[0].astype(F32)
            weight = weight if scale is None else weight * scale[:, None]
            wanted = jax.jit(partial(reference.linear, activation=self.options["activation"]))(
                x,
                weight,
                norm=None if norm is None else (norm, EPS),
                residual=None if residual is None else residual.astype(F32),
            )
        return difference(found, wanted)


def feed(x: jax.Array, out: jax.Array) -> jax.Array:
    return lax.optimization_barrier(x + out * 1e-30)


def right(T: int, F: int, D: int, **options: Any) -> dict[str, Any]:
    error = Work(T, F, D, **options).error()
    return {"difference": error, "wrong": not error < 0.01}


def speed(name: str, T: int, dtype: Any = BF16, xla: bool = True) -> dict[str, Any]:
    F, D, options = SHAPES[name]
    work = Work(T, F, D, dtype=dtype, **options)
    found: dict[str, Any] = {}
    if T <= cuda.MAX_TOKENS:
        error = work.error()
        found = {"difference": error, "wrong": not error < 0.01}
        found |= rate(work.seconds(work.kernel()), moved=work.moved, flops=work.flops)
    if xla:
        found["xla_us"] = work.seconds(work.plain) * 1e6
    return found


def sweep(name: str, T: int) -> dict[str, Any]:
    F, D, options = SHAPES[name]
    work = Work(T, F, D, **options)
    found: dict[str, Any] = {}
    for split in SWEEPS[name]:
        label = f"{split.rows}/{split.cluster}/{split.warps}/{split.groups}"
        try:
            found[label] = work.seconds(work.kernel(split)) * 1e6
        except Exception as error:  # the other splits go on
            found[label] = f"{type(error).__name__}: {error}".splitlines()[0][:80]
    return found


def only_feed(T: int) -> dict[str, Any]:
    """What feeding costs, which all rows here contain."""
    x = random(0, T, 4096)

    def program(x: jax.Array) -> jax.Array:
        for _ in range(64):
            x = feed(x, x[:, :1])
        return x

    return {"us": time_call(jax.jit(program), x, calls=64) * 1e6}


def layers(T: int, count: int = 4) -> dict[str, Any]:
    """The products of a layer as the model calls them, with the first 4,096 of qkv in place of attention."""
    names = ("qkv", "o", "gate_up", "down")
    weights = [[random(10 * i + j, *SHAPES[name][:2]) * 0.02 for j, name in enumerate(names)] for i in range(count)]
    norm = (jnp.ones(4096, F32), EPS)
    x = random(0, T, 4096)

    def program(linear: Callable[..., jax.Array], x: jax.Array, weights: list[list[jax.Array]]) -> jax.Array:
        for qkv, o, gate_up, down in weights:
            x = linear(linear(x, qkv, norm=norm)[:, :4096], o, residual=x)
            x = linear(linear(x, gate_up, norm=norm, activation="silu"), down, residual=x)
        return x

    found: dict[str, Any] = {}
    moved = sum(weight.nbytes for weight in weights[0])
    always = {"plain": ((cuda.MAX_TOKENS, 1 << 20),), "fused": ((cuda.MAX_TOKENS, 1 << 20),)}
    tables = {"table": cuda.MEGABYTES, "always": always}
    for label, table in tables.items():
        before, cuda.MEGABYTES = cuda.MEGABYTES, table
        try:
            timed = time_call(jax.jit(partial(program, api.linear)), x, weights, calls=count)
        finally:
            cuda.MEGABYTES = before
        found |= {f"{label} {key}": value for key, value in rate(timed, moved=moved).items()}
    found["xla_us"] = time_call(jax.jit(partial(program, reference.linear)), x, weights, calls=count) * 1e6
    return found


def rows() -> Iterator[Row]:
    for T, F, D, options in (
        (1, 4096, 4096, {"residual": True}),
        (3, 6144, 4096, {"norm": True}),
        (8, 6144, 4096, {"norm": True}),
        (16, 28672, 4096, {"norm": True, "activation": "silu"}),
        (32, 4096, 14336, {"residual": True}),
        (5, 100, 576, {"norm": True, "activation": "gelu_tanh", "residual": True}),
        (9, 49152, 576, {"out_dtype": F32}),
        (1, 4096, 4096, {"dtype": FP8}),
        (16, 6144, 4096, {"dtype": FP8, "norm": True}),
        (8, 4096, 14336, {"dtype": INT8, "residual": True}),
    ):
        label = " ".join(str(getattr(value, "__name__", value)) for item in options.items() for value in item)
        yield Row(f"right T={T} {F}x{D} {label}", partial(right, T, F, D, **options))
    yield Row("feed T=16", partial(only_feed, 16))
    for T in (1, 8, 16, 32):
        yield Row(f"layer T={T}", partial(layers, T))
    for name in ("qkv", "o", "gate_up", "down"):
        for T in (1, 8, 16, 32, 64):
            yield Row(f"{name} T={T}", partial(speed, name, T))
    for T in (1, 16):
        yield Row(f"lm_head T={T}", partial(speed, "lm_head", T))
    for name in SWEEPS:
        for T in (1, 8, 16):
            yield Row(f"sweep {name} T={T}", partial(sweep, name, T))
    for dtype in (FP8, INT8):
        for name in ("qkv", "o", "gate_up", "down"):
            for T in (1, 16):
                xla = dtype == FP8 and T == 1
                yield Row(f"{dtype.__name__} {name} T={T}", partial(speed, name, T, dtype, xla))
    for name in ("qkv tp2", "o tp2", "gate_up tp2", "down tp2"):
        for T in (1, 16):
            yield Row(f"{name} T={T}", partial(speed, name, T, xla=T == 1))
